"""What PBS-Attn moves beside its attention, in Triton: keys and values into their order, and two softmaxes into one.

Each reads what it needs once and writes its result once; torch takes a pass over all heads' tensors for every step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tmbench_kernels.launch import block_dim

ROWS = 64
"""Tokens of a program."""


@triton.jit(do_not_specialize=["whole", "length"])
def _sort(
    x_ptr, order_ptr, out_ptr, stride_xb, stride_xh, stride_xn, stride_xd, stride_ob, stride_oh, stride_on, whole, length,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one query head. The heads that share keys run side by side, so that these come from the cache."""
    head = tl.program_id(0) % HEADS
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    inside = (row < length)[:, None] & (dim < DIM)[None, :]
    place = tl.load(order_ptr + (batch * HEADS + head) * whole + row, mask=row < whole, other=0)
    place = tl.where(row < whole, place, row.to(tl.int64))
    x_ptr += batch * stride_xb + (head // GROUPS).to(tl.int64) * stride_xh
    x = tl.load(x_ptr + place[:, None] * stride_xn + dim[None, :] * stride_xd, mask=inside, other=0.0)
    out_ptr += batch * stride_ob + head.to(tl.int64) * stride_oh
    tl.store(out_ptr + row.to(tl.int64)[:, None] * stride_on + dim[None, :], x, mask=inside)


def sorted_tokens(x: Tensor, order: Tensor, out: Tensor) -> None:
    """``pbs.sorted_tokens``, into ``out``, its rows contiguous, as ``order`` is altogether."""
    batch, heads, length, dim = out.shape
    _sort[(batch * heads, triton.cdiv(length, ROWS))](
        x, order, out, *x.stride(), *out.stride()[:3], order.shape[2], length,
        HEADS=heads, GROUPS=heads // x.shape[1], DIM=dim, BLOCK_DIM=block_dim(dim), ROWS=ROWS, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["queries"])
def _merge(
    out_ptr, lse_ptr, others_ptr, others_lse_ptr, stride_ob, stride_oh, stride_on, stride_tb, stride_th, stride_tn, queries,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head."""
    head = tl.program_id(0) % HEADS
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    sums = (batch * HEADS + head) * queries + row
    own = tl.load(lse_ptr + sums, mask=row < queries, other=0.0)
    theirs = tl.load(others_lse_ptr + sums, mask=row < queries, other=0.0)
    # A query sees itself at least, so its own sum is finite; that of the others is -inf where there are none.
    share = 1.0 / (1.0 + tl.exp(own - theirs))
    inside = (row < queries)[:, None] & (dim < DIM)[None, :]
    out_ptr += batch * stride_ob + head.to(tl.int64) * stride_oh
    out_ptr += row.to(tl.int64)[:, None] * stride_on + dim[None, :]
    others_ptr += batch * stride_tb + head.to(tl.int64) * stride_th
    others_ptr += row.to(tl.int64)[:, None] * stride_tn + dim[None, :]
    out = tl.load(out_ptr, mask=inside, other=0.0).to(tl.float32)
    others = tl.load(others_ptr, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr, (out + (others - out) * share[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    high = tl.maximum(own, theirs)
    both = high + tl.log(tl.exp(own - high) + tl.exp(theirs - high))
    tl.store(lse_ptr + sums, both, mask=row < queries)


def merge(out: Tensor, lse: Tensor, others: Tensor, others_lse: Tensor) -> None:
    """``pbs.merge``; rows of both outputs are contiguous, and both log-sum-exps altogether."""
    batch, heads, queries, dim = out.shape
    _merge[(batch * heads, triton.cdiv(queries, ROWS))](
        out, lse, others, others_lse, *out.stride()[:3], *others.stride()[:3], queries,
        HEADS=heads, DIM=dim, BLOCK_DIM=block_dim(dim), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
