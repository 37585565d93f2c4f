"""Dense causal attention: every query attends to itself and to every key before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from tmbench_kernels.cuda import for_hopper, for_triton, imported
from tmbench_kernels.dense import few_queries
from tmbench_kernels.dense.libraries import CUDA_BACKENDS
from tmbench_kernels.pattern import Backend, Pattern
from tmbench_kernels.reference import causal_mask
from tmbench_kernels.sdpa import attention, sdpa, written_out
from tmbench_kernels.shared import DENSE_BACKEND, DENSE_BACKENDS

_SDPA, _, _WRITTEN_OUT = DENSE_BACKENDS[-3:]


def _attend_sdpa(pattern: Dense, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return sdpa(q, k, v, scale, causal=True)


def _attend_written_out(pattern: Dense, q: Tensor, k: Tensor, v: Tensor, scale: float, **asked: Any) -> Tensor:
    return written_out(q, k, v, scale, causal=True, **asked)


@dataclass(frozen=True)
class Dense(Pattern):
    """Full causal attention. Its only parameter does not change the pairs: it chooses who computes them.

    ``dense_backend`` names the one backend to use, so that it is an error where that one is absent or refuses; "" takes
    the first that serves. The very first is for few queries behind many keys, and has no such name. The last two are for
    what the libraries do not have, soft-capped logits and the log-sum-exp beside any head size: the triangle's kernel in
    Triton, over a window that is never left, and softmax written out in torch. Raises ValueError for a name that there is
    none of.
    """

    dense_backend: str = DENSE_BACKEND.field()

    name: ClassVar[str] = "dense"
    backends: ClassVar[tuple[Backend, ...]] = (
        replace(for_hopper(few_queries.attend), refuses=few_queries.refuses),
        *CUDA_BACKENDS,
        Backend(_SDPA, ("cpu", "cuda"), _attend_sdpa, chunks=True),
        for_triton(imported("triangle.triton_backend", "attend_dense")),
        Backend(_WRITTEN_OUT, ("cpu", "cuda"), _attend_written_out, softcap=True, lse=True, chunks=True),
    )

    @property
    def candidates(self) -> tuple[Backend, ...]:
        """All backends, or the one that is named alone."""
        if not self.dense_backend:
            return self.backends
        return tuple(backend for backend in self.backends if backend.name == self.dense_backend)

    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """Bool ``[1, 1, queries, keys]``; the values of q and k do not matter."""
        return causal_mask(k.shape[2], q.device, queries=q.shape[2])[None, None]

    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """The query at position i has ``i + 1``: ``keys * (keys + 1) / 2`` for each batch and head of a whole prompt."""
        batch, heads, queries = q.shape[:3]
        return batch * heads * queries * (2 * k.shape[2] - queries + 1) // 2

    def compute_last_row(self, q: Tensor, k: Tensor, v: Tensor, scale: float, **asked: Any) -> Tensor:
        """The last query over all keys; reads no other query."""
        return attention(q[:, :, -1:], k, v, scale, **asked)
