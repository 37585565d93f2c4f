"""What the last queries give to keys and to distances, in Triton; neither logits nor probabilities are written.

The logits are worked out twice, by a product on the tensor cores each time: for the softmax's sums, of which every part of
the keys yields some, and for the shares, once the sums are known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tmbench_kernels.launch import LOG2_E, block_dim, loadable, positive

BLOCK = 64
"""Queries of a program, and keys of a step."""
KEYS = 2048
"""Keys of a program."""
WARPS = 4


@triton.jit
def _last_queries(q_ptr, row, before, stride_qn, stride_qd, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The queries of some rows, of which the first ``before`` are not there and are zeros."""
    dim = tl.arange(0, BLOCK_DIM)
    places = (row - before).to(tl.int64)[:, None] * stride_qn + dim[None, :] * stride_qd
    return tl.load(q_ptr + places, mask=(row >= before)[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _logits(q, k_tiles, batch, key_head, first, position, all_seen, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Not yet scaled, -inf for keys after a query's own, and for those before the first, which are not there.

    The keys up to ``all_seen`` are seen by every query.
    """
    k = k_tiles.load([batch, key_head, first, 0]).reshape(BLOCK, BLOCK_DIM)
    s = tl.dot(q, k.T)
    if (first < 0) | (first + BLOCK > all_seen):
        key = first + tl.arange(0, BLOCK)[None, :]
        s = tl.where((key >= 0) & (key <= position[:, None]), s, -float("inf"))
    return s


@triton.jit
def _seen(row, length, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """The last key that each row sees, and how many keys every row sees: all of them, where it is not CAUSAL."""
    if CAUSAL:
        return length - ROWS + row, length - ROWS + 1
    return length - 1 + row * 0, length


@triton.jit
def _finite(row_max):
    # A row that has seen no key has a maximum of -inf, and -inf - -inf is not a number.
    return tl.where(row_max == -float("inf"), 0.0, row_max)


@triton.jit(do_not_specialize=["before", "length", "parts"])
def _part_sums(
    q_ptr, k_tiles, maxes_ptr, sums_ptr, stride_qb, stride_qh, stride_qn, stride_qd, before, length, parts,
    scale_log2,
    ROWS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Some of the last queries of one head over a part of the keys: the largest logit, and the sum of powers."""
    part = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    both = tl.program_id(2)
    batch = both // HEADS
    head = both % HEADS
    position, all_seen = _seen(row, length, ROWS, CAUSAL)
    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q = _last_queries(q_ptr, row, before, stride_qn, stride_qd, DIM, BLOCK_DIM)
    row_max = tl.full([BLOCK], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(part * KEYS, tl.minimum(part * KEYS + KEYS, length), BLOCK):
        s = _logits(q, k_tiles, batch, head // GROUPS, first, position, all_seen, BLOCK, BLOCK_DIM)
        higher = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
        shift = _finite(higher)
        row_sum = row_sum * tl.exp2(row_max - shift) + tl.sum(tl.exp2(s * scale_log2 - shift[:, None]), 1)
        row_max = higher
    place = (both.to(tl.int64) * parts + part) * ROWS + row
    tl.store(maxes_ptr + place, row_max)
    tl.store(sums_ptr + place, row_sum)


@triton.jit(do_not_specialize=["before", "length", "parts"])
def _part_shares(
    q_ptr, k_tiles, maxes_ptr, sums_ptr, by_key_ptr, by_distance_ptr, stride_qb, stride_qh, stride_qn, stride_qd, before,
    length, parts, scale_log2,
    ROWS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Some of the last queries of one head over a part of the keys: what they give to these.

    And to as many distances, where it is CAUSAL; else by_distance_ptr is None.
    """
    part = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    both = tl.program_id(2)
    batch = both // HEADS
    head = both % HEADS
    position, all_seen = _seen(row, length, ROWS, CAUSAL)
    place = both.to(tl.int64) * parts * ROWS + row[None, :]
    row_max = tl.full([BLOCK], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    for one in range(0, parts, MERGED):
        some = one + tl.arange(0, MERGED)[:, None]
        part_max = tl.load(maxes_ptr + place + some * ROWS, mask=some < parts, other=-float("inf"))
        part_sum = tl.load(sums_ptr + place + some * ROWS, mask=some < parts, other=0.0)
        higher = tl.maximum(row_max, tl.max(part_max, 0))
        shift = _finite(higher)
        row_sum = row_sum * tl.exp2(row_max - shift) + tl.sum(part_sum * tl.exp2(part_max - shift[None, :]), 0)
        row_max = higher
    row_max = _finite(row_max)
    weight = tl.where(row >= before, 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum), 0.0)

    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q = _last_queries(q_ptr, row, before, stride_qn, stride_qd, DIM, BLOCK_DIM)
    out = (both.to(tl.int64) * (ROWS // BLOCK) + tl.program_id(1)) * length
    column = tl.arange(0, BLOCK)
    begin = part * KEYS
    start = begin
    if CAUSAL:
        # A diagonal moves on by a key from query to query. By so many keys a query's shares are turned, with the last step's
        # for those that come in at the front: then what lies on one diagonal lies in one column.
        turn = BLOCK - 1 - tl.arange(0, BLOCK)[:, None]
        source = (column[None, :] - turn) & (BLOCK - 1)
        stays = column[None, :] < BLOCK - turn
        last = tl.zeros([BLOCK, BLOCK], tl.float32)
        # A step before the part tells what goes over into it. Before the first part there are no keys, but steps that write
        # the zeros of the distances that these queries do not reach.
        later = ROWS - BLOCK - tl.program_id(1) * BLOCK
        start -= tl.where(part > 0, BLOCK, later)
    for first in range(start, tl.minimum(begin + KEYS, length), BLOCK):
        key = first + column
        s = _logits(q, k_tiles, batch, head // GROUPS, first, position, all_seen, BLOCK, BLOCK_DIM)
        shares = tl.exp2(s * scale_log2 - row_max[:, None]) * weight[:, None]
        own = first >= begin
        tl.store(by_key_ptr + out + key, tl.sum(shares, 0), mask=own & (key < length))
        if CAUSAL:
            turned = tl.gather(tl.where(stays, shares, last), source, 1)
            last = shares
            distance = length - 1 - later - key
            wanted = (own | (part == 0)) & (distance >= 0) & (distance < length)
            tl.store(by_distance_ptr + out + distance, tl.sum(turned, 0), mask=wanted)


def sum_shares(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What the softmax of the last queries gives to keys and to distances, summed over the queries.

    q ``[batch, heads, rows, dim]`` holds the last queries of k ``[batch, kv_heads, length, dim]``, at most as many, both of
    one 16-bit type. Returns float32 ``[2, batch, heads, length]``, by key and by distance.
    """
    return _sum_shares(q, k, scale, causal=True)


def sum_key_shares(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What the softmax over all keys gives to each, summed over the queries: float32 ``[batch, heads, keys]``.

    Tensors as for ``sum_shares``, but for how many queries there are; every one of them sees every key.
    """
    return _sum_shares(q, k, scale, causal=False)


def _sum_shares(q: Tensor, k: Tensor, scale: float, *, causal: bool) -> Tensor:
    q, scale = positive(q, scale)
    k = loadable(k)
    (batch, heads, rows, dim), (kv_heads, length) = q.shape, k.shape[1:3]
    blocks, parts, wide = triton.cdiv(rows, BLOCK), triton.cdiv(length, KEYS), block_dim(dim)
    whole = blocks * BLOCK
    maxes, sums = (q.new_empty(batch, heads, parts, whole, dtype=torch.float32) for _ in range(2))
    k_tiles = TensorDescriptor(k, list(k.shape), list(k.stride()), [1, 1, BLOCK, wide])
    given = (*q.stride(), whole - rows, length, parts, scale * LOG2_E)
    settings = {
        "ROWS": whole, "HEADS": heads, "GROUPS": heads // kv_heads, "DIM": dim, "BLOCK_DIM": wide, "BLOCK": BLOCK,
        "KEYS": KEYS, "CAUSAL": causal, "num_stages": 3 if wide <= 128 else 1,
    }  # fmt: skip
    grid = parts, blocks, batch * heads
    _part_sums[grid](q, k_tiles, maxes, sums, *given, **settings, num_warps=WARPS)
    shares = q.new_empty(*(2,) * causal, batch, heads, blocks, length, dtype=torch.float32)
    by_key, by_distance = shares if causal else (shares, None)
    _part_shares[grid](q, k_tiles, maxes, sums, by_key, by_distance, *given, **settings, MERGED=32, num_warps=WARPS)
    return shares.sum(-2) if blocks > 1 else shares.squeeze(-2)
