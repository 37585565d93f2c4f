"""What every pattern offers: a definition, the number of pairs it computes, and attention over them.

Shapes, everywhere in this package: q ``[batch, heads, queries, head_dim]``, k and v ``[batch, kv_heads, keys, head_dim]``
with ``heads`` a multiple of ``kv_heads``, any strides, fp32, fp16 or bf16. Grouped-query attention is native: query head
``h`` reads key head ``h // (heads // kv_heads)``, and k and v are never repeated in memory. v may be narrower or wider
than q and k, as under multi-head latent attention: the output has v's head size.

Queries are the last rows of the keys: query row r is position ``keys - queries + r`` and sees the keys up to itself, so that
the causal diagonal ends in the lower right corner. A whole prompt has as many queries as keys; a *chunk* of a prompt has
fewer, and its keys begin with those of the chunks before. What a pattern computes for a chunk:

- Positions are those of the prompt: sinks are its first keys, and windows reach back into earlier chunks.
- The *last* queries are the last of the chunk, as where an engine does not know how long the prompt is: every chunk is
  treated as if the prompt ended with it. So triangle's ``last_n`` rows see everything in every chunk, a superset of what
  they see in one piece. An engine that knows the length asks for ``pattern.of_chunk(end, length)``: there only those of
  the prompt's last rows that lie in the chunk count as last.
- A rule that chooses by the last queries (vertical-slash, FlexPrefill) knows no other queries than the chunk's. It chooses
  by its last ones whether the length is known or not, by all of them where they are fewer, and for the chunk alone.
- Blocks, strides and the runs of vertical-slash lie on the prompt's grid, which starts at position 0. A block of queries
  that a chunk's edge cuts is chosen for by those of its queries that are in the chunk.
- Keys of earlier chunks take part in full: in the means of key blocks, among the columns and diagonals to choose from, and
  in every softmax. Queries of earlier chunks are gone, and nothing that was chosen for them is remembered.

It follows that a rule of positions alone gives the same in chunks as in one piece, and so does one whose blocks of queries
choose for themselves, where chunks end on the edges of blocks.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tmbench_kernels.parameters import Declared

_EDGE = 128
"""Every pattern's blocks of queries begin at a multiple of so many tokens."""


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
    attend: Callable[..., Tensor]
    """``attend(pattern, q, k, v, scale)`` returns ``[batch, heads, queries, v_dim]`` in q's type, in memory of its own.

    By keyword it is given ``softcap``, where logits are to be capped, and ``lse``, a tensor as ``new_lse`` makes it that it
    fills, where the log-sum-exp is asked for; neither otherwise, nor where the backend does not have it.
    """
    missing: Callable[[], str] = _nothing
    """"" where the backend is installed, otherwise how to install it."""
    refuses: Callable[[Any, Tensor, Tensor, Tensor], str] = _nothing
    """``refuses(pattern, q, k, v)``: "" where the backend serves these tensors, otherwise why it does not."""
    softcap: bool = False
    """Whether it has soft-capped logits."""
    lse: bool = False
    """Whether it gives the log-sum-exp, and so serves learned sinks."""
    chunks: bool = False
    """Whether it takes fewer queries than keys."""

    def obstacle(self, pattern: Any, q: Tensor, k: Tensor, v: Tensor, *, softcap: float = 0.0, lse: bool = False) -> str:
        """Why the backend cannot attend over these tensors here; "" where it can. Their values do not matter.

        ``softcap`` and ``lse`` are what is asked for beside the output.
        """
        if q.device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {q.device.type}"
        if softcap and not self.softcap:
            return "has no soft-capped logits"
        if lse and not self.lse:
            return "gives no log-sum-exp, which learned sinks take"
        if q.shape[2] != k.shape[2] and not self.chunks:
            return f"takes as many queries as keys, not {q.shape[2]} and {k.shape[2]}"
        return self.missing() or self.refuses(pattern, q, k, v)


class Computed(NamedTuple):
    """What a pattern computes on some tensors, summed over batch and heads."""

    pairs: int
    """(query, key) pairs. One of which only the first of the two products is computed counts half."""
    tiles: int = 0
    """Of a pattern that skips tiles while it computes: how many tiles there are."""
    skipped: int = 0
    """How many of them it skips."""


class Pattern(Declared):
    """Which (query, key) pairs one layer computes. Subclasses are frozen dataclasses of the paper's parameters.

    Those that a method has are declared in them by ``tmbench_kernels.parameter``.
    """

    name: ClassVar[str]
    dynamic: ClassVar[bool] = False
    """Whether the pairs depend on the data; if not, ``pairs`` reads shapes only and takes tensors of the meta device."""
    untimed: ClassVar[str] = ""
    """Why its time says nothing of any method; "" for all that may be timed."""
    last_row_queries: ClassVar[int | None] = None
    """How many of the last queries choose a dynamic pattern's keys for the very last one, beside the others of its block of
    128; None where all queries may."""
    backends: ClassVar[tuple[Backend, ...]]
    """In order of preference; the first that is installed and serves the tensors is used."""

    @abc.abstractmethod
    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """The definition: which pairs are computed, bool ``[batch or 1, heads or 1, queries, keys]``. Quadratic."""

    @abc.abstractmethod
    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """How many (query, key) pairs the pattern computes on these tensors, summed over batch and heads."""

    def computed(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Computed:
        """The pairs, and of a pattern that skips tiles how many."""
        return Computed(self.pairs(q, k, scale=scale))

    def per_layer(self, layers: int, heads: int) -> Sequence[Pattern]:
        """The pattern itself, for every layer."""
        return [self] * layers

    def of_heads(self, heads: range) -> Pattern:
        """The same for some of the query heads, as a rank has them of a model that is split: itself where all are alike."""
        return self

    def of_chunk(self, end: int, length: int) -> Pattern:
        """The same for a chunk that ends before position ``end`` of a prompt known to be ``length`` tokens long.

        Itself where nothing is computed for the last of a prompt's queries alone, or only the chunk's own can be.
        """
        return self

    @property
    def candidates(self) -> tuple[Backend, ...]:
        """The backends to choose from, in order of preference."""
        return self.backends

    def backend(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float = 0.0, lse: bool = False) -> Backend:
        """The backend that serves these tensors; raises ValueError with the reasons where there is none.

        ``softcap`` is that of the logits; ``lse`` says whether the log-sum-exp is needed, as it is for learned sinks.
        """
        for backend in self.candidates:
            if not backend.obstacle(self, q, k, v, softcap=softcap, lse=lse):
                return backend
        reasons = "; ".join(
            f"{backend.name} {backend.obstacle(self, q, k, v, softcap=softcap, lse=lse)}" for backend in self.candidates
        )
        raise ValueError(f"no backend of the pattern {self.name} serves these tensors: {reasons}")

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
        """Causal attention over the pattern's pairs: ``[batch, heads, queries, v_dim]``, in q's type.

        Args:
            q, k, v: one prefill, or a chunk of one.
            scale: multiplies the logits; None means ``head_dim ** -0.5``.
            softcap: caps them to ``softcap * tanh(logit / softcap)``; 0 leaves them as they are.
            sinks: learned sinks ``[heads]``, one more logit in the denominator of each head's softmax, as gpt-oss has them.

        A dynamic pattern selects by logits without cap and sinks, as the published rules do: a cap keeps the order of a
        query's keys, and a sink takes the same part of all of them.

        Raises ValueError for shapes that do not fit, and where no backend serves them.
        """
        check_shapes(q, k, v)
        check_logits(q, softcap, sinks)
        if sinks is None:
            return self.compute(q, k, v, default_scale(q, scale), softcap=softcap)
        lse = new_lse(q)
        return add_sinks(self.compute(q, k, v, default_scale(q, scale), softcap=softcap, lse=lse), lse, sinks)

    def attend_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """``attend`` and the log-sum-exp of each query's logits over its keys, as ``new_lse`` has it; raises as it does."""
        check_shapes(q, k, v)
        check_logits(q, softcap, None)
        lse = new_lse(q)
        return self.compute(q, k, v, default_scale(q, scale), softcap=softcap, lse=lse), lse

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
        """The last query's output alone, ``[batch, heads, 1, v_dim]``: all that the last layer of a prefill must yield.

        A dynamic pattern reads the queries that choose (``last_row_queries``), and computes all of their rows unless it
        knows better. A static one reads no other query than the last: the rest of q may hold anything. Arguments and errors
        as ``attend`` has them.
        """
        check_shapes(q, k, v)
        check_logits(q, softcap, sinks)
        if sinks is None:
            return self.compute_last_row(q, k, v, default_scale(q, scale), softcap=softcap)
        lse = new_lse(q[:, :, -1:])
        return add_sinks(self.compute_last_row(q, k, v, default_scale(q, scale), softcap=softcap, lse=lse), lse, sinks)

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, softcap: float = 0.0, lse: Tensor | None = None
    ) -> Tensor:
        """``attend`` without sinks, by the backend that serves, which also fills ``lse`` where it is given."""
        backend = self.backend(q, k, v, softcap=softcap, lse=lse is not None)
        return backend.attend(self, q, k, v, scale, **asked_of(softcap, lse))

    def compute_last_row(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, softcap: float = 0.0, lse: Tensor | None = None
    ) -> Tensor:
        """``last_row`` without sinks; fills ``lse`` ``[batch, heads, 1]`` where it is given."""
        if self.last_row_queries is not None:
            # A chunk of the prompt from the edge of a block on: there the pattern gives the same as in one piece.
            length = k.shape[2]
            first = (length - self.last_row_queries) // _EDGE * _EDGE
            q = q[:, :, max(first - (length - q.shape[2]), 0) :]
        whole = None if lse is None else new_lse(q)
        out = self.compute(q, k, v, scale, softcap=softcap, lse=whole)
        if lse is not None and whole is not None:
            lse.copy_(whole[:, :, -1:])
        return out[:, :, -1:]


def asked_of(softcap: float, lse: Tensor | None) -> dict[str, Any]:
    """What a backend is given beside tensors and scale: only what is asked for, so that one without them takes neither."""
    asked: dict[str, Any] = {}
    if softcap:
        asked["softcap"] = softcap
    if lse is not None:
        asked["lse"] = lse
    return asked


def new_lse(q: Tensor) -> Tensor:
    """Room for the log-sum-exp of the queries' logits, to base e: ``[batch, heads, queries]``, contiguous.

    In float32, or in float64 for float64 tensors. Backends put -inf for a query without a key.
    """
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """An output ``[batch, heads, queries, v_dim]`` as one more logit for each head makes it; overwrites both tensors.

    The logit has no value of its own: it only adds to the denominator, of which the keys' part is
    ``exp(lse) / (exp(lse) + exp(sink))``, the sigmoid of the difference.
    """
    part = lse.sub_(sinks.to(lse)[:, None]).sigmoid_()
    # Where a query without a key meets a sink of -inf the part is not a number; its output is zero in any case.
    return out.mul_(part.nan_to_num_(nan=0.0)[..., None])


def check_logits(q: Tensor, softcap: float, sinks: Tensor | None) -> None:
    """Raise ValueError for a cap below zero, or sinks that are not one number for each query head."""
    if not softcap >= 0:
        raise ValueError(f"softcap must be 0, which caps nothing, or more, not {softcap}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not sinks.is_floating_point()):
        raise ValueError(f"sinks must be one number for each of {q.shape[1]} query heads, not {tuple(sinks.shape)}")


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised ``[batch, heads, queries, v_dim]``, in memory ``[batch, queries, heads, v_dim]`` as models want it."""
    batch, heads, queries = q.shape[:3]
    return q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)


def default_scale(q: Tensor, scale: float | None) -> float:
    """``scale``, or the usual ``head_dim ** -0.5``."""
    return float(q.shape[-1]) ** -0.5 if scale is None else scale


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v are a prefill or a chunk of one: grouped heads, one type and device."""
    if q.dim() != 4 or k.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q, k, v must be [batch, heads, length, head_dim], not {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head_dim")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries cannot be the last of {k.shape[2]} keys")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if q.dtype != k.dtype or q.dtype != v.dtype or q.device != k.device or q.device != v.device:
        raise ValueError("q, k and v must have one type and live on one device")
