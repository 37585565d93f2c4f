"""Scores of keys and of key blocks in Triton, for selections that would otherwise go over their logits again and again."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tmbench_kernels.block_lists import BLOCK, block_count
from tmbench_kernels.triton_triangle import LOG2_E, block_dim


@triton.jit(do_not_specialize=["length", "blocks", "stride_qb"])
def _mean_weights(
    q_ptr, means_ptr, out_ptr, stride_qb, stride_qh, stride_qn, stride_qd, length, blocks, scale_log2, log_2,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head, over all blocks of keys up to its own."""
    row = blocks - 1 - tl.program_id(1)
    both = tl.program_id(0)
    head = both % HEADS
    batch = both // HEADS
    position = row * BLOCK + tl.arange(0, BLOCK)
    row_ok = position < length
    dim = tl.arange(0, BLOCK_DIM)
    dim_ok = dim < DIM
    q_rows = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + position.to(tl.int64) * stride_qn
    q = tl.load(q_rows[:, None] + dim[None, :] * stride_qd, mask=row_ok[:, None] & dim_ok[None, :], other=0.0)
    means = means_ptr + (batch * (HEADS // GROUPS) + head // GROUPS).to(tl.int64) * blocks * DIM
    out = out_ptr + (both.to(tl.int64) * blocks + row) * blocks
    for first in range(0, blocks, MEANS):
        column = first + tl.arange(0, MEANS)
        peak = tl.full([MEANS], -float("inf"), tl.float32)
        total = tl.zeros([MEANS], tl.float32)
        if first <= row:
            places = column.to(tl.int64)[:, None] * DIM + dim[None, :]
            mean = tl.load(means + places, mask=(column < blocks)[:, None] & dim_ok[None, :], other=0.0)
            # Means by queries: a row is then summed within one warp, not across all of them.
            s = tl.dot(mean, q.T) * scale_log2
            # Those count that see all of a key block: of its own queries the last alone.
            sees = row_ok[None, :] & (position[None, :] >= (column * BLOCK + BLOCK - 1)[:, None])
            s = tl.where(sees, s, -float("inf"))
            peak = tl.max(s, 1)
            total = tl.sum(tl.exp2(s - tl.where(peak == -float("inf"), 0.0, peak)[:, None]), 1)
        # Where nothing counts the peak of -inf decides; elsewhere the total is 1 or more.
        tl.store(out + column, (peak + tl.log2(tl.maximum(total, 1.0))) * log_2, mask=column < blocks)


def mean_weights(q: Tensor, means: Tensor, scale: float) -> Tensor:
    """Logarithm of what each block of queries gives to each mean key, float32 ``[batch, heads, blocks, blocks]``.

    q ``[batch, heads, length, dim]`` and means ``[batch, kv_heads, blocks, dim]`` are of one 16-bit type. A sum over the
    queries that see the whole key block; -inf where there are none.
    """
    batch, heads, length, dim = q.shape
    blocks = block_count(length)
    means = means.contiguous()
    out = torch.empty(batch, heads, blocks, blocks, dtype=torch.float32, device=q.device)
    _mean_weights[(batch * heads, blocks)](
        q, means, out, *q.stride(), length, blocks, scale * LOG2_E, math.log(2),
        HEADS=heads, GROUPS=heads // means.shape[1], DIM=dim, BLOCK_DIM=block_dim(dim), BLOCK=BLOCK, MEANS=128, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _softmax_totals(peak, total, s):
    """One step of the softmax's sums: the largest logit of each row, the sum of powers, and more logits [rows, keys]."""
    higher = tl.maximum(peak, tl.max(s, 1))
    return higher, total * tl.exp2(peak - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)


@triton.jit(do_not_specialize=["rows", "length"])
def _last_peaks(logits_ptr, peaks_ptr, weights_ptr, rows, length, scale_log2, KEYS: tl.constexpr):
    """One of the last queries of one head, over all keys up to its own."""
    program = tl.program_id(0)
    keys = length - rows + 1 + program % rows
    logits = logits_ptr + program.to(tl.int64) * length
    peak = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for first in range(0, keys, KEYS):
        key = (first + tl.arange(0, KEYS))[None, :]
        s = tl.load(logits + key, mask=key < keys, other=0.0) * scale_log2
        # The first key of all counts: no peak remains -inf.
        peak, total = _softmax_totals(peak, total, tl.where(key < keys, s, -float("inf")))
    here = program + tl.arange(0, 1)
    tl.store(peaks_ptr + here, peak)
    tl.store(weights_ptr + here, 1.0 / total)


@triton.jit
def _last_shares(logits, key, seen, peak, weight, scale_log2):
    s = tl.load(logits + key, mask=seen, other=0.0) * scale_log2
    return tl.where(seen, tl.exp2(s - peak) * weight, 0.0)


@triton.jit(do_not_specialize=["rows", "length"])
def _sum_shares(
    logits_ptr, peaks_ptr, weights_ptr, by_key_ptr, by_distance_ptr, rows, length, scale_log2,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Some keys of one head, and as many distances: those of the last query to these keys."""
    head = tl.program_id(0).to(tl.int64)
    key = (tl.program_id(1) * KEYS + tl.arange(0, KEYS))[None, :]
    by_key = tl.zeros([ROWS, KEYS], tl.float32)
    by_distance = tl.zeros([ROWS, KEYS], tl.float32)
    for first in range(0, rows, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        place = head * rows + row
        peak = tl.load(peaks_ptr + place, mask=row < rows, other=0.0)
        weight = tl.load(weights_ptr + place, mask=row < rows, other=0.0)
        logits = logits_ptr + place * length
        seen = (row < rows) & (key <= length - rows + row)
        by_key += _last_shares(logits, key, seen, peak, weight, scale_log2)
        # One query earlier, a distance belongs to one key earlier.
        earlier = key - (rows - 1 - row)
        seen = (row < rows) & (earlier >= 0) & (key < length)
        by_distance += _last_shares(logits, earlier, seen, peak, weight, scale_log2)
    inside = key < length
    tl.store(by_key_ptr + head * length + key, tl.sum(by_key, 0)[None, :], mask=inside)
    tl.store(by_distance_ptr + head * length + length - 1 - key, tl.sum(by_distance, 0)[None, :], mask=inside)


def sum_shares(logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax of the last queries' logits, summed over them by key and by distance: float32 ``[batch, heads, length]``.

    Logits are float32 ``[batch, heads, rows, length]``, contiguous; the keys after a query's own do not count. The
    probabilities are never written down.
    """
    batch, heads, rows, length = logits.shape
    peaks, weights = (logits.new_empty(batch, heads, rows) for _ in range(2))
    by_key, by_distance = (logits.new_empty(batch, heads, length) for _ in range(2))
    scale_log2 = scale * LOG2_E
    _last_peaks[(batch * heads * rows,)](logits, peaks, weights, rows, length, scale_log2, KEYS=4096, num_warps=8)
    _sum_shares[(batch * heads, triton.cdiv(length, 128))](
        logits, peaks, weights, by_key, by_distance, rows, length, scale_log2, ROWS=8, KEYS=128, num_warps=4
    )
    return by_key, by_distance


@triton.jit
def _stride_logits(lines, first, own, scale_log2, KEYS: tl.constexpr):
    key = (first + tl.arange(0, KEYS))[None, :]
    s = tl.load(lines + key, mask=key <= own, other=0.0) * scale_log2
    return tl.where(key <= own, s, -float("inf"))


@triton.jit(do_not_specialize=["start", "rows", "columns", "strides"])
def _sum_strides(
    logits_ptr, out_ptr, start, rows, columns, strides, scale_log2, CELLS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """One block of queries of one head, CELLS strides, over the strides of keys up to its own."""
    # The last blocks have the longest rows.
    row = rows - 1 - tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * rows + row
    own = ((start + row) * CELLS + tl.arange(0, CELLS))[:, None]
    width = columns * CELLS
    lines = logits_ptr + (place * CELLS + tl.arange(0, CELLS)[:, None]) * width
    seen = (start + row + 1) * CELLS
    peak = tl.full([CELLS], -float("inf"), tl.float32)
    total = tl.zeros([CELLS], tl.float32)
    for first in range(0, seen, KEYS):
        # The first key of all counts: no peak remains -inf.
        peak, total = _softmax_totals(peak, total, _stride_logits(lines, first, own, scale_log2, KEYS))
    # Strides beyond the prompt hold nothing.
    weight = tl.where(own < strides, 1.0 / total[:, None], 0.0)
    for first in range(0, width, KEYS):
        held = tl.zeros([KEYS // CELLS], tl.float32)
        if first < seen:
            shares = tl.exp2(_stride_logits(lines, first, own, scale_log2, KEYS) - peak[:, None]) * weight
            held = tl.sum(tl.reshape(tl.sum(shares, 0), [KEYS // CELLS, CELLS]), 1)
        column = first // CELLS + tl.arange(0, KEYS // CELLS)
        tl.store(out_ptr + place * columns + column, held, mask=column < columns)


def sum_strides(logits: Tensor, start: int, cells: int, strides: int, scale: float) -> Tensor:
    """Softmax over strides, summed over blocks of ``cells`` by ``cells``: float32 ``[batch, heads, rows, columns]``.

    Logits are float32 ``[batch, heads, rows * cells, columns * cells]``, contiguous, for the query blocks from ``start`` on;
    a stride of queries sees those of keys up to its own. Of queries, those from ``strides`` on do not count. The
    probabilities are never written down.
    """
    batch, heads, rows, columns = *logits.shape[:2], logits.shape[2] // cells, logits.shape[3] // cells
    out = logits.new_empty(batch, heads, rows, columns)
    _sum_strides[(batch * heads, rows)](
        logits, out, start, rows, columns, strides, scale * LOG2_E, CELLS=cells, KEYS=max(8192 // cells, cells), num_warps=8
    )
    return out
