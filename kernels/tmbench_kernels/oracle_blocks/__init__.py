"""An oracle of key blocks: for each query block those that truly hold most of its attention, found by computing all of it.

It tells a budget that cannot do from a selection that chooses badly: whatever picks whole key blocks for a query block
picks none that hold more. The idea is that of Wang et al. 2026, arXiv 2606.07703, who choose single tokens, averaged over
heads. Here it is blocks of 128, and every head for itself, as the methods choose that it is held against. It computes dense
attention's logits first, so its time says nothing of any method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tmbench_kernels.block_sparse import BlockSparse
from tmbench_kernels.block_sparse.lists import BLOCK, block_count, split_blocks
from tmbench_kernels.flash_prefill import FlashPrefill
from tmbench_kernels.flex_prefill import FlexPrefill
from tmbench_kernels.parameters import Parameter, ParameterError, declared, parameter
from tmbench_kernels.reference import causal_mask, masked_logits
from tmbench_kernels.scores import heaviest_reaching, largest, products, tiles
from tmbench_kernels.xattention import XAttention

_SMALLER = {"cpu": 256}
"""How much smaller a tile of logits is than others: several are alive at once, and on a CPU they are to fit the caches."""
_SHARE = Parameter(default=0.95, help="", above=0, at_most=1)
_KINDS: dict[str, type[BlockSparse]] = {kind.name.replace("_", ""): kind for kind in (FlashPrefill, FlexPrefill, XAttention)}


@dataclass(frozen=True)
class Like:
    """A pattern of blocks of 128 whose density is taken; as a text its name and parameters, ``flashprefill:alpha=0.1``."""

    pattern: BlockSparse

    @classmethod
    def read(cls, given: Any) -> Like:
        """Of a text, whose parameters follow the name, each after a colon; raises ParameterError for what names no such."""
        if isinstance(given, Like):
            return given
        name, *rest = str(given).split(":")
        kind = _KINDS.get(name.replace("_", "").replace("-", ""))
        if kind is None:
            raise ParameterError("like", f" {name} is unknown: choose from {', '.join(_KINDS)}")
        known, values = declared(kind), {}
        for part in rest:
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in known:
                raise ParameterError("like", f": {name} has no parameter {key!r}: it has {', '.join(known)}")
            if key in values:
                raise ParameterError("like", f": {name}'s {key} is given twice: leave one of them out")
            try:
                values[key] = known[key].value(key, value)
            except ParameterError as error:
                raise ParameterError("like", f": {name}'s {error}") from error
        return cls(kind(**values))

    def __str__(self) -> str:
        values = [f"{name}={getattr(self.pattern, name)}" for name in declared(type(self.pattern))]
        return ":".join([self.pattern.name.replace("_", ""), *values])


_LIKE = Parameter(
    default=None, help=f"Whose density to take instead: {', '.join(_KINDS)}.", read=Like.read, shown_default="none"
)


@dataclass(frozen=True)
class OracleBlocks(BlockSparse):
    """The fewest key blocks that hold the share ``p`` of a query block's attention, or as many as another pattern takes.

    The attention of a block is that of all its queries together, exact, and summed over each block's keys. A block is
    taken while those before it fall short; ties go to the earlier block, and nothing is forced. ``like`` gives every query
    block as many key blocks as that pattern gives it, the query block's own among them where it is there: then both compute
    the same number of pairs. Raises ValueError for both of them, and for a share out of range; with neither ``p`` is 0.95.
    """

    p: float | None = parameter(
        None,
        help="The share of its attention that a query block's key blocks hold.",
        read=lambda given: _SHARE.value("p", given),
        shown_default="0.95 without like",
    )
    like: Like | None = _LIKE.field()  # noqa: RUF009 - frozen, and its default is None

    name: ClassVar[str] = "oracle_blocks"
    untimed: ClassVar[str] = "it computes dense attention to choose its keys"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p is not None and self.like is not None:
            raise ParameterError("p", " and like both say how many blocks to take: give one of them")
        if self.like is None:
            object.__setattr__(self, "p", _SHARE.default if self.p is None else self.p)
            _SHARE.check("p", self.p)

    def of_chunk(self, end: int, length: int) -> OracleBlocks:
        """With the density that the other pattern has for such a chunk."""
        if self.like is None:
            return self
        other = self.like.pattern.of_chunk(end, length)
        assert isinstance(other, BlockSparse)
        return replace(self, like=Like(other))

    def rule(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        start = len(k) - len(q)
        first = start // BLOCK
        mask = causal_mask(len(k), q.device, queries=len(q))
        shares = masked_logits(q[None, None], k[None, None], mask, scale=scale)[0, 0].softmax(1)
        by_key_block = torch.stack([part.sum(0) for part in split_blocks(shares.T)])
        mass = torch.stack([part.sum(0) for part in split_blocks(by_key_block.T, start=start)])
        other = None if self.like is None else self.like.pattern.rule(q, k, scale)
        kept = torch.zeros_like(mass, dtype=torch.bool)
        for row, held in enumerate(mass):
            own = first + row
            order = held[: own + 1].argsort(descending=True, stable=True).tolist()
            if other is not None:
                past = [block for block in order if block != own]
                kept[row, past[: int(other[row, :own].sum())]] = True
                kept[row, own] = other[row, own]
                continue
            assert self.p is not None
            need, taken = self.p * float(held[order].sum()), 0.0
            for block in order:
                if taken >= need:
                    break
                kept[row, block] = True
                taken += float(held[block])
        return kept

    def block_map(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        batch, heads, length = *q.shape[:2], k.shape[2]
        start, blocks = length - q.shape[2], block_count(length)
        first, smaller = start // BLOCK, _SMALLER.get(q.device.type, 4)
        causal = causal_mask(blocks, q.device, queries=blocks - first)
        other = None if self.like is None else self.like.pattern.block_map(q, k, scale) & causal
        kept = torch.zeros(batch, heads, blocks - first, blocks, dtype=torch.bool, device=q.device)
        for some, kv, part in tiles(heads, k.shape[1], blocks - first, smaller * batch * BLOCK * length):
            rows = range(first + part.start, first + part.stop)
            low, high = max(rows.start * BLOCK, start), min(rows.stop * BLOCK, length)
            mass = _mass(q[:, some, low - start : high - start], k[:, kv, :high], scale)
            here = slice(part.start, part.stop), slice(rows.stop)
            kept[:, some, *here] = self._cover(mass) if other is None else _as_many(mass, other[:, some, *here], rows)
        return kept

    def _cover(self, mass: Tensor) -> Tensor:
        """The heaviest blocks of each row that hold the share."""
        assert self.p is not None
        # Shares: the queries of a block add up to 1 each.
        return heaviest_reaching(mass / BLOCK, self.p)


def _mass(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What the queries of each block give to each key block, float32 ``[batch, heads, q_blocks, k_blocks]``.

    The last query is that of the last key; the first block of queries and the last of keys may be cut.
    """
    queries, keys = q.shape[2], k.shape[2]
    start, whole = keys - queries, keys // BLOCK * BLOCK
    shares = products(q, k).mul_(scale)
    later = torch.ones(queries, queries, dtype=torch.bool, device=q.device).triu_(1)
    shares[..., start:].masked_fill_(later, -torch.inf)
    shares = shares.softmax(3)
    mass = torch.unflatten(shares[..., :whole], 3, (-1, BLOCK)).sum(4) if whole else shares[..., :0]
    if whole < keys:
        mass = torch.cat([mass, shares[..., whole:].sum(3, keepdim=True)], dim=3)
    mass = F.pad(mass, (0, 0, start % BLOCK, -keys % BLOCK))
    return torch.unflatten(mass, 2, (-1, BLOCK)).sum(3)


def _as_many(mass: Tensor, other: Tensor, rows: range) -> Tensor:
    """As many of the heaviest blocks as ``other`` has, the own block where it has that; rows are query blocks ``rows``."""
    row = torch.arange(rows.start, rows.stop, device=mass.device)[:, None]
    column = torch.arange(mass.shape[3], device=mass.device)
    past = mass.masked_fill(column >= row, -torch.inf)
    return largest(past, (other & (column < row)).sum(3)) | (other & (column == row))
