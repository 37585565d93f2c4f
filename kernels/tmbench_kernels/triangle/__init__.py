"""Triangle attention: attention sinks, a sliding window, and full attention for the last queries.

TriangleMix (He et al. 2025, arXiv 2507.21526) gives it to the deep layers of a model and leaves the shallow ones dense.
Without last queries it is the A-shape of streaming attention (Xiao et al. 2023, arXiv 2309.17453). The window is strict,
as in the released code of TriangleMix: ``n_local`` keys, the query's own among them. ``last_n`` does what it says; the
released code never reads it, and its effective value there is always 128. ``delta`` corrects what is left out: see
``tmbench_kernels.triangle.delta``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tmbench_kernels.cuda import for_hopper, for_triton, imported
from tmbench_kernels.parameters import Parameter, ParameterError, parameter
from tmbench_kernels.pattern import Backend, Pattern, check_logits, check_shapes, default_scale
from tmbench_kernels.sdpa import attention
from tmbench_kernels.shared import LAST_N, N_INIT, N_LOCAL
from tmbench_kernels.triangle.delta import CARRY, LAST, RECOMPUTE, Rows, attend_delta, rows_backend, rows_of
from tmbench_kernels.triangle.torch_backend import attend as attend_torch

_DELTA = Parameter(default=64, help="", at_least=1, tokens=True)


@dataclass(frozen=True)
class Triangle(Pattern):
    """Query i attends to key j <= i when ``j < n_init``, or ``i - j < n_local``, or ``i >= keys - last_n``.

    All three count tokens; 0 switches a part off and a value beyond the length makes the pattern dense. With neither sinks
    nor a window the queries before the last attend to nothing, and their output is zero. Raises ValueError for a negative.
    """

    n_init: int = N_INIT.field()
    n_local: int = N_LOCAL.field()
    last_n: int = LAST_N.field()
    delta: int | None = parameter(
        None,
        help="Every delta-th query is also dense, its difference carried on (arXiv 2505.11254).",
        read=lambda given: _DELTA.value("delta", given),
        shown_default="none",
    )
    mode: str = parameter(
        "",
        help=f"What dense queries under delta do: {CARRY} their difference on, or {RECOMPUTE} themselves alone.",
        choices=(CARRY, RECOMPUTE),
        shown_default=f"{CARRY} with delta",
    )
    tail: int | None = None
    """Under ``delta``, where the last queries of a prompt of known length begin; None takes the prompt to end here."""

    name: ClassVar[str] = "triangle"
    backends: ClassVar[tuple[Backend, ...]] = (
        for_hopper(imported("triangle.hopper_backend", "attend")),
        for_triton(imported("triangle.triton_backend", "attend")),
        Backend("torch-banded", ("cpu", "cuda"), attend_torch, softcap=True, lse=True, chunks=True),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta is None:
            if self.mode:
                raise ParameterError("mode", f" {self.mode} says what delta does, which is not given: add delta=64")
            return
        _DELTA.check("delta", self.delta)
        object.__setattr__(self, "mode", self.mode or CARRY)

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
        if self.delta is not None:
            return replace(self, tail=self._tail(length))
        return replace(self, last_n=max(self.last_n - (length - end), 0))

    def _tail(self, keys: int) -> int:
        """The position of the first of the last queries."""
        if self.tail is not None:
            return min(self.tail, keys)
        last = self.last_n if self.delta is None else keys % self.delta + max(self.last_n, self.delta, LAST)
        return max(keys - last, 0)

    def base(self, keys: int) -> Triangle:
        """The triangle without its correction, over so many keys."""
        return Triangle(self.n_init, self.n_local, keys - self._tail(keys))

    def rows(self, start: int, tail: int) -> Rows:
        """The dense queries under ``delta`` among those from ``start`` on and before ``tail``."""
        assert self.delta is not None
        return rows_of(start, tail, self.delta, self.mode)

    def attends(self, i: Tensor, j: Tensor, keys: int) -> Tensor:
        """The definition without ``delta``: whether query i attends to key j, bool, for positions that broadcast."""
        return (j <= i) & ((j < self.n_init) | (i - j < self.n_local) | (i >= keys - self.last_n))

    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """Bool ``[1, 1, queries, keys]``; the values of q and k do not matter."""
        keys = k.shape[2]
        start = keys - q.shape[2]
        positions = torch.arange(keys, device=q.device)
        base = self if self.delta is None else self.base(keys)
        mask = base.attends(positions[start:, None], positions, keys)
        if self.delta is not None:
            dense = torch.tensor(self.rows(start, self._tail(keys)).positions(), dtype=torch.long, device=q.device)
            mask[dense - start] = positions <= dense[:, None]
        return mask[None, None]

    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """In closed form: a query before the last attends to ``min(i + 1, n_init + n_local)`` keys; dense ones to all."""
        batch, heads, queries = q.shape[:3]
        keys = k.shape[2]
        start = keys - queries
        tail = max(self._tail(keys), start)
        last = (keys * (keys + 1) - tail * (tail + 1)) // 2
        rows = [] if self.delta is None else self.rows(start, tail).positions()
        rest = sum(max(i + 1 - self.n_init - self.n_local, 0) for i in rows)
        return batch * heads * (self._before(tail) - self._before(start) + last + rest)

    def _before(self, end: int) -> int:
        """The pairs of the queries before position ``end``, none of them among the last."""
        width = self.n_init + self.n_local
        ramp = min(width, end)
        return ramp * (ramp + 1) // 2 + (end - ramp) * width

    def backend(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float = 0.0, lse: bool = False) -> Backend:
        """Under ``delta`` named by all that runs: the triangle's backend, and that of the dense rows where it is another."""
        found = super().backend(q, k, v, softcap=softcap, lse=lse)
        if self.delta is None:
            return found
        rows = rows_backend(q, k, v, softcap=softcap, lse=lse).name
        # Rows in torch are of a triangle in torch.
        others = [] if rows in (found.name, "torch") else [rows]
        return replace(found, name=f"+{self.name}:".join([found.name, *others]), attend=attend_delta, lse=False)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As every pattern's; under ``delta`` learned sinks take their part of triangle and dense rows alike."""
        if self.delta is None:
            return super().attend(q, k, v, scale=scale, softcap=softcap, sinks=sinks)
        check_shapes(q, k, v)
        check_logits(q, softcap, sinks)
        return attend_delta(self, q, k, v, default_scale(q, scale), softcap=softcap, sinks=sinks)

    def attend_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As every pattern's; raises ValueError under ``delta``."""
        if self.delta is not None:
            raise ValueError(f"under delta={self.delta} an output is of several softmaxes and has no log-sum-exp of its own")
        return super().attend_lse(q, k, v, scale=scale, softcap=softcap)

    def last_row(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As every pattern's; under ``delta`` it is dense, and in the middle of a prompt it reads the other rows."""
        asked: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
        if self.delta is None:
            return super().last_row(q, k, v, **asked)
        if self._tail(k.shape[2]) < k.shape[2]:
            return self.base(k.shape[2]).last_row(q, k, v, **asked)
        return self.attend(q, k, v, **asked)[:, :, -1:]

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
