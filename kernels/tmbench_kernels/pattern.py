"""What every pattern offers: a definition, the number of pairs it computes, and attention over them.

Shapes, everywhere in this package: q ``[batch, heads, length, head_dim]``, k and v ``[batch, kv_heads, length, head_dim]``
with ``heads`` a multiple of ``kv_heads``, any strides, fp32, fp16 or bf16. Grouped-query attention is native: query head
``h`` reads key head ``h // (heads // kv_heads)``, and k and v are never repeated in memory.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tmbench_kernels.parameters import Declared


def _nothing(*_: Any) -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """One implementation of a pattern: its name in results, what it runs on, and its function.

    ``missing`` and ``refuses`` are asked at every call of ``attend``, so they take no longer than a few microseconds. Their
    reasons go on from the backend's name: "is not installed (pip install flash-attn-4)".
    """

    name: str
    devices: tuple[str, ...]
    attend: Callable[[Any, Tensor, Tensor, Tensor, float], Tensor]
    """``attend(pattern, q, k, v, scale)`` returns ``[batch, heads, length, head_dim]`` in q's type."""
    missing: Callable[[], str] = _nothing
    """"" where the backend is installed, otherwise how to install it."""
    refuses: Callable[[Any, Tensor, Tensor, Tensor], str] = _nothing
    """``refuses(pattern, q, k, v)``: "" where the backend serves these tensors, otherwise why it does not."""

    def obstacle(self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> str:
        """Why the backend cannot attend over these tensors here; "" where it can. Their values do not matter."""
        if q.device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {q.device.type}"
        return self.missing() or self.refuses(pattern, q, k, v)


class Pattern(Declared):
    """Which (query, key) pairs one layer computes. Subclasses are frozen dataclasses of the paper's parameters.

    Those that a method has are declared in them by ``tmbench_kernels.parameter``.
    """

    name: ClassVar[str]
    dynamic: ClassVar[bool] = False
    """Whether the pairs depend on the data; if not, ``pairs`` reads shapes only and takes tensors of the meta device."""
    backends: ClassVar[tuple[Backend, ...]]
    """In order of preference; the first that is installed and serves the tensors is used."""

    @abc.abstractmethod
    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """The definition: which pairs are computed, bool ``[batch or 1, heads or 1, length, length]``. Quadratic."""

    @abc.abstractmethod
    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """How many (query, key) pairs the pattern computes on these tensors, summed over batch and heads."""

    def per_layer(self, layers: int, heads: int) -> Sequence[Pattern]:
        """The pattern itself, for every layer."""
        return [self] * layers

    def of_heads(self, heads: range) -> Pattern:
        """The same for some of the query heads, as a rank has them of a model that is split: itself where all are alike."""
        return self

    @property
    def candidates(self) -> tuple[Backend, ...]:
        """The backends to choose from, in order of preference."""
        return self.backends

    def backend(self, q: Tensor, k: Tensor, v: Tensor) -> Backend:
        """The backend that serves these tensors; raises ValueError with the reasons where there is none."""
        for backend in self.candidates:
            if not backend.obstacle(self, q, k, v):
                return backend
        reasons = "; ".join(f"{backend.name} {backend.obstacle(self, q, k, v)}" for backend in self.candidates)
        raise ValueError(f"no backend of the pattern {self.name} serves these tensors: {reasons}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Causal attention over the pattern's pairs: ``[batch, heads, length, head_dim]``, in q's type.

        ``scale`` multiplies the logits; None means ``head_dim ** -0.5``. Raises ValueError for shapes that do not fit, and
        where no backend serves them.
        """
        check_shapes(q, k, v)
        return self.backend(q, k, v).attend(self, q, k, v, default_scale(q, scale))

    def last_row(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """The last query's output alone, ``[batch, heads, 1, v_dim]``: all that the last layer of a prefill must yield.

        A dynamic pattern chooses by several of the last queries, so it computes all rows unless it knows better. A static
        one reads no other query than the last: the rest of q may hold anything.
        """
        return self.attend(q, k, v, scale=scale)[:, :, -1:]


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised ``[batch, heads, length, v_dim]``, in memory ``[batch, length, heads, v_dim]`` as models want it."""
    batch, heads, length = q.shape[:3]
    return q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)


def default_scale(q: Tensor, scale: float | None) -> float:
    """``scale``, or the usual ``head_dim ** -0.5``."""
    return float(q.shape[-1]) ** -0.5 if scale is None else scale


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v are one prefill: equal lengths, grouped heads, one type and device."""
    if q.dim() != 4 or k.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q, k, v must be [batch, heads, length, head_dim], not {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch, length or head_dim")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if q.dtype != k.dtype or q.dtype != v.dtype or q.device != k.device or q.device != v.device:
        raise ValueError("q, k and v must have one type and live on one device")
