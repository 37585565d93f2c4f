"""FlashPrefill's weights in Triton: what a block of queries gives to the mean key of every block."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tmbench_kernels.block_sparse.lists import BLOCK, block_count
from tmbench_kernels.launch import LOG2_E, block_dim


@triton.jit(do_not_specialize=["length", "start", "rows", "blocks", "stride_qb"])
def _mean_weights(
    q_ptr, means_ptr, out_ptr, stride_qb, stride_qh, stride_qn, stride_qd, length, start, rows, blocks, scale_log2, log_2,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head, over all blocks of keys up to its own."""
    row = blocks - 1 - tl.program_id(1)
    both = tl.program_id(0)
    head = both % HEADS
    batch = both // HEADS
    position = row * BLOCK + tl.arange(0, BLOCK)
    row_ok = (position >= start) & (position < length)
    # What is no query sees nothing.
    reach = tl.where(row_ok, position, -1)
    dim = tl.arange(0, BLOCK_DIM)
    dim_ok = dim < DIM
    # Rows of q are counted from the first query on: its base moves, so that rows are positions.
    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh - start.to(tl.int64) * stride_qn
    q_rows = q_ptr + position.to(tl.int64) * stride_qn
    q = tl.load(q_rows[:, None] + dim[None, :] * stride_qd, mask=row_ok[:, None] & dim_ok[None, :], other=0.0)
    means = means_ptr + (batch * (HEADS // GROUPS) + head // GROUPS).to(tl.int64) * blocks * DIM
    out = out_ptr + (both.to(tl.int64) * rows + row - (blocks - rows)) * blocks
    for first in range(0, blocks, MEANS):
        column = first + tl.arange(0, MEANS)
        row_max = tl.full([MEANS], -float("inf"), tl.float32)
        row_sum = tl.zeros([MEANS], tl.float32)
        if first <= row:
            places = column.to(tl.int64)[:, None] * DIM + dim[None, :]
            mean = tl.load(means + places, mask=(column < blocks)[:, None] & dim_ok[None, :], other=0.0)
            # Means by queries: a row is then summed within one warp, not across all of them.
            s = tl.dot(mean, q.T) * scale_log2
            # Those count that see all of a key block: of its own queries the last alone.
            sees = reach[None, :] >= (column * BLOCK + BLOCK - 1)[:, None]
            s = tl.where(sees, s, -float("inf"))
            row_max = tl.max(s, 1)
            row_sum = tl.sum(tl.exp2(s - tl.where(row_max == -float("inf"), 0.0, row_max)[:, None]), 1)
        # Where nothing counts the row_max of -inf decides; elsewhere the row_sum is 1 or more.
        tl.store(out + column, (row_max + tl.log2(tl.maximum(row_sum, 1.0))) * log_2, mask=column < blocks)


def mean_weights(q: Tensor, means: Tensor, scale: float, start: int = 0) -> Tensor:
    """Logarithm of what each block of queries gives to each mean key, float32 ``[batch, heads, q_blocks, blocks]``.

    q ``[batch, heads, queries, dim]``, from position ``start`` on, and means ``[batch, kv_heads, blocks, dim]`` are of one
    16-bit type. A sum over the queries that see the whole key block; -inf where there are none.
    """
    batch, heads, queries, dim = q.shape
    length = start + queries
    blocks = block_count(length)
    rows = blocks - start // BLOCK
    means = means.contiguous()
    out = torch.empty(batch, heads, rows, blocks, dtype=torch.float32, device=q.device)
    _mean_weights[(batch * heads, rows)](
        q, means, out, *q.stride(), length, start, rows, blocks, scale * LOG2_E, math.log(2),
        HEADS=heads, GROUPS=heads // means.shape[1], DIM=dim, BLOCK_DIM=block_dim(dim), BLOCK=BLOCK,
        MEANS=128 if dim <= 256 else 64, num_warps=8,
    )  # fmt: skip
    return out
