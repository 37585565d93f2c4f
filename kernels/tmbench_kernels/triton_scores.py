"""What the last queries give to keys and to distances, in Triton; the probabilities are never written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tmbench_kernels.launch import LOG2_E
from tmbench_kernels.online_softmax import softmax_sums


@triton.jit(do_not_specialize=["rows", "length"])
def _last_row_max(logits_ptr, row_max_ptr, weights_ptr, rows, length, scale_log2, KEYS: tl.constexpr):
    """One of the last queries of one head, over all keys up to its own."""
    program = tl.program_id(0)
    keys = length - rows + 1 + program % rows
    logits = logits_ptr + program.to(tl.int64) * length
    row_max = tl.full([1], -float("inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    for first in range(0, keys, KEYS):
        key = (first + tl.arange(0, KEYS))[None, :]
        s = tl.load(logits + key, mask=key < keys, other=0.0) * scale_log2
        # The first key of all counts: no row_max remains -inf.
        row_max, row_sum = softmax_sums(row_max, row_sum, tl.where(key < keys, s, -float("inf")))
    here = program + tl.arange(0, 1)
    tl.store(row_max_ptr + here, row_max)
    tl.store(weights_ptr + here, 1.0 / row_sum)


@triton.jit
def _last_shares(logits, key, seen, row_max, weight, scale_log2):
    s = tl.load(logits + key, mask=seen, other=0.0) * scale_log2
    return tl.where(seen, tl.exp2(s - row_max) * weight, 0.0)


@triton.jit(do_not_specialize=["rows", "length"])
def _sum_shares(
    logits_ptr, row_max_ptr, weights_ptr, by_key_ptr, by_distance_ptr, rows, length, scale_log2,
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
        row_max = tl.load(row_max_ptr + place, mask=row < rows, other=0.0)
        weight = tl.load(weights_ptr + place, mask=row < rows, other=0.0)
        logits = logits_ptr + place * length
        seen = (row < rows) & (key <= length - rows + row)
        by_key += _last_shares(logits, key, seen, row_max, weight, scale_log2)
        # One query earlier, a distance belongs to one key earlier.
        earlier = key - (rows - 1 - row)
        seen = (row < rows) & (earlier >= 0) & (key < length)
        by_distance += _last_shares(logits, earlier, seen, row_max, weight, scale_log2)
    inside = key < length
    tl.store(by_key_ptr + head * length + key, tl.sum(by_key, 0)[None, :], mask=inside)
    tl.store(by_distance_ptr + head * length + length - 1 - key, tl.sum(by_distance, 0)[None, :], mask=inside)


def sum_shares(logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax of the last queries' logits, summed over them by key and by distance: float32 ``[batch, heads, length]``.

    Logits are float32 ``[batch, heads, rows, length]``, contiguous; the keys after a query's own do not count. The
    probabilities are never written down.
    """
    batch, heads, rows, length = logits.shape
    row_maxes, weights = (logits.new_empty(batch, heads, rows) for _ in range(2))
    by_key, by_distance = (logits.new_empty(batch, heads, length) for _ in range(2))
    scale_log2 = scale * LOG2_E
    _last_row_max[(batch * heads * rows,)](logits, row_maxes, weights, rows, length, scale_log2, KEYS=4096, num_warps=8)
    _sum_shares[(batch * heads, triton.cdiv(length, 128))](
        logits, row_maxes, weights, by_key, by_distance, rows, length, scale_log2, ROWS=8, KEYS=128, num_warps=4
    )
    return by_key, by_distance
