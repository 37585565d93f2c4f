"""Attention of one new token over a cache, in Triton: split over the keys, as Flash-Decoding does, in two launches.

A program owns the query heads of one key head of one sequence, and a split of its keys. How the keys are split follows from
the sequence's own length, on the device, so that one recorded CUDA graph serves every step. The splits are combined by their
log-sum-exp. Source: T. Dao, D. Haziza, F. Massa, G. Sizov, Flash-Decoding for long-context inference, 2023.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tmbench_kernels.launch import block_dim, logit_scales, multiprocessors, positive
from tmbench_kernels.online_softmax import log_sum_exp, soft_capped, softmax_step

KEYS = 16
"""Of a tile. A program is one warp, which waits for no other; many of them hide each other's waiting for memory."""
PROGRAMS = 8
"""About so many programs for each multiprocessor, where there are keys enough."""
FEWEST_TILES = 4
"""A split has at least so many tiles of keys where the cache is full."""
MOST_SPLITS = 128
"""As many as the second launch combines at once."""


@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_nb", "stride_nh", "stride_mb", "stride_mh", "stride_kb", "stride_kh", "stride_vb",
        "stride_vh",
    ]
)  # fmt: skip
def _split(
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, seqlens_ptr, split_out_ptr, split_lse_ptr,
    stride_qb, stride_qh, stride_nb, stride_nh, stride_mb, stride_mh,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_vb, stride_vh, stride_vn: tl.constexpr,
    scale_log2, cap_scale,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr,
):  # fmt: skip
    """One split of one sequence's keys, for the query heads that share them. The first also has the new key.

    cap_scale is None where logits are not capped. WINDOW is how many keys are seen, the new one among them; 0 for all.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(seqlens_ptr + sequence)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(length + 1 - WINDOW, 0)
    keys_each = tl.cdiv(tl.cdiv(length - start, KEYS), SPLITS) * KEYS
    low = start + split * keys_each
    high = tl.minimum(length, low + keys_each)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    v_dim = tl.arange(0, BLOCK_V_DIM)
    key = tl.arange(0, KEYS)
    in_dim = (dim < DIM)[None, :]
    in_v_dim = (v_dim < V_DIM)[None, :]
    row_ok = row < GROUP
    head = kv_head * GROUP + row
    q = tl.load(
        q_ptr + sequence * stride_qb + head[:, None] * stride_qh + dim[None, :], mask=row_ok[:, None] & in_dim, other=0.0
    )
    k_ptr += sequence * stride_kb + kv_head * stride_kh
    v_ptr += sequence * stride_vb + kv_head * stride_vh
    acc = tl.zeros([ROWS, BLOCK_V_DIM], tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    for first in range(low, high, KEYS):
        keys = (first + key)[:, None].to(tl.int64)
        ok = keys < high
        k = tl.load(k_ptr + keys * stride_kn + dim[None, :], mask=ok & in_dim, other=0.0)
        v = tl.load(v_ptr + keys * stride_vn + v_dim[None, :], mask=ok & in_v_dim, other=0.0)
        s = tl.where((first + key < high)[None, :], soft_capped(tl.dot(q, k.T), cap_scale), -float("inf"))
        acc, row_sum, row_max = softmax_step(s, v, scale_log2, acc, row_sum, row_max)
    if split == 0:
        new_k = tl.load(new_k_ptr + sequence * stride_nb + kv_head * stride_nh + dim, mask=dim < DIM, other=0.0)
        new_v = tl.load(new_v_ptr + sequence * stride_mb + kv_head * stride_mh + v_dim, mask=v_dim < V_DIM, other=0.0)
        place = length.to(tl.int64)
        tl.store(k_ptr + place * stride_kn + dim, new_k, mask=dim < DIM)
        tl.store(v_ptr + place * stride_vn + v_dim, new_v, mask=v_dim < V_DIM)
        s_new = soft_capped(tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1), cap_scale) * scale_log2
        new_max = tl.maximum(row_max, s_new)
        p = tl.exp2(s_new - new_max)
        acc_scale = tl.exp2(row_max - new_max)
        acc = acc * acc_scale[:, None] + p[:, None] * new_v.to(tl.float32)[None, :]
        row_sum = row_sum * acc_scale + p
        row_max = new_max

    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    slot = (sequence * HEADS + head) * SPLITS + split
    tl.store(split_out_ptr + slot[:, None] * V_DIM + v_dim[None, :], acc, mask=row_ok[:, None] & in_v_dim)
    tl.store(split_lse_ptr + slot, row_max + tl.log2(row_sum), mask=row_ok)


@triton.jit
def _combine(
    split_out_ptr, split_lse_ptr, out_ptr, lse_ptr,
    SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr,
):  # fmt: skip
    """The output of one head of one sequence; lse_ptr is None where the log-sum-exp is not wanted."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_SPLITS)
    v_dim = tl.arange(0, BLOCK_V_DIM)
    slot = row * SPLITS + split
    lse = tl.load(split_lse_ptr + slot, mask=split < SPLITS, other=-float("inf"))
    # The first split has the new key, so one is finite.
    row_max = tl.max(lse, 0)
    weight = tl.exp2(lse - row_max)
    inside = (split < SPLITS)[:, None] & (v_dim < V_DIM)[None, :]
    split_out = tl.load(split_out_ptr + slot[:, None] * V_DIM + v_dim[None, :], mask=inside, other=0.0)
    out = tl.sum(split_out * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + row * V_DIM + v_dim, out.to(out_ptr.dtype.element_ty), mask=v_dim < V_DIM)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, log_sum_exp(row_max, tl.sum(weight, 0)))


def splits_for(sequences: int, kv_heads: int, capacity: int, device_programs: int) -> int:
    """Into how many parts the keys of each sequence are split."""
    full = capacity // (KEYS * FEWEST_TILES)
    return max(1, min(full, device_programs // (sequences * kv_heads), MOST_SPLITS))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """As ``tmbench_kernels.decode.attend_with_kvcache``, without sinks; fills ``lse`` ``[batch, heads, 1]`` where given.

    The last dimension of all tensors must be contiguous.
    """
    q, scale = positive(q, scale)
    scale_log2, cap_scale = logit_scales(scale, softcap)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, _, dim = q.shape
    kv_heads, v_dim = k.shape[1], v.shape[3]
    seen = min(window or k_cache.shape[2], k_cache.shape[2])
    splits = splits_for(batch, kv_heads, seen, PROGRAMS * multiprocessors(q.device))
    split_out = q.new_empty(batch, heads, splits, v_dim, dtype=torch.float32)
    split_lse = q.new_empty(batch, heads, splits, dtype=torch.float32)
    out = q.new_empty(batch, 1, heads, v_dim)
    group, widest = heads // kv_heads, max(dim, v_dim)
    _split[(splits, kv_heads, batch)](
        q, k, v, k_cache, v_cache, cache_seqlens, split_out, split_lse,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        scale_log2, cap_scale,
        WINDOW=window, SPLITS=splits, HEADS=heads, GROUP=group, ROWS=block_dim(group), KEYS=KEYS,
        DIM=dim, V_DIM=v_dim, BLOCK_DIM=block_dim(dim), BLOCK_V_DIM=block_dim(v_dim),
        num_warps=1 if widest <= 256 else 4, num_stages=6 if widest <= 128 else 4 if widest <= 256 else 2,
    )  # fmt: skip
    _combine[(batch * heads,)](
        split_out, split_lse, out, lse,
        SPLITS=splits, BLOCK_SPLITS=triton.next_power_of_2(splits), V_DIM=v_dim, BLOCK_V_DIM=block_dim(v_dim), num_warps=4,
    )  # fmt: skip
    return out
