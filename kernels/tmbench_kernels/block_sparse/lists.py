"""Which key blocks each block of queries attends to: what a selection hands to the kernel that attends.

Queries and keys are cut into blocks of the same size, from position 0 of the prompt on; the last block of a prompt may be
shorter, and so may the first block of a chunk's queries. A pattern *selects* block lists from q and k; a backend attends
over them and knows nothing of how they came about.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tmbench_kernels.cuda import runs_triton
from tmbench_kernels.reference import causal_mask

BLOCK = 128
"""Tokens in a block, unless a pattern has blocks of its own."""


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For every block of queries of every query head, the key blocks that it attends to.

    The first ``counts`` entries of a list are block numbers, ascending, each once, none after the query block's own. What
    follows them is not part of the list; lists made by ``from_map`` go on with the other blocks, descending, so that every
    entry is a valid block number. Within the own block a query sees the keys up to itself. A list may be empty or lack the
    own block: a query without any key gets zeros. Raises ValueError for tensors that cannot be such lists; their values are
    trusted, since reading them would wait for the GPU.
    """

    counts: Tensor
    """int32 ``[batch, heads, q_blocks]``, contiguous."""
    indices: Tensor
    """int32 ``[batch, heads, q_blocks, k_blocks]``, contiguous."""
    length: int
    """Keys: the tokens of the prompt up to here."""
    block: int = BLOCK
    """Tokens of a block, of queries and of keys."""
    start: int = 0
    """The position of the first query; the first block of queries is the one that holds it."""

    def __post_init__(self) -> None:
        blocks = block_count(self.length, self.block)
        rows = blocks - self.first_block
        if self.counts.dtype != torch.int32 or self.indices.dtype != torch.int32:
            raise ValueError(f"counts and indices must be int32, not {self.counts.dtype} and {self.indices.dtype}")
        if self.counts.dim() != 3 or self.indices.shape != (*self.counts.shape, blocks) or self.counts.shape[2] != rows:
            shapes = f"{tuple(self.counts.shape)} and {tuple(self.indices.shape)}"
            from_ = f", {rows} of them from token {self.start} on" * bool(self.start)
            raise ValueError(
                f"{self.length} tokens are {blocks} blocks of {self.block}{from_}; counts and indices are {shapes}"
            )

    @classmethod
    def from_map(cls, block_map: Tensor, length: int, block: int = BLOCK, start: int = 0) -> BlockLists:
        """The lists of a bool map ``[batch, heads, q_blocks, k_blocks]``; blocks after the query block's own are dropped.

        Nothing is sorted, and nothing is read back to the host.
        """
        if runs_triton(block_map.device):
            # Imported when it is first used: it takes Triton.
            from tmbench_kernels.block_sparse.triton_lists import list_blocks

            return cls(*list_blocks(block_map), length, block, start)
        return cls(*_list_blocks(block_map), length, block, start)

    def last_row(self) -> BlockLists:
        """The last list, for the last query alone."""
        counts, indices = (x[:, :, -1:].contiguous() for x in (self.counts, self.indices))
        return BlockLists(counts, indices, self.length, self.block, self.length - 1)

    @property
    def first_block(self) -> int:
        """The number of the first block of queries."""
        return self.start // self.block

    def to_map(self) -> Tensor:
        """The lists as a bool map ``[batch, heads, q_blocks, k_blocks]``."""
        blocks = self.indices.shape[3]
        listed = torch.arange(blocks, device=self.counts.device) < self.counts[..., None]
        # Entries beyond a list may name any block: they are sent to a column that is cut off.
        places = torch.where(listed, self.indices, blocks).long()
        block_map = torch.zeros(*self.counts.shape, blocks + 1, dtype=torch.bool, device=self.counts.device)
        return block_map.scatter_(3, places, True)[..., :blocks]

    def own_listed(self) -> Tensor:
        """Whether a query block's own keys are in its list, bool ``[batch, heads, q_blocks]``; if so they are the last."""
        last = self.indices.gather(3, (self.counts[..., None] - 1).clamp_(min=0).long()).squeeze(3)
        own = torch.arange(self.first_block, self.indices.shape[3], device=self.counts.device)
        return (last == own) & (self.counts > 0)

    def mask(self) -> Tensor:
        """Which pairs the lists stand for, bool ``[batch, heads, queries, keys]``. Quadratic."""
        return token_mask(self.to_map(), self.length, self.block, self.start)

    def pairs(self) -> int:
        """How many (query, key) pairs the lists stand for, over batch and heads; reads the counts back to the host."""
        edges = self.block * torch.arange(self.first_block, self.indices.shape[3] + 1, device=self.counts.device)
        # Where a block's queries begin and end, counted from the block's first token.
        low, high = (self.start - edges[:-1]).clamp(min=0), edges[1:].clamp(max=self.length) - edges[:-1]
        own = self.own_listed().long()
        whole = (self.counts.long() - own) * self.block
        return int(((high - low) * whole + own * ((high * (high + 1) - low * (low + 1)) // 2)).sum())


def _list_blocks(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices of a bool map: each block is sent to its place, which is known from running counts."""
    blocks = block_map.shape[3]
    block_map = block_map & causal_mask(blocks, block_map.device, queries=block_map.shape[2])
    ranks = block_map.cumsum(3, dtype=torch.int32)
    numbers = torch.arange(blocks, dtype=torch.int32, device=block_map.device)
    # Block n is the ranks[n]-th of the list, or the (n + 1 - ranks[n])-th from the end.
    places = torch.where(block_map, ranks - 1, (blocks - 1 - numbers) + ranks).long()
    indices = torch.empty_like(ranks).scatter_(3, places, numbers.expand_as(ranks))
    return ranks[..., -1].contiguous(), indices


def block_count(length: int, block: int = BLOCK) -> int:
    """How many blocks a prompt has, the last of which may be shorter."""
    return -(-length // block)


def split_blocks(x: Tensor, block: int = BLOCK, start: int = 0) -> list[Tensor]:
    """The tokens of ``x``, its first dimension, block by block, where the first of them is position ``start``."""
    head = -start % block
    return [part for part in (x[:head], *torch.split(x[head:], block)) if len(part)]


def token_mask(block_map: Tensor, length: int, block: int = BLOCK, start: int = 0) -> Tensor:
    """The pairs of a bool block map: key j <= query i where the map has j's block for i's. ``[..., queries, keys]``."""
    keys = torch.arange(length, device=block_map.device) // block
    rows = keys[start:] - start // block
    return block_map[..., rows[:, None], keys] & causal_mask(length, block_map.device, queries=length - start)
