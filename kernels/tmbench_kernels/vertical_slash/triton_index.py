"""What every block of queries attends to under a vertical-slash selection, worked out in Triton without a word to the host.

The walk of a block of queries from run to run depends on little else than where it stands, told as the distance from the
block's end: from there the block's number does not matter. So walks that once meet stay together, and most blocks meet the
last block's walk within a few steps. That one is worked out first, by parts of the distances: ``_leave`` finds for every
distance where a walk that comes to it leaves the part, ``_path`` goes from part to part and then through all parts side by
side. ``_blocks`` lets every block walk until it meets that walk, and copies the rest of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tmbench_kernels.vertical_slash.runs import BLOCK

ALL = 2**30
"""A reach beyond any prompt."""
WIDE = 4096
"""Entries of a set that are counted and put in order by one program."""
PART = 1024
"""Distances in a part, a multiple of ``BLOCK``."""
LANES = 128
"""Parts that are gone through side by side, and columns or pieces that a block looks at at once."""


@dataclass(frozen=True, eq=False)
class Index:
    """What every block of 64 queries of every head attends to. ``rows`` is the number of blocks, ``heads`` that of q."""

    starts: Tensor
    """int32 ``[batch, heads, rows, most]``: where the 64-key pieces of the runs start, ascending; ``counts`` of them."""
    counts: Tensor
    """int32 ``[batch, heads, rows]``."""
    columns: Tensor
    """int32 ``[batch, heads, width]``: the selected columns, ascending, then ``length``; width is a multiple of 64."""
    kept: Tensor
    """uint8 ``[batch, heads, rows, width]``: 1 for the columns that lie in none of a block's runs, nor after the block."""
    before: Tensor
    """int32 ``[batch, heads, rows]``: how many columns lie before the block's end."""
    reach: Tensor
    """int32 ``[heads]``: of its runs a query sees the keys that lie less than so many before it,"""
    sinks: Tensor
    """int32 ``[heads]``: and the first so many keys, wherever they are."""


@triton.jit
def _marks(set_ptr, place, length):
    return tl.load(set_ptr + place, mask=place < length, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["length", "parts"])
def _count(columns_ptr, distances_ptr, counts_ptr, length, parts, WIDE: tl.constexpr):
    """How many entries of each set lie in one part."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    place = part * WIDE + tl.arange(0, WIDE)
    counts = counts_ptr + head * 2 * parts + part
    tl.store(counts, tl.sum(_marks(columns_ptr + head * length, place, length), 0))
    tl.store(counts + parts, tl.sum(_marks(distances_ptr + head * length, place, length), 0))


@triton.jit
def _put(
    set_ptr, counts, ordered, ranks, part, length, parts, width,
    WIDE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    earlier = tl.zeros([COUNTED], tl.int32)
    for first in range(0, part, COUNTED):
        one = first + tl.arange(0, COUNTED)
        earlier += tl.load(counts + one, mask=one < part, other=0)
    place = part * WIDE + tl.arange(0, WIDE)
    marks = _marks(set_ptr, place, length)
    rank = tl.sum(earlier, 0) + tl.cumsum(marks, 0) - marks
    tl.store(ranks + place, rank, mask=place <= length)
    tl.store(ordered + rank, place, mask=(marks > 0) & (rank < width))
    if part == parts - 1:
        # All places after the last one's hold the length.
        for first in range(tl.sum(earlier, 0) + tl.sum(marks, 0), width, WIDE):
            beyond = first + tl.arange(0, WIDE)
            tl.store(ordered + beyond, length + tl.zeros_like(beyond), mask=beyond < width)


@triton.jit(do_not_specialize=["length", "parts", "width", "most"])
def _order(
    columns_ptr, distances_ptr, counts_ptr, ordered_columns_ptr, ordered_distances_ptr, ranks_ptr, length, parts, width,
    most, WIDE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """For one part of each set: its entries to their places in order, and for each n how many entries lie below n."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    counts = counts_ptr + head * 2 * parts
    ranks = ranks_ptr + head * 2 * (length + 1)
    ordered = ordered_columns_ptr + head * width
    _put(columns_ptr + head * length, counts, ordered, ranks, part, length, parts, width, WIDE, COUNTED)
    ordered = ordered_distances_ptr + head * most
    ranks += length + 1
    _put(distances_ptr + head * length, counts + parts, ordered, ranks, part, length, parts, most, WIDE, COUNTED)


@triton.jit
def _largest_below(distances, ranks, n, wanted):
    """The largest selected distance below n, or -1 where there is none or where it is not wanted."""
    rank = tl.load(ranks + n, mask=wanted, other=0)
    return tl.load(distances + rank - 1, mask=rank > 0, other=-1)


@triton.jit
def _first(distances, ranks, end, length, BLOCK: tl.constexpr):
    """How far before its end a block's first piece starts, 0 if it has none."""
    below = _largest_below(distances, ranks, tl.minimum(end, length), end > 0)
    return tl.where(below >= 0, tl.minimum(below + BLOCK, end), 0)


@triton.jit
def _next(distances, ranks, far, BLOCK: tl.constexpr):
    """How far before a block's end the piece starts that follows one that starts ``far`` before it, 0 after the last.

    The next distance is the largest below ``far - 64``, where the piece ends. The run goes on where its range would begin
    within 64 keys of that.
    """
    n = far - BLOCK
    below = _largest_below(distances, ranks, n, n > 0)
    return tl.where(below >= 0, tl.minimum(n, below + BLOCK), 0)


@triton.jit(do_not_specialize=["length", "most", "spots"])
def _leave(
    distances_ptr, ranks_ptr, nexts_ptr, leaves_ptr, path_ptr, length, most, spots,
    BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One part: the piece after each place where one may start, and the first one that starts in a part nearer the end.

    ``spots`` is how many entries a path has. They are made zeros here.
    """
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    distances = distances_ptr + head * most
    ranks = ranks_ptr + (2 * head + 1) * (length + 1)
    far = part * PART + tl.arange(0, PART)
    there = far <= (spots - 1) * BLOCK
    at = _next(distances, ranks, tl.where(there, far, 0), BLOCK)
    tl.store(nexts_ptr + head * spots * BLOCK + far, at, mask=there)
    inside = (at >= part * PART) & (at > 0)
    while tl.max(inside.to(tl.int32), 0) > 0:
        at = tl.where(inside, _next(distances, ranks, tl.where(inside, at, 0), BLOCK), at)
        inside = (at >= part * PART) & (at > 0)
    tl.store(leaves_ptr + head * spots * BLOCK + far, at, mask=there)
    spot = part * (PART // BLOCK) + tl.arange(0, PART // BLOCK)
    tl.store(path_ptr + head * spots + spot, tl.zeros_like(spot), mask=spot < spots)


@triton.jit(do_not_specialize=["length", "most", "spots", "end"])
def _path(
    distances_ptr, ranks_ptr, nexts_ptr, leaves_ptr, path_ptr, length, most, spots, end,
    BLOCK: tl.constexpr, PART: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The walk of the block that ends at ``end``: a piece that starts n before the end is noted at n // 64, as n.

    Pieces lie 64 keys apart or more: no two come to one place.
    """
    head = tl.program_id(0).to(tl.int64)
    nexts = nexts_ptr + head * spots * BLOCK
    leaves = leaves_ptr + head * spots * BLOCK
    path = path_ptr + head * spots
    far = _first(distances_ptr + head * most, ranks_ptr + (2 * head + 1) * (length + 1), end, length, BLOCK)
    groups = tl.cdiv(spots * BLOCK, PART * LANES)
    for done in range(groups):
        first = (groups - 1 - done) * LANES
        part = first + tl.arange(0, LANES)
        at = tl.zeros([LANES], tl.int32)
        while (far > 0) & (far >= first * PART):
            at = tl.where(part == far // PART, far, at)
            far = tl.load(leaves + far)
        while tl.max(at, 0) > 0:
            tl.store(path + at // BLOCK, at, mask=at > 0)
            after = tl.load(nexts + at, mask=at > 0, other=0)
            at = tl.where(after >= part * PART, after, 0)


@triton.jit
def _keep(kept, low, high, LANES: tl.constexpr):
    """Note that the columns low..high-1, by their place in order, lie between two runs."""
    while low < high:
        column = low + tl.arange(0, LANES)
        tl.store(kept + column, 1, mask=column < high)
        low += LANES


@triton.jit(do_not_specialize=["length", "first_row", "rows", "most", "width", "spots", "most_distances"])
def _blocks(
    columns_ptr, distances_ptr, ranks_ptr, nexts_ptr, path_ptr, starts_ptr, counts_ptr, kept_ptr, before_ptr,
    length, first_row, rows, most, width, spots, most_distances,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    columns = columns_ptr + head * width
    ranks = ranks_ptr + 2 * head * (length + 1)
    nexts = nexts_ptr + head * spots * BLOCK
    path = path_ptr + head * spots
    slot = head * rows + row
    starts = starts_ptr + slot * most
    kept = kept_ptr + slot * width
    end = (first_row + row) * BLOCK + BLOCK
    before = tl.load(ranks + tl.minimum(end, length))
    far = _first(distances_ptr + head * most_distances, ranks + length + 1, end, length, BLOCK)
    count = 0
    column = 0
    alone = far > 0
    if alone:
        alone = tl.load(path + far // BLOCK) != far
    while alone:
        start = end - far
        tl.store(starts + count, start)
        count += 1
        _keep(kept, column, tl.load(ranks + tl.minimum(start, length)), LANES)
        column = tl.load(ranks + tl.minimum(start + BLOCK, length))
        far = tl.load(nexts + far)
        alone = far > 0
        if alone:
            alone = tl.load(path + far // BLOCK) != far
    if far > 0:
        met = tl.load(ranks + tl.minimum(end - far, length))
        _keep(kept, column, met, LANES)
        column = met
        for done in range(0, far // BLOCK + 1, LANES):
            spot = far // BLOCK - done - tl.arange(0, LANES)
            piece = tl.load(path + spot, mask=spot >= 0, other=0)
            there = (piece > 0).to(tl.int32)
            tl.store(starts + count + tl.cumsum(there, 0) - there, end - piece, mask=piece > 0)
            count += tl.sum(there, 0)
    for first in range(column, before, LANES):
        place = first + tl.arange(0, LANES)
        ahead = end - tl.load(columns + place, mask=place < before, other=0)
        # The piece with a column in it starts at it or up to 63 keys before it.
        spot = ahead // BLOCK
        wanted = (place < before) & (far > 0)
        near = tl.load(path + spot, mask=wanted, other=0)
        further = tl.load(path + spot + 1, mask=wanted & (spot + 1 < spots), other=0)
        inside = (near >= ahead) | ((further > 0) & (further < ahead + BLOCK))
        tl.store(kept + place, 1 - inside.to(tl.int32), mask=place < before)
    tl.store(counts_ptr + slot, count)
    tl.store(before_ptr + slot, before)


def build_index(columns: Tensor, distances: Tensor, most_columns: int, most_distances: int, start: int = 0) -> Index:
    """The index of a selection: two sets, bool ``[batch, heads, keys]``, of at most so many entries a head.

    It is for the queries from position ``start`` on.
    """
    batch, heads, length = columns.shape
    both, blocks = batch * heads, -(-length // BLOCK)
    first_row = start // BLOCK
    rows = blocks - first_row
    most_distances = max(1, min(length, most_distances))
    most, width = min(blocks, most_distances), -(-max(1, min(length, most_columns)) // BLOCK) * BLOCK
    device, shape = columns.device, (batch, heads, rows)

    def table(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int32, device=device)

    reach, sinks = _everything(heads, device)
    index = Index(
        starts=table(*shape, most),
        counts=table(*shape),
        columns=table(batch, heads, width),
        kept=torch.zeros(*shape, width, dtype=torch.uint8, device=device),
        before=table(*shape),
        reach=reach,
        sinks=sinks,
    )
    sets = columns.contiguous().view(torch.uint8), distances.contiguous().view(torch.uint8)
    parts = triton.cdiv(length + 1, WIDE)
    counts, ranks, ordered = table(both, 2, parts), table(both, 2, length + 1), table(both, most_distances)
    _count[(parts, both)](*sets, counts, length, parts, WIDE=WIDE, num_warps=4)
    _order[(parts, both)](
        *sets, counts, index.columns, ordered, ranks, length, parts, width, most_distances,
        WIDE=WIDE, COUNTED=256, num_warps=8,
    )  # fmt: skip
    # A piece starts up to so many whole blocks before the end of the last.
    spots = blocks + 1
    nexts, leaves, path = table(both, spots * BLOCK), table(both, spots * BLOCK), table(both, spots)
    _leave[(triton.cdiv(spots * BLOCK, PART), both)](
        ordered, ranks, nexts, leaves, path, length, most_distances, spots, BLOCK=BLOCK, PART=PART, num_warps=4
    )
    _path[(both,)](
        ordered, ranks, nexts, leaves, path, length, most_distances, spots, blocks * BLOCK,
        BLOCK=BLOCK, PART=PART, LANES=LANES, num_warps=1,
    )  # fmt: skip
    _blocks[(rows, both)](
        index.columns, ordered, ranks, nexts, path, index.starts, index.counts, index.kept, index.before,
        length, first_row, rows, most, width, spots, most_distances, BLOCK=BLOCK, LANES=LANES, num_warps=1,
    )  # fmt: skip
    return index


@lru_cache(maxsize=256)
def _everything(heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The reach and the sinks of heads whose queries see all of their runs."""
    return torch.full((heads,), ALL, dtype=torch.int32, device=device), torch.zeros(heads, dtype=torch.int32, device=device)


def count_pairs(index: Index, length: int, start: int = 0) -> int:
    """How many (query, key) pairs an index stands for, over batch and heads, if every block sees its own keys.

    It is of the queries from position ``start`` on, over ``length`` keys.
    """
    first = BLOCK * torch.arange(start // BLOCK, -(-length // BLOCK), device=index.counts.device)
    inside = (length - first).clamp(max=BLOCK)
    last = index.starts.gather(3, (index.counts - 1).clamp(min=0).long()[..., None]).squeeze(3)
    # The last piece may go on beyond its block's end.
    beyond = (last + BLOCK - (first + inside)).clamp(min=0).masked_fill(index.counts == 0, 0)
    keys = index.counts.long() * BLOCK - beyond + index.kept.sum(3)
    queries = inside - (start - first).clamp(min=0)
    # Of these the block's own are seen by its later queries only.
    return int((queries * keys - queries * (queries - 1) // 2).sum())
