"""The online softmax of the kernels in Triton: one step over a tile of keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_step(s, v, scale_log2, acc, row_sum, row_max):
    """One step of the online softmax: logits ``s`` [rows, keys], -inf where a row does not see a key, and their values."""
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
    # A row that has seen no key yet has a row_max of -inf, and -inf - -inf is not a number.
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    p = tl.exp2(s * scale_log2 - shift[:, None])
    acc_scale = tl.exp2(row_max - shift)
    row_sum = row_sum * acc_scale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * acc_scale[:, None])
    return acc, row_sum, new_max


@triton.jit
def attend_tile(
    q, k, v, first, limit, masked, position, reach, n_init, scale_log2, acc, row_sum, row_max, KEYS: tl.constexpr
):
    """One step over the keys first..first+KEYS-1, of which those from ``limit`` on are not counted."""
    s = tl.dot(q, k.T)
    if masked:
        keys = first + tl.arange(0, KEYS)
        distance = position[:, None] - keys[None, :]
        seen = (keys < limit)[None, :] & (distance >= 0) & ((distance < reach) | (keys < n_init)[None, :])
        s = tl.where(seen, s, -float("inf"))
    return softmax_step(s, v, scale_log2, acc, row_sum, row_max)


@triton.jit
def softmax_sums(row_max, row_sum, s):
    """One step of the softmax's sums: the largest logit of each row, the sum of powers, and more logits [rows, keys]."""
    higher = tl.maximum(row_max, tl.max(s, 1))
    return higher, row_sum * tl.exp2(row_max - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
