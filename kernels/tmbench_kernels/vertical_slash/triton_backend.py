"""Vertical-slash attention in Triton: runs of keys that lie anywhere, and gathered columns, for every block of queries.

An index says where the runs start and which columns lie between them. The columns' keys and values are laid side by side.
``_walk`` attends: over the runs' keys where they lie, and over the gathered columns with a mask of those that count.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tmbench_kernels.launch import block_dim, empty_rows, loadable, logit_scales, positive
from tmbench_kernels.online_softmax import attend_tile, log_sum_exp, soft_capped, softmax_step
from tmbench_kernels.pattern import empty_output
from tmbench_kernels.vertical_slash.runs import BLOCK
from tmbench_kernels.vertical_slash.triton_index import Index

COLUMNS = 32
"""Columns whose keys and values one program copies: ``BLOCK`` is a multiple."""


@triton.jit(do_not_specialize=["length", "first_query", "rows", "most", "width", "stride_qb"])
def _walk(
    q_ptr, out_ptr, lse_ptr, k_tiles, v_tiles, k_columns, v_columns, starts_ptr, counts_ptr, columns_ptr, kept_ptr,
    before_ptr, reach_ptr, sinks_ptr, stride_qb, stride_qh, stride_qn, stride_qd, length, first_query, rows, most, width,
    scale_log2, cap_scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: a block of 64 queries over its runs, then over its columns. The last queries see most and come first.

    lse_ptr is None where the log-sum-exp is not wanted, cap_scale where logits are not capped: then neither is compiled.
    """
    row = rows - 1 - tl.program_id(1)
    both = tl.program_id(0)
    head = both % HEADS
    batch = both // HEADS
    start = (first_query // BLOCK + row) * BLOCK
    slot = both.to(tl.int64) * rows + row

    position = start + tl.arange(0, BLOCK)
    row_ok = (position >= first_query) & (position < length)
    dim = tl.arange(0, BLOCK_DIM)
    v_dim = tl.arange(0, BLOCK_V_DIM)
    # Rows of q and of the outputs are counted from the first query on: their bases move, so that rows are positions.
    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh - first_query.to(tl.int64) * stride_qn
    q_rows = q_ptr + position.to(tl.int64) * stride_qn
    q = tl.load(q_rows[:, None] + dim[None, :] * stride_qd, mask=row_ok[:, None] & (dim < DIM)[None, :], other=0.0)

    acc = tl.zeros([BLOCK, BLOCK_V_DIM], tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    row_max = tl.full([BLOCK], -float("inf"), tl.float32)
    starts = starts_ptr + slot * most
    reach = tl.load(reach_ptr + head)
    sinks = tl.load(sinks_ptr + head)
    pieces: tl.constexpr = BLOCK // KEYS
    for t in range(tl.load(counts_ptr + slot) * pieces):
        first = tl.load(starts + t // pieces) + t % pieces * KEYS
        k = k_tiles.load([batch, head // GROUPS, first, 0]).reshape(KEYS, BLOCK_DIM)
        v = v_tiles.load([batch, head // GROUPS, first, 0]).reshape(KEYS, BLOCK_V_DIM)
        masked = (first + KEYS - 1 > start) | (first < start + BLOCK - reach)
        acc, row_sum, row_max = attend_tile(
            q, k, v, first, length, masked, position, reach, sinks, scale_log2, cap_scale, acc, row_sum, row_max, KEYS
        )
    columns = columns_ptr + both.to(tl.int64) * width
    kept = kept_ptr + slot * width
    for t in range(tl.cdiv(tl.load(before_ptr + slot), KEYS)):
        place = t * KEYS + tl.arange(0, KEYS)
        counted = tl.load(kept + place, mask=place < width, other=0)
        if tl.max(counted.to(tl.int32), 0) > 0:
            column = tl.load(columns + place, mask=place < width, other=length)
            k = k_columns.load([batch, head, t * KEYS, 0]).reshape(KEYS, BLOCK_DIM)
            v = v_columns.load([batch, head, t * KEYS, 0]).reshape(KEYS, BLOCK_V_DIM)
            seen = (counted > 0)[None, :] & (column[None, :] <= position[:, None])
            s = tl.where(seen, soft_capped(tl.dot(q, k.T), cap_scale), -float("inf"))
            acc, row_sum, row_max = softmax_step(s, v, scale_log2, acc, row_sum, row_max)

    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    queries = length - first_query
    place = (batch.to(tl.int64) * queries - first_query + position) * HEADS + head
    tl.store(
        out_ptr + place[:, None] * V_DIM + v_dim[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (v_dim < V_DIM)[None, :],
    )  # fmt: skip
    if lse_ptr is not None:
        tl.store(lse_ptr + both.to(tl.int64) * queries - first_query + position, log_sum_exp(row_max, row_sum), mask=row_ok)


@triton.jit(do_not_specialize=["length", "width", "stride_kb", "stride_vb"])
def _gather(
    k_ptr, v_ptr, columns_ptr, k_out_ptr, v_out_ptr, length, width,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    ROW: tl.constexpr, V_ROW: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of one head: their keys and their values."""
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    both = tl.program_id(1)
    batch = (both // HEADS).to(tl.int64)
    key_head = (both % HEADS // GROUPS).to(tl.int64)
    out = both.to(tl.int64) * width + place
    # What follows the last column holds the length, and no kernel counts it.
    column = tl.minimum(tl.load(columns_ptr + out), length - 1).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    k = k_ptr + batch * stride_kb + key_head * stride_kh + column[:, None] * stride_kn + dim * stride_kd
    tl.store(k_out_ptr + out[:, None] * ROW + dim, tl.load(k, mask=dim < DIM), mask=dim < DIM)
    dim = tl.arange(0, BLOCK_V_DIM)[None, :]
    v = v_ptr + batch * stride_vb + key_head * stride_vh + column[:, None] * stride_vn + dim * stride_vd
    tl.store(v_out_ptr + out[:, None] * V_ROW + dim, tl.load(v, mask=dim < V_DIM), mask=dim < V_DIM)


def gathered(k: Tensor, v: Tensor, index: Index) -> tuple[Tensor, Tensor]:
    """Keys and values of the selected columns, ``[batch, heads, width, dim]``, as the memory accelerator can load them.

    Each query head has columns of its own.
    """
    batch, heads, width = index.columns.shape
    k_out, v_out = (empty_rows(x, batch, heads, width) for x in (k, v))
    dim, v_dim = k.shape[3], v.shape[3]
    _gather[(width // COLUMNS, batch * heads)](
        k, v, index.columns, k_out, v_out, k.shape[2], width, *k.stride(), *v.stride(),
        HEADS=heads, GROUPS=heads // k.shape[1], DIM=dim, V_DIM=v_dim, ROW=k_out.stride(2), V_ROW=v_out.stride(2),
        BLOCK_DIM=block_dim(dim), BLOCK_V_DIM=block_dim(v_dim), COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return k_out, v_out


def attend_index(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Index,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention over an index, ``[batch, heads, queries, v_dim]``, a view of ``[batch, queries, heads, v_dim]``."""
    q, scale = positive(q, scale)
    scale_log2, cap_scale = logit_scales(scale, softcap)
    batch, heads, queries, dim = q.shape
    length, v_dim, groups = k.shape[2], v.shape[3], heads // k.shape[1]
    rows, width = index.counts.shape[2], index.columns.shape[2]
    k_columns, v_columns = gathered(k, v, index)
    k, v = loadable(k), loadable(v)
    widest = max(dim, v_dim)
    keys = 32 if widest > 128 else BLOCK
    block, v_block = block_dim(dim), block_dim(v_dim)
    out = empty_output(q, v)

    def tiles(x: Tensor, wide: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, keys, wide])

    _walk[(batch * heads, rows)](
        q, out, lse, tiles(k, block), tiles(v, v_block), tiles(k_columns, block), tiles(v_columns, v_block),
        index.starts, index.counts, index.columns, index.kept, index.before, index.reach, index.sinks, *q.stride(),
        length, length - queries, rows, index.starts.shape[3], width, scale_log2, cap_scale,
        HEADS=heads, GROUPS=groups, DIM=dim, V_DIM=v_dim, BLOCK_DIM=block, BLOCK_V_DIM=v_block, BLOCK=BLOCK, KEYS=keys,
        num_warps=8 if widest > 256 else 4, num_stages=2,
    )  # fmt: skip
    return out
