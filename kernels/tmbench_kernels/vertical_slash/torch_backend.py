"""Vertical-slash attention over a given selection, in torch: gathered keys, memory linear in length.

A selection arrives as two sets, columns and distances, bool ``[batch, heads, length]``. ``runs`` turns the distances into
blocks of 64 keys for each block of 64 queries; ``visible_keys`` adds the columns; ``attend_selected`` attends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tmbench_kernels.pattern import empty_output
from tmbench_kernels.sdpa import Part, attention, from_an_edge, in_parts

BLOCK = 64
"""Queries that share their keys, and keys that a distance widens to."""
PREPARED = 32
"""Blocks of queries whose keys are worked out at a time, for all heads."""
COUNTED = 512
"""Blocks of queries whose pairs are counted at a time, for all heads."""
STRIP = 16
"""Blocks of queries of one head that are multiplied at a time where they see much the same keys."""
_SMALL_BLOCK_COST = 1.2
"""What a pair costs when every block has its own keys, against a strip over the union of its blocks' keys. Measured."""
_FEWEST_BLOCKS = 4
"""A strip whose blocks see different keys is halved down to so many, which then go as a batch, each with its own keys."""


def runs(distances: Tensor, first: int, last: int) -> Tensor:
    """Where the key blocks of the query blocks first..last-1 start: int64 ``[batch, heads, blocks, steps]``, ascending.

    Blocks are 64 keys wide, disjoint and not aligned; -1 fills up.
    """
    return torch.stack(list(_steps(largest_below(distances), first, last)), dim=-1)


def _steps(below: Tensor, first: int, last: int) -> Iterator[Tensor]:
    """Where the first key block of every query block starts, then the second, and so on: int64 ``[batch, heads, blocks]``.

    Walks from block to block, not from distance to distance: the next block depends only on where the last one ends and on
    the largest distance that reaches beyond, which ``below`` holds (see ``largest_below``).
    """
    length = below.shape[2] - 1
    end = BLOCK * torch.arange(first + 1, last + 1, device=below.device)
    reach = torch.zeros(*below.shape[:2], last - first, dtype=torch.int64, device=below.device)
    for step in range(last):
        open_ = reach < end
        wanted = (end - reach).clamp_(0, length)
        next_end = (end - below.gather(2, wanted)).clamp_(min=BLOCK)
        if step == 0:
            reach = next_end
        else:
            reach = torch.where(open_, torch.where(next_end <= reach + BLOCK, reach + BLOCK, next_end), reach)
        yield torch.where(open_, reach - BLOCK, -1)
        if not bool((reach < end).any()):
            break


def largest_below(distances: Tensor) -> Tensor:
    """For n in 0..length the largest selected distance below n, or -1: int64 ``[batch, heads, length + 1]``."""
    positions = torch.arange(distances.shape[2], device=distances.device)
    return F.pad(torch.where(distances, positions, -1).cummax(2).values, (1, 0), value=-1)


def visible_keys(columns: Tensor, distances: Tensor, first: int, last: int) -> Tensor:
    """Which keys the query blocks first..last-1 see, bool ``[batch, heads, blocks, keys]``, keys up to the last block's end.

    Keys after a block's end are excluded, keys inside the block are not yet compared with its queries: all are visible.
    """
    keys = min(last * BLOCK, columns.shape[2])
    starts = runs(distances, first, last)
    unused = starts < 0
    edges = torch.zeros(*starts.shape[:3], (last + 2) * BLOCK, dtype=torch.int8, device=columns.device)
    one = torch.ones_like(starts, dtype=torch.int8)
    edges.scatter_add_(3, starts.masked_fill(unused, edges.shape[3] - 1), one)
    edges.scatter_add_(3, (starts + BLOCK).masked_fill_(unused, edges.shape[3] - 1), -one)
    inside = edges[..., :keys].cumsum(3, dtype=torch.int8) > 0
    ends = BLOCK * torch.arange(first + 1, last + 1, device=columns.device)
    return (inside | columns[:, :, None, :keys]) & (torch.arange(keys, device=columns.device) < ends[:, None])


def count_pairs(columns: Tensor, distances: Tensor, start: int = 0) -> int:
    """How many (query, key) pairs the selection stands for, over batch and heads, for the queries from ``start`` on.

    Memory is linear in length: which keys are seen is never written down. A query block sees all columns before its end, and
    of each of its key blocks those keys that are no columns.
    """
    batch, heads, length = columns.shape
    below = largest_below(distances)
    taken = F.pad(columns.cumsum(2), (1, 0))
    total = 0
    for blocks in _parts(range(start // BLOCK, -(-length // BLOCK)), COUNTED):
        ends = (BLOCK * torch.arange(blocks.start + 1, blocks.stop + 1, device=columns.device)).clamp_(max=length)
        seen = taken[..., ends]
        for starts in _steps(below, blocks.start, blocks.stop):
            low = starts.clamp(min=0).minimum(ends)
            high = (low + BLOCK).minimum(ends)
            fresh = high - low - taken.gather(2, high) + taken.gather(2, low)
            seen += fresh.masked_fill_(starts < 0, 0)
        for block, keys in zip(blocks, seen.sum((0, 1)).tolist(), strict=True):
            rows = min(BLOCK, length - block * BLOCK) - max(start - block * BLOCK, 0)
            # Of the visible keys the block's own are seen by its later queries only.
            total += rows * keys - batch * heads * rows * (rows - 1) // 2
    return total


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    distances: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention over a selection: ``[batch, heads, queries, v_dim]``, in q's type."""
    heads, length = q.shape[1], k.shape[2]
    start = length - q.shape[2]
    if skipped := start % BLOCK:

        def attend(q: Tensor, lse: Tensor | None) -> Tensor:
            return attend_selected(q, k, v, columns, distances, scale, softcap=softcap, lse=lse)

        return from_an_edge(attend, q, v, skipped, lse)
    groups = heads // k.shape[1]
    whole = _sees_everything(distances)
    if bool(whole.all()):
        return attention(q, k, v, scale, causal=True, softcap=softcap, lse=lse)
    out = empty_output(q, v)
    for b, h in whole.nonzero().tolist():
        query, key, value = (x[b, n][None, None] for x, n in ((q, h), (k, h // groups), (v, h // groups)))
        sums = None if lse is None else lse[b, h][None, None]
        out[b, h] = attention(query, key, value, scale, causal=True, softcap=softcap, lse=sums)[0, 0]
    sparse = (~whole).nonzero().tolist()
    # One buffer for all strips: fresh memory of this size would cost more in page faults than the masks themselves.
    scratch = q.new_empty(min(STRIP, -(-length // BLOCK)) * BLOCK * length)
    for blocks in _parts(range(start // BLOCK, -(-length // BLOCK)), PREPARED):
        seen = visible_keys(columns, distances, blocks.start, blocks.stop)
        for strip in _parts(blocks, STRIP):
            first, end = strip.start * BLOCK, strip.stop * BLOCK
            rows = slice(first - start, end - start)
            for b, h in sparse:
                keys = seen[b, h, strip.start - blocks.start : strip.stop - blocks.start, :end]
                kv = h // groups
                sums = None if lse is None else lse[b, h, rows]
                _attend_strip(q[b, h, rows], k[b, kv], v[b, kv], keys, first, scale, scratch, out[b, h, rows], softcap, sums)
    return out


def _parts(blocks: range, size: int) -> Iterator[range]:
    for first in blocks[::size]:
        yield range(first, min(first + size, blocks.stop))


def _sees_everything(distances: Tensor) -> Tensor:
    """Heads whose runs leave no gap anywhere, bool ``[batch, heads]``: no 64 neighbouring distances are all unselected."""
    length = distances.shape[2]
    ends = torch.arange(BLOCK, -(-length // BLOCK) * BLOCK + 1, device=distances.device)
    return (ends - largest_below(distances)[:, :, ends.clamp(max=length)] <= BLOCK).all(2)


def _attend_strip(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    start: int,
    scale: float,
    scratch: Tensor,
    out: Tensor,
    softcap: float,
    lse: Tensor | None,
) -> None:
    """One head's queries ``[rows, dim]`` from ``start`` on, into ``out``; ``seen`` is bool ``[blocks, keys]``."""
    union = seen.any(0)
    together = int(union.sum())
    widest = int(seen.sum(1).max())
    rows = q.shape[0]
    if widest * _SMALL_BLOCK_COST < together:
        blocks = seen.shape[0]
        if blocks <= _FEWEST_BLOCKS:
            out[:] = _attend_blocks(q, k, v, seen, widest, start, scale, softcap, lse)
            return
        half = blocks // 2 * BLOCK
        first, second = (None, None) if lse is None else (lse[:half], lse[half:])
        _attend_strip(q[:half], k, v, seen[: blocks // 2], start, scale, scratch, out[:half], softcap, first)
        _attend_strip(q[half:], k, v, seen[blocks // 2 :], start + half, scale, scratch, out[half:], softcap, second)
        return
    plain = not softcap and lse is None and q.shape[-1] == v.shape[-1]
    if q.device.type == "cpu" and plain and (parts := _mostly_free(k, v, seen, start, rows, scratch)):
        out[:] = in_parts(q[None, None], parts, scale)[0, 0]
        return
    keys = union.nonzero().flatten()
    if together == seen.shape[1]:
        k, v = k[:together], v[:together]
    else:
        k, v, seen = k.index_select(0, keys), v.index_select(0, keys), seen.index_select(1, keys)
    bias = _bias(seen, keys, start, rows, scratch)
    sums = None if lse is None else lse[None, None]
    out[:] = attention(q[None, None], k[None, None], v[None, None], scale, bias=bias, softcap=softcap, lse=sums)[0, 0]


def _mostly_free(k: Tensor, v: Tensor, seen: Tensor, start: int, rows: int, scratch: Tensor) -> list[Part]:
    """The keys of a strip in parts that need no bias, its own and those that all of its blocks see, and the rest.

    No parts where the blocks do not see all of each other, or see nothing alike.
    """
    block = torch.arange(start, seen.shape[1], device=seen.device) // BLOCK - start // BLOCK
    later = block > torch.arange(seen.shape[0], device=seen.device)[:, None]
    alike = seen[:, :start].all(0)
    if not bool(alike.any() and (seen[:, start:] | later).all()):
        return []

    def part(keys: Tensor) -> Part:
        return Part(k.index_select(0, keys)[None, None], v.index_select(0, keys)[None, None])

    own = slice(start, start + rows)
    parts = [Part(k[None, None, own], v[None, None, own], causal=True), part(alike.nonzero().flatten())]
    keys = (seen[:, :start].any(0) & ~alike).nonzero().flatten()
    if len(keys):
        seen = seen.index_select(1, keys)
        bias = _bias(seen, keys, start, rows, scratch)
        unseeing = (~seen.any(1)).repeat_interleave(BLOCK)[:rows]
        parts.append(replace(part(keys), bias=bias[None, None], unseeing=unseeing))
    return parts


def _bias(seen: Tensor, keys: Tensor, start: int, rows: int, scratch: Tensor) -> Tensor:
    """What hides the keys that a strip's blocks do not see, ``[rows, keys]``, in ``scratch``. ``keys`` are positions."""
    blocks, together = seen.shape
    by_block = scratch.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    # In one copy: a call for each block would wait for all threads each time.
    whole = scratch[: blocks * BLOCK * together].view(blocks, BLOCK, together)
    bias = whole.copy_(by_block[:, None]).view(-1, together)[:rows]
    late = int((keys < start).sum())
    positions = torch.arange(start, start + rows, device=keys.device)
    bias[:, late:].masked_fill_(keys[late:] > positions[:, None], -torch.inf)
    return bias


def _attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    widest: int,
    start: int,
    scale: float,
    softcap: float,
    lse: Tensor | None,
) -> Tensor:
    """As a batch of blocks, each over its own keys, filled up to the widest."""
    blocks, rows = seen.shape[0], q.shape[0]
    counts = seen.sum(1, keepdim=True)
    filled = torch.arange(widest, device=q.device) < counts
    keys = torch.full((blocks, widest), start + blocks * BLOCK, device=q.device)
    keys[filled] = seen.nonzero()[:, 1]
    bias = q.new_zeros(blocks, 1, BLOCK, widest)
    # Only a block's own keys, at most 64 and the last of its list, can be in the future of its queries.
    late = max(int(counts.min()) - BLOCK, 0)
    positions = torch.arange(start, start + blocks * BLOCK, device=q.device).view(blocks, 1, BLOCK, 1)
    bias[..., late:].masked_fill_(keys[:, None, None, late:] > positions, -torch.inf)
    keys = keys.clamp_(max=k.shape[0] - 1).flatten()
    k, v = (x.index_select(0, keys).view(blocks, 1, widest, -1) for x in (k, v))
    padded = F.pad(q, (0, 0, 0, blocks * BLOCK - rows)).view(blocks, 1, BLOCK, -1)
    sums = None if lse is None else lse.new_empty(padded.shape[:3])
    out = attention(padded, k, v, scale, bias=bias, softcap=softcap, lse=sums).flatten(0, 2)[:rows]
    if lse is not None and sums is not None:
        lse.copy_(sums.flatten()[:rows])
    return out
