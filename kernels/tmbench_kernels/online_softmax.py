"""The online softmax of the kernels in Triton: one step over a tile of keys."""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E_2 = tl.constexpr(2 * 1.4426950408889634)


@triton.jit
def soft_capped(s, cap_scale):
    """``tanh(cap_scale * s)``, or ``s`` where cap_scale is None; the cap itself is in the scale that comes after."""
    if cap_scale is not None:
        x = s * cap_scale
        # For a small x the difference from 1 would cancel what it is to tell.
        s = tl.where(tl.abs(x) < 0.02, x - x * x * x / 3.0, 1.0 - 2.0 / (tl.exp2(x * LOG2_E_2) + 1.0))
    return s


@triton.jit
def log_sum_exp(row_max, row_sum):
    """To base e, of rows whose maximum is to base 2; -inf for a row that saw no key."""
    return (row_max + tl.log2(row_sum)) * LN_2


@triton.jit
def softmax_step(s, v, scale_log2, acc, row_sum, row_max):
    """One step of the online softmax: logits ``s`` [rows, keys], -inf where a row does not see a key, and their values."""
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
    acc, row_sum = softmax_sum(s, v, scale_log2, acc, row_sum, row_max, new_max)
    return acc, row_sum, new_max


@triton.jit
def softmax_sum(s, v, scale_log2, acc, row_sum, row_max, new_max):
    """The same where the maximum with these logits, ``new_max``, is known."""
    # A row that has seen no key yet has a row_max of -inf, and -inf - -inf is not a number.
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    p = tl.exp2(s * scale_log2 - shift[:, None])
    acc_scale = tl.exp2(row_max - shift)
    row_sum = row_sum * acc_scale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * acc_scale[:, None])
    return acc, row_sum


@triton.jit
def attend_tile(
    q, k, v, first, limit, masked, position, reach, n_init, scale_log2, cap_scale, acc, row_sum, row_max,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One step over the keys first..first+KEYS-1, of which those from ``limit`` on are not counted."""
    s = soft_capped(tl.dot(q, k.T), cap_scale)
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
