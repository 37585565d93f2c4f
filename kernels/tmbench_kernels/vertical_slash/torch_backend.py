"""Vertical-slash attention over a given selection, in torch: gathered keys, memory linear in length.

Neighbouring blocks of queries see much the same keys, and a large product without a mask is the fastest. So a strip of
blocks first attends to the keys that most of its blocks see, then each half of it to what is left of the half's, down to a
few blocks, which take the rest by a bias or each for itself. The log-sum-exps make one softmax of all that. What a block
does not see of the keys that most do is taken out of its output again, by the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tmbench_kernels.pattern import empty_output, new_lse
from tmbench_kernels.sdpa import Part, attention, from_an_edge, with_lse
from tmbench_kernels.vertical_slash.runs import BLOCK, largest_below, parts, visible_keys

Bits = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

STRIP = 16
"""Blocks of queries of one head that are attended together as far as they see the same keys."""
FEWEST_BLOCKS = 8
"""A strip is halved down to so many, and further where these do not see all of each other,"""
LEAST_BLOCKS = 4
"""down to so many."""
FEWEST_KEYS = 48
"""Fewer keys are left to the halves: a call for them would take longer than it saves."""
SPARED = 4
"""Keys that all blocks but one of so many see are attended to by all of them: to take them out again is less work."""
MOST_TAKEN = 0.25
"""Where more of a query's weight is to be taken out, its block is attended for anew."""
SMALL_BLOCK_COST = 1.2
"""What a pair costs when every block has its own keys, against all blocks over the union of their keys. Measured."""
_PREPARED = 2**24
"""(block, key) pairs of one head that are worked out at a time."""


@dataclass(frozen=True, eq=False)
class _Strip:
    """Neighbouring blocks of one head's queries, and what is known of their output so far."""

    q: Tensor
    """``[rows, dim]``."""
    seen: Bytes
    """Which keys each block sees, ``[blocks, keys]``, up to the last block's end."""
    hidden: Bits
    """Which keys a block does not see, but its output is over, ``[blocks, keys]``."""
    start: int
    """The position of the first query."""
    out: Tensor
    """``[rows, v_dim]``, over the keys so far."""
    sums: Tensor
    """Their log-sum-exp, ``[rows]``."""

    def blocks(self, low: int, high: int) -> _Strip:
        """Some of the blocks."""
        rows, start = slice(low * BLOCK, high * BLOCK), self.start + low * BLOCK
        q, keys = self.q[rows], slice(start + self.q[rows].shape[0])
        seen, hidden = self.seen[low:high, keys], self.hidden[low:high, keys]
        return _Strip(q, seen, hidden, start, self.out[rows], self.sums[rows])


@dataclass(frozen=True, eq=False)
class _Head:
    """One head's keys ``[keys, dim]`` and values, and how its logits are made."""

    k: Tensor
    v: Tensor
    scale: float
    softcap: float
    buffers: tuple[Tensor, Tensor]
    """For copies of k and v: fresh memory would cost more in page faults than the copies do."""

    near: int
    """So many blocks in a row see all of each other's keys, but for the future."""

    def keys(self, places: Places) -> Part:
        """Some of the keys and their values, copied side by side."""
        index, count = torch.from_numpy(places).to(self.k.device), len(places)
        k, v = (
            torch.index_select(x, 0, index, out=None if count > len(buffer) else buffer[:count])[None, None]
            for x, buffer in zip((self.k, self.v), self.buffers, strict=True)
        )
        return Part(k, v)

    def own(self, strip: _Strip) -> Part:
        """The strip's own keys, or where its blocks do not see all of each other, each block's own."""
        rows, blocks = len(strip.q), len(strip.seen)
        k, v = (x[strip.start : strip.start + rows] for x in (self.k, self.v))
        if blocks <= self.near:
            return Part(k[None, None], v[None, None], causal=True)
        k, v = (F.pad(x, (0, 0, 0, blocks * BLOCK - rows)).view(blocks, 1, BLOCK, -1) for x in (k, v))
        return Part(k, v, causal=True)

    def attend(self, strip: _Strip, part: Part) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exps over some keys, which all blocks have together or, in a batch, each for itself."""
        q, rows, blocks = strip.q, len(strip.q), part.k.shape[0]
        q = q[None, None] if blocks == 1 else F.pad(q, (0, 0, 0, blocks * BLOCK - rows)).view(blocks, 1, BLOCK, -1)
        out, sums = with_lse(q, part, self.scale, softcap=self.softcap)
        return out.flatten(0, 2)[:rows], sums.flatten()[:rows]

    def add(self, strip: _Strip, part: Part) -> None:
        """Attend to more keys."""
        more, sums = self.attend(strip, part)
        strip.out.lerp_(more, (sums - strip.sums).sigmoid_()[:, None])
        torch.logaddexp(strip.sums, sums, out=strip.sums)


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
    """Attention over a selection, two sets, bool ``[batch, heads, keys]``: ``[batch, heads, queries, v_dim]``, in q's type.

    Distance 0 must be selected.
    """
    heads, length = q.shape[1], k.shape[2]
    start = length - q.shape[2]
    if skipped := start % BLOCK:

        def attend(q: Tensor, lse: Tensor | None) -> Tensor:
            return attend_selected(q, k, v, columns, distances, scale, softcap=softcap, lse=lse)

        return from_an_edge(attend, q, v, skipped, lse)
    groups, last = heads // k.shape[1], -(-length // BLOCK)
    dense = _dense_blocks(distances)
    if bool((dense >= last).all()):
        return attention(q, k, v, scale, causal=True, softcap=softcap, lse=lse)
    out = empty_output(q, v)
    buffers = k.new_empty(2 * length, k.shape[3]), v.new_empty(2 * length, v.shape[3])
    for b, of_heads in enumerate(dense.tolist()):
        for h, near in enumerate(of_heads):
            kv, first = h // groups, min(max(near, start // BLOCK), last)
            edge = min(first * BLOCK, length) - start
            sums = None if lse is None else lse[b, h]
            if edge:
                x = q[b, h, :edge], k[b, kv, : start + edge], v[b, kv, : start + edge]
                query, key, value = (each[None, None] for each in x)
                these = None if sums is None else sums[None, None, :edge]
                done = attention(query, key, value, scale, causal=True, softcap=softcap, lse=these)
                out[b, h, :edge] = done[0, 0]
            if first < last:
                chosen = columns[b, h][None, None], distances[b, h][None, None]
                head, rows = _Head(k[b, kv], v[b, kv], scale, softcap, buffers, near), slice(edge, None)
                out[b, h, rows], totals = _attend_blocks(head, q[b, h, rows], chosen, range(first, last))
                if sums is not None:
                    sums[rows] = totals
    return out


def _dense_blocks(distances: Tensor) -> Tensor:
    """How many first blocks of queries see all keys up to their own, ``[batch, heads]``: those before any gap."""
    length = distances.shape[2]
    ends = torch.arange(BLOCK, -(-length // BLOCK) * BLOCK + 1, device=distances.device)
    below = largest_below(distances)[:, :, ends.clamp(max=length)]
    reached = (ends - below <= BLOCK).long().cumprod(2).sum(2)
    return torch.div(reached - 1, BLOCK, rounding_mode="floor") + 1


def _attend_blocks(head: _Head, q: Tensor, chosen: tuple[Tensor, Tensor], blocks: range) -> tuple[Tensor, Tensor]:
    """One head's queries ``[rows, dim]``, those of these blocks: the output ``[rows, v_dim]``, and the log-sum-exps."""
    sums = new_lse(q[None, None])[0, 0].fill_(-torch.inf)
    out = sums.new_zeros(len(q), head.v.shape[1])
    prepared = max(_PREPARED // (blocks.stop * BLOCK * STRIP), 1) * STRIP
    for some in parts(blocks, prepared):
        seen = visible_keys(*chosen, some.start, some.stop)[0, 0].view(torch.uint8).cpu().numpy()
        rows = slice((some.start - blocks.start) * BLOCK, (some.stop - blocks.start) * BLOCK)
        whole = _Strip(q[rows], seen, np.zeros_like(seen, dtype=bool), some.start * BLOCK, out[rows], sums[rows])
        for part in parts(range(len(some)), STRIP):
            strip = whole.blocks(part.start, part.stop)
            _attend_strip(head, strip, np.ones(0, dtype=bool))
            _take_out(head, strip)
    return out, sums


def _attend_strip(head: _Head, strip: _Strip, left: Bits) -> None:
    """Attend to all that the strip's blocks see, but of the first keys only to those that are ``left``."""
    start, blocks = strip.start, len(strip.seen)
    # Exact for less than 256 blocks.
    counts = np.add.reduce(strip.seen[:, :start], axis=0, dtype=np.uint8)
    counts[: len(left)] *= left
    places = np.flatnonzero(counts >= blocks - blocks // SPARED)
    if len(places) >= FEWEST_KEYS:
        unseen = places[counts[places] < blocks]
        strip.hidden[:, unseen] = strip.seen[:, unseen] == 0
        counts[places] = 0
        head.add(strip, head.keys(places))
    left = counts > 0
    if blocks > max(head.near, LEAST_BLOCKS) or (blocks > FEWEST_BLOCKS and left.any()):
        half = blocks // 2
        _attend_strip(head, strip.blocks(0, half), left)
        _attend_strip(head, strip.blocks(half, blocks), left)
        return
    head.add(strip, head.own(strip))
    seen = strip.seen[:, :start]
    if blocks > head.near:
        # Of the strip's own keys each block has its own so far.
        seen = strip.seen[:, : start + (blocks - 1) * BLOCK].copy()
        for n, row in enumerate(seen):
            row[start + n * BLOCK :] = 0
        left = np.concatenate([left, np.ones(seen.shape[1] - start, dtype=bool)])
    lists, places = [np.flatnonzero(row & left) for row in seen.view(bool)], np.flatnonzero(left)
    widest = max(map(len, lists))
    if 0 < widest * SMALL_BLOCK_COST < len(places):
        head.add(strip, _each(head, lists))
    elif widest:
        head.add(strip, _together(head, places, seen[:, places], len(strip.q)))


def _take_out(head: _Head, strip: _Strip) -> None:
    """Take out of the output what it is over, but its block does not see.

    That loses as much of the precision as it held of the weight: where it was a quarter, the block is attended for anew.
    """
    lists = [np.flatnonzero(row) for row in strip.hidden]
    if not any(map(len, lists)):
        return
    others, sums = head.attend(strip, _each(head, lists))
    share = (sums - strip.sums).exp_()
    heavy = (F.pad(share, (0, -len(share) % BLOCK)).view(-1, BLOCK) > MOST_TAKEN).any(1).nonzero().flatten().tolist()
    strip.out.sub_(others.mul_(share[:, None])).div_(1 - share[:, None])
    strip.sums.add_(torch.log1p(-share))
    for n in heavy:
        _anew(head, strip.blocks(n, n + 1))


def _anew(head: _Head, block: _Strip) -> None:
    """Attend for a single block over what it sees, and nothing else."""
    block.out.zero_()
    block.sums.fill_(-torch.inf)
    head.add(block, head.own(block))
    places = np.flatnonzero(block.seen[0, : block.start])
    if len(places):
        head.add(block, head.keys(places))


def _together(head: _Head, places: Places, seen: Bytes, rows: int) -> Part:
    """These keys for all blocks, and what hides those that a block of the ``rows`` queries does not see."""
    visible = torch.from_numpy(seen).bool().to(head.k.device)
    by_block = head.k.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    bias = by_block.repeat_interleave(BLOCK, 0)[:rows]
    unseeing = (~visible.any(1)).repeat_interleave(BLOCK)[:rows]
    return replace(head.keys(places), bias=bias[None, None], unseeing=unseeing)


def _each(head: _Head, lists: Sequence[Places]) -> Part:
    """Each block's own list of keys of the past, filled up to the longest list."""
    counts = np.array([len(keys) for keys in lists])
    blocks, widest = len(lists), int(counts.max())
    keys = np.zeros((blocks, widest), dtype=np.int64)
    for row, some in zip(keys, lists, strict=True):
        row[: len(some)] = some
    bias = None
    if counts.min() < widest:
        filling = torch.from_numpy(np.arange(widest) >= counts[:, None]).to(head.k.device)
        bias = head.k.new_zeros(filling.shape).masked_fill_(filling, -torch.inf)[:, None, None].expand(-1, -1, BLOCK, -1)
    part = head.keys(keys.ravel())
    k, v = (x.view(blocks, 1, widest, -1) for x in (part.k, part.v))
    return Part(k, v, bias=bias, unseeing=torch.from_numpy(counts == 0).to(head.k.device)[:, None, None])
