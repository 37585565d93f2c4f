"""Dense causal attention: every query attends to itself and to every key before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tmbench_kernels.dense.libraries import CUDA_BACKENDS
from tmbench_kernels.pattern import Backend, Pattern, check_shapes, default_scale
from tmbench_kernels.reference import causal_mask
from tmbench_kernels.sdpa import sdpa
from tmbench_kernels.shared import DENSE_BACKEND, DENSE_BACKENDS


def _attend_sdpa(pattern: Dense, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return sdpa(q, k, v, scale, causal=True)


@dataclass(frozen=True)
class Dense(Pattern):
    """Full causal attention. Its only parameter does not change the pairs: it chooses who computes them.

    ``dense_backend`` names the one backend to use, so that it is an error where that one is absent or refuses; "" takes the
    first that serves. Raises ValueError for a name that there is none of.
    """

    dense_backend: str = DENSE_BACKEND.field()

    name: ClassVar[str] = "dense"
    backends: ClassVar[tuple[Backend, ...]] = (*CUDA_BACKENDS, Backend(DENSE_BACKENDS[-1], ("cpu", "cuda"), _attend_sdpa))

    @property
    def candidates(self) -> tuple[Backend, ...]:
        """All backends, or the one that is named alone."""
        if not self.dense_backend:
            return self.backends
        return tuple(backend for backend in self.backends if backend.name == self.dense_backend)

    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """Bool ``[1, 1, length, length]``; the values of q and k do not matter."""
        return causal_mask(q.shape[2], q.device)[None, None]

    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """``length * (length + 1) / 2`` for each batch and head."""
        batch, heads, length = q.shape[:3]
        return batch * heads * length * (length + 1) // 2

    def last_row(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """The last query over all keys; reads no other query."""
        check_shapes(q, k, v)
        return sdpa(q[:, :, -1:], k, v, default_scale(q, scale))
