"""MInference's layers whose heads differ in kind: vertical-slash, streaming and block-sparse heads side by side.

Jiang et al. 2024, arXiv 2407.02490, section 3.2. What each kind computes is defined where it is a pattern of its own:
``VerticalSlash``, ``Triangle.streaming`` and ``BlockTopK``. The rule is that of the released code at run time: a streaming
head sees the first ``vertical`` keys and the last ``slash``, its own among them, and no query sees more than that; a
block-sparse head takes 100 blocks, whatever its budget says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tmbench_kernels.block_topk import BlockTopK
from tmbench_kernels.minference.head_patterns import HeadPattern, HeadPatterns, load_head_patterns
from tmbench_kernels.parameters import Declared
from tmbench_kernels.pattern import Backend, Pattern, empty_output, new_lse
from tmbench_kernels.shared import PATTERNS
from tmbench_kernels.triangle import Triangle
from tmbench_kernels.vertical_slash import INDEX_BACKENDS, VerticalSlash

if TYPE_CHECKING:
    from tmbench_kernels.vertical_slash.triton_index import Index


@dataclass(frozen=True)
class _Part:
    """Heads of one kind that one call can serve: of every key head in it, as many query heads as of the others."""

    pattern: Pattern
    queries: list[int]
    keys: list[int]


def _attend_parts(
    pattern: MInferenceHeads,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    out = empty_output(q, v)
    for part in pattern.parts(q, k):
        queries = q[:, part.queries]
        sums = None if lse is None else new_lse(queries)
        out[:, part.queries] = part.pattern.compute(
            queries, k[:, part.keys], v[:, part.keys], scale, softcap=softcap, lse=sums
        )
        if lse is not None and sums is not None:
            lse[:, part.queries] = sums
    return out


@dataclass(frozen=True)
class MInferenceHeads(Pattern):
    """``heads`` says for each query head what kind it is, and its budget.

    On a GPU one launch serves all heads. In torch it is one call for each kind, and where a kind has more of one key head's
    query heads than of another's, one for each such number; k and v are copied for the key heads of a call, never repeated
    for their query heads. Raises ValueError for no heads, and, where tensors come in, for a number of heads that is not q's.
    """

    heads: tuple[HeadPattern, ...]

    name: ClassVar[str] = "minference_heads"
    dynamic: ClassVar[bool] = True
    last_row_queries: ClassVar[int | None] = VerticalSlash.last_row_queries
    backends: ClassVar[tuple[Backend, ...]] = (
        *INDEX_BACKENDS,
        Backend("torch-by-kind", ("cpu", "cuda"), _attend_parts, softcap=True, lse=True, chunks=True),
    )

    def __post_init__(self) -> None:
        if not self.heads:
            raise ValueError("heads must hold at least one head")

    def of_heads(self, heads: range) -> Pattern:
        """The entries of these heads."""
        return MInferenceHeads(tuple(self.heads[head] for head in heads))

    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """Bool ``[batch, heads, queries, keys]``: each head by the definition of its kind."""
        mask = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
        for part in self.parts(q, k):
            mask[:, part.queries] = part.pattern.mask(q[:, part.queries], k[:, part.keys], scale=scale)
        return mask

    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """Counted kind by kind, at the cost of their selections."""
        parts = self.parts(q, k)
        return sum(part.pattern.pairs(q[:, part.queries], k[:, part.keys], scale=scale) for part in parts)

    def parts(self, q: Tensor, k: Tensor) -> list[_Part]:
        """The heads kind by kind, in calls that can serve them."""
        self._check_heads(q)
        return _parts(self.heads, k.shape[1])

    def index(self, q: Tensor, k: Tensor, scale: float) -> Index:
        """What every block of 64 queries attends to, whatever the kinds of the heads, as the vertical-slash kernels take it.

        A streaming head has its first keys as columns and its window as distances, and of its runs it sees what the window
        reaches; the runs of a block-sparse head are its blocks. Nothing is read back to the host. A selection is made for
        all heads, and kept for those of its kind.
        """
        from tmbench_kernels.vertical_slash.triton_index import build_index

        self._check_heads(q)
        heads, length = self.heads, k.shape[2]
        kinds, budgets = {head.type for head in heads}, _budgets(heads, q.device)
        numbers = torch.arange(length, device=q.device)
        columns = (numbers < (budgets.vertical * budgets.streams)[:, None]).expand(len(q), -1, -1)
        # The kernels count on distance 0. Where a window is empty, its reach hides the key again.
        distances = (numbers < (budgets.slash * budgets.streams).clamp(min=1)[:, None]).expand(len(q), -1, -1)
        slashes = VerticalSlash(tuple((h.vertical, h.slash) if h.type == "vertical_and_slash" else (0, 0) for h in heads))
        if "vertical_and_slash" in kinds:
            chosen = slashes.select(q, k, scale=scale)
            columns = torch.where(budgets.slashes[:, None], chosen.columns, columns)
            distances = torch.where(budgets.slashes[:, None], chosen.distances, distances)
        most_columns, most_distances = slashes.counts(len(heads), length)
        streams = [head for head in heads if head.type == "stream_llm"]
        blocks = BlockTopK()
        index = build_index(
            columns,
            distances,
            max(most_columns + tuple(head.vertical for head in streams)),
            max(most_distances + tuple(head.slash for head in streams) + (blocks.blocks,) * ("block_sparse" in kinds)),
            length - q.shape[2],
        )
        if "block_sparse" in kinds:
            lists = blocks.select(q, k, scale=scale)
            most = min(index.starts.shape[3], lists.indices.shape[3])
            starts = lists.indices[..., :most].index_select(1, budgets.blocks) * blocks.block
            index.starts[..., :most].index_copy_(1, budgets.blocks, starts)
            index.counts.index_copy_(1, budgets.blocks, lists.counts.index_select(1, budgets.blocks))
        if streams:
            reach = torch.where(budgets.streams, budgets.slash, index.reach)
            index = replace(index, reach=reach, sinks=budgets.vertical * budgets.streams)
        return index

    def _check_heads(self, q: Tensor) -> None:
        if len(self.heads) != q.shape[1]:
            raise ValueError(
                f"the pattern is for {len(self.heads)} head{'s' * (len(self.heads) != 1)}, but q has {q.shape[1]}"
            )


@dataclass(frozen=True)
class MInference(Declared):
    """MInference on a whole model: for each head the pattern that ``patterns`` gives it, or vertical-slash for all heads."""

    patterns: HeadPatterns | None = PATTERNS.field()  # noqa: RUF009 - frozen, and its default is None

    def per_layer(self, layers: int, heads: int) -> Sequence[Pattern]:
        """One pattern for each layer; raises ValueError where the file is for a model of another size."""
        if self.patterns is None:
            return [VerticalSlash()] * layers
        return [layer_pattern(entries) for entries in self.patterns.fitted(layers=layers, heads=heads)]


def load_patterns(path: str | Path, *, layers: int, heads: int) -> list[Pattern]:
    """One pattern per layer from a file in MInference's format; raises as ``load_head_patterns`` does.

    A layer of vertical-slash heads alone is ``VerticalSlash``, which needs no division into kinds.
    """
    return [layer_pattern(entries) for entries in load_head_patterns(path, layers=layers, heads=heads)]


def layer_pattern(heads: Sequence[HeadPattern]) -> Pattern:
    """The pattern of one layer, from the entries of its query heads."""
    if all(head.type == "vertical_and_slash" for head in heads):
        return VerticalSlash(tuple((head.vertical, head.slash) for head in heads))
    return MInferenceHeads(tuple(heads))


@dataclass(frozen=True, eq=False)
class _Budgets:
    """What kind each head is and its budget, on a device."""

    vertical: Tensor
    """int32 ``[heads]``."""
    slash: Tensor
    """int32 ``[heads]``."""
    slashes: Tensor
    """Vertical-slash heads, bool ``[heads]``."""
    streams: Tensor
    """Streaming heads, bool ``[heads]``."""
    blocks: Tensor
    """The numbers of the block-sparse heads, int64."""


@lru_cache(maxsize=256)
def _budgets(heads: tuple[HeadPattern, ...], device: torch.device) -> _Budgets:
    """Kept on the device: to send them there again would wait for all that it has to do."""
    return _Budgets(
        vertical=torch.tensor([head.vertical for head in heads], dtype=torch.int32, device=device),
        slash=torch.tensor([head.slash for head in heads], dtype=torch.int32, device=device),
        slashes=torch.tensor([head.type == "vertical_and_slash" for head in heads], device=device),
        streams=torch.tensor([head.type == "stream_llm" for head in heads], device=device),
        blocks=torch.tensor([n for n, head in enumerate(heads) if head.type == "block_sparse"], device=device).long(),
    )


@lru_cache(maxsize=256)
def _parts(heads: tuple[HeadPattern, ...], kv_heads: int) -> list[_Part]:
    """Divide the query heads by kind, and each kind by how many of a key head's query heads it has."""
    groups = len(heads) // kv_heads
    # Only vertical-slash heads of different budgets can share a call; all block-sparse heads are alike.
    kinds: dict[HeadPattern | str, list[int]] = {}
    for number, head in enumerate(heads):
        kind = HeadPattern(head.type, head.vertical, head.slash) if head.type == "stream_llm" else head.type
        kinds.setdefault(kind, []).append(number)
    parts = []
    for kind, numbers in kinds.items():
        members: dict[int, list[int]] = {}
        for number in numbers:
            members.setdefault(number // groups, []).append(number)
        for count in sorted({len(own) for own in members.values()}):
            keys = [key for key, own in members.items() if len(own) == count]
            queries = [number for key in keys for number in members[key]]
            parts.append(_Part(_pattern_of(kind, [heads[number] for number in queries]), queries, keys))
    return parts


def _pattern_of(kind: HeadPattern | str, heads: Sequence[HeadPattern]) -> Pattern:
    if isinstance(kind, HeadPattern):
        return Triangle.streaming(kind.vertical, kind.slash)
    if kind == "block_sparse":
        return BlockTopK()
    return VerticalSlash(tuple((head.vertical, head.slash) for head in heads))
