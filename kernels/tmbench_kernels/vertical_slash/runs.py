"""Which keys a vertical-slash selection shows to each block of 64 queries: runs of keys, and the columns between them.

A selection is two sets, columns and distances, bool ``[batch, heads, keys]``; distance 0 is always in it. A run is walked in
steps of 64 keys, from its largest distance on. Where such a walk stops is worked out for all distances at once, so that a
block takes one step for each run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Queries that share their keys, and keys that a distance widens to."""
COUNTED = 512
"""Blocks of queries whose pairs are counted at a time, for all heads."""


def largest_below(distances: Tensor) -> Tensor:
    """For n in 0..length the largest selected distance below n, or -1: int64 ``[batch, heads, length + 1]``."""
    positions = torch.arange(distances.shape[2], device=distances.device)
    return F.pad(torch.where(distances, positions, -1).cummax(2).values, (1, 0), value=-1)


def gaps(below: Tensor) -> Tensor:
    """Where a run stops, bool ``[batch, heads, length + 1]``: the distances before which 64 or more are not selected."""
    numbers = torch.arange(below.shape[2], device=below.device)
    return (numbers - below > BLOCK) & (numbers > 0)


def runs(distances: Tensor, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first run of every query block first..last-1, then the second, and so on: where it starts, and where it ends.

    int64 ``[batch, heads, blocks]``, ascending and never adjacent. None ends after its block; a block without a further run
    has an empty one.
    """
    below = largest_below(distances)
    length = below.shape[2] - 1
    numbers = torch.arange(length + 1, device=below.device)
    stops = torch.where(gaps(below), numbers, 0)
    # A walk keeps its remainder: within one it stops at the largest stop so far.
    stops = torch.unflatten(F.pad(stops, (0, -(length + 1) % BLOCK)), 2, (-1, BLOCK)).cummax(2).values.flatten(2)
    ends = BLOCK * torch.arange(first + 1, last + 1, device=below.device)
    inside = ends.clamp(max=length).expand(*below.shape[:2], -1)
    # As distances of the block's end: where a run starts, less the 64 keys of its first distance, and where it stops.
    high = below.gather(2, inside).minimum(ends - BLOCK)
    while True:
        low = stops.gather(2, high.clamp(min=0))
        yield ends - high - BLOCK, ends - low
        if not bool(low.any()):
            return
        # Past its last run a block goes on at distance -64, where a run is empty.
        high = torch.where(low > 0, below.gather(2, low), -BLOCK)


def visible_keys(columns: Tensor, distances: Tensor, first: int, last: int) -> Tensor:
    """Which keys the query blocks first..last-1 see, bool ``[batch, heads, blocks, keys]``, keys up to the last block's end.

    Keys after a block's end are excluded, keys inside the block are not yet compared with its queries: all are visible.
    """
    keys = min(last * BLOCK, columns.shape[2])
    edges = torch.zeros(*columns.shape[:2], last - first, keys + 1, dtype=torch.int8, device=columns.device)
    one = edges.new_ones(edges.shape[:3])[..., None]
    for low, high in runs(distances, first, last):
        edges.scatter_add_(3, low.clamp_(max=keys)[..., None], one)
        edges.scatter_add_(3, high.clamp_(max=keys)[..., None], -one)
    ends = BLOCK * torch.arange(first + 1, last + 1, device=columns.device)
    # Runs lie apart: their sum is 0 or 1, as the bytes of a bool are.
    seen = edges[..., :keys].cumsum(3, dtype=torch.int8).view(torch.bool)
    seen |= columns[:, :, None, :keys]
    seen &= torch.arange(keys, device=columns.device) < ends[:, None]
    return seen


def count_pairs(columns: Tensor, distances: Tensor, start: int = 0) -> int:
    """How many (query, key) pairs the selection stands for, over batch and heads, for the queries from ``start`` on.

    Memory is linear in length: which keys are seen is never written down. A query block sees all columns before its end, and
    of each of its runs those keys that are no columns.
    """
    batch, heads, length = columns.shape
    taken = F.pad(columns.cumsum(2), (1, 0))
    total = 0
    for blocks in parts(range(start // BLOCK, -(-length // BLOCK)), COUNTED):
        ends = (BLOCK * torch.arange(blocks.start + 1, blocks.stop + 1, device=columns.device)).clamp_(max=length)
        seen = taken[..., ends]
        for low, high in runs(distances, blocks.start, blocks.stop):
            low, high = low.clamp_(max=length), high.clamp_(max=length)
            seen += high - low - taken.gather(2, high) + taken.gather(2, low)
        for block, keys in zip(blocks, seen.sum((0, 1)).tolist(), strict=True):
            rows = min(BLOCK, length - block * BLOCK) - max(start - block * BLOCK, 0)
            # Of the visible keys the block's own are seen by its later queries only.
            total += rows * keys - batch * heads * rows * (rows - 1) // 2
    return total


def parts(blocks: range, size: int) -> Iterator[range]:
    """Blocks in parts of at most so many."""
    for first in blocks[::size]:
        yield range(first, min(first + size, blocks.stop))
