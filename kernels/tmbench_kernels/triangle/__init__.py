"""Triangle attention: attention sinks, a sliding window, and full attention for the last queries.

TriangleMix (He et al. 2025, arXiv 2507.21526) gives it to the deep layers of a model and leaves the shallow ones dense.
Without last queries it is the A-shape of streaming attention (Xiao et al. 2023, arXiv 2309.17453). The window is strict,
as in the released code of TriangleMix: ``n_local`` keys, the query's own among them. ``last_n`` does what it says; the
released code never reads it, and its effective value there is always 128.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tmbench_kernels.cuda import for_hopper, for_triton, imported
from tmbench_kernels.pattern import Backend, Pattern
from tmbench_kernels.sdpa import attention
from tmbench_kernels.shared import LAST_N, N_INIT, N_LOCAL
from tmbench_kernels.triangle.torch_backend import attend as attend_torch


@dataclass(frozen=True)
class Triangle(Pattern):
    """Query i attends to key j <= i when ``j < n_init``, or ``i - j < n_local``, or ``i >= keys - last_n``.

    All three count tokens; 0 switches a part off and a value beyond the length makes the pattern dense. With neither sinks
    nor a window the queries before the last attend to nothing, and their output is zero. Raises ValueError for a negative.
    """

    n_init: int = N_INIT.field()
    n_local: int = N_LOCAL.field()
    last_n: int = LAST_N.field()

    name: ClassVar[str] = "triangle"
    backends: ClassVar[tuple[Backend, ...]] = (
        for_hopper(imported("triangle.hopper_backend", "attend")),
        for_triton(imported("triangle.triton_backend", "attend")),
        Backend("torch-banded", ("cpu", "cuda"), attend_torch, softcap=True, lse=True, chunks=True),
    )

    def useless(self) -> str:
        if self.n_init or self.n_local:
            return ""
        return "{n_init} and {n_local} are both 0, so most queries would see no key: raise one of them"

    @classmethod
    def streaming(cls, n_init: int, n_local: int) -> Triangle:
        """The A-shape: sinks and window, no last queries."""
        return cls(n_init, n_local, last_n=0)

    def of_chunk(self, end: int, length: int) -> Triangle:
        """With those of the prompt's last queries that come before ``end``."""
        return replace(self, last_n=max(self.last_n - (length - end), 0))

    def attends(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        """The definition: whether query i attends to key j, bool, for positions that broadcast."""
        return (j <= i) & ((j < self.n_init) | (i - j < self.n_local) | (i >= keys - self.last_n))

    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """Bool ``[1, 1, queries, keys]``; the values of q and k do not matter."""
        positions = torch.arange(k.shape[2], device=q.device)
        return self.attends(positions[k.shape[2] - q.shape[2] :, None], positions, k.shape[2])[None, None]

    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """In closed form: a query before the last attends to ``min(i + 1, n_init + n_local)`` keys."""
        batch, heads, queries = q.shape[:3]
        keys = k.shape[2]
        start = keys - queries
        tail = max(keys - self.last_n, start)
        last = (keys * (keys + 1) - tail * (tail + 1)) // 2
        return batch * heads * (self._before(tail) - self._before(start) + last)

    def _before(self, end: int) -> int:
        """The pairs of the queries before position ``end``, none of them among the last."""
        width = self.n_init + self.n_local
        ramp = min(width, end)
        return ramp * (ramp + 1) // 2 + (end - ramp) * width

    def compute_last_row(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **asked: Any) -> Tensor:
        """The last query over its keys, the sinks and the window where it is not among ``last_n``; reads no other query."""
        length = k.shape[2]
        start = 0 if self.last_n else max(length - self.n_local, 0)
        sinks = min(self.n_init, start)
        if sinks:
            k, v = (torch.cat([x[:, :, :sinks], x[:, :, start:]], dim=2) for x in (k, v))
        elif start == length:
            if "lse" in asked:
                asked["lse"].fill_(-torch.inf)
            return v.new_zeros(*q.shape[:2], 1, v.shape[3])
        else:
            k, v = k[:, :, start:], v[:, :, start:]
        return attention(q[:, :, -1:], k, v, scale, **asked)
