"""Dense attention of every delta-th query in Triton, one launch over rows that lie apart in q, and the differences carried.

Every program owns a tile of such rows, of all the query heads that share a key head, and walks over the keys up to the last
of them. A tile's rows lie far apart, so that its edge is several tiles of keys wide, which carry a mask. The tiles that see
most come first. Long prompts' keys are split, so that no program takes longer than a multiprocessor has work altogether, and
the splits are combined in a second, small launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tmbench_kernels.launch import block_dim, loadable, logit_scales, multiprocessors, positive
from tmbench_kernels.online_softmax import attend_tile, log_sum_exp
from tmbench_kernels.pattern import empty_output
from tmbench_kernels.triangle import splits as splitting
from tmbench_kernels.triangle.combine import combine
from tmbench_kernels.triangle.delta import Rows
from tmbench_kernels.triangle.splits import heads_per_tile

MOST_SPLITS = 16


@triton.jit(
    do_not_specialize=[
        "first",
        "delta",
        "count",
        "first_query",
        "length",
        "row_tiles",
        "split_keys",
        "splits",
        "batches",
        "stride_qb",
    ]
)
def _rows(
    q_ptr, out_ptr, lse_ptr, split_out_ptr, split_lse_ptr, k_tiles, v_tiles, stride_qb, stride_qh, stride_qn, stride_qd,
    first, delta, count, first_query, length, row_tiles, split_keys, splits, batches, scale_log2, cap_scale,
    HEADS_TOTAL: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr, POSITIONS: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: POSITIONS rows of HEADS heads over the keys up to the last of them, or over a split of these."""
    program = tl.program_id(0)
    head_tiles: tl.constexpr = HEADS_TOTAL // HEADS
    first_head = program % head_tiles * HEADS
    program = program // head_tiles
    batch = (program % batches).to(tl.int64)
    program = program // batches
    split = program % splits
    first_row = (row_tiles - 1 - program // splits) * POSITIONS
    kv_head = first_head // (HEADS_TOTAL // KV_HEADS)

    lane = tl.arange(0, ROWS)
    row = first_row + lane // HEADS
    head = first_head + lane % HEADS
    ok = (lane < POSITIONS * HEADS) & (row < count)
    # The first query of a chunk stands for a row that is gone.
    position = tl.maximum(first + row * delta, first_query)
    dim = tl.arange(0, BLOCK_DIM)
    v_dim = tl.arange(0, BLOCK_V_DIM)
    q_rows = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    q_rows += (position - first_query).to(tl.int64) * stride_qn
    q = tl.load(q_rows[:, None] + dim[None, :] * stride_qd, mask=ok[:, None] & (dim < DIM)[None, :], other=0.0)

    low = split * split_keys
    high = tl.maximum(first + (tl.minimum(first_row + POSITIONS, count) - 1) * delta, first_query) + 1
    high = tl.minimum(high, low + split_keys)
    whole = (tl.maximum(first + first_row * delta, first_query) + 1) // KEYS
    acc = tl.zeros([ROWS, BLOCK_V_DIM], tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    for t in range(low // KEYS, tl.cdiv(high, KEYS)):
        k = k_tiles.load([batch.to(tl.int32), kv_head, t * KEYS, 0]).reshape(KEYS, BLOCK_DIM)
        v = v_tiles.load([batch.to(tl.int32), kv_head, t * KEYS, 0]).reshape(KEYS, BLOCK_V_DIM)
        acc, row_sum, row_max = attend_tile(
            q, k, v, t * KEYS, high, t >= whole, position, length, 0, scale_log2, cap_scale, acc, row_sum, row_max, KEYS
        )

    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    inside = ok[:, None] & (v_dim < V_DIM)[None, :]
    if splits > 1:
        slot = ((split * batches + batch) * count + row) * HEADS_TOTAL + head
        tl.store(split_out_ptr + slot[:, None] * V_DIM + v_dim[None, :], acc, mask=inside)
        tl.store(split_lse_ptr + slot, row_max + tl.log2(row_sum), mask=ok)
    else:
        slot = (batch * count + row) * HEADS_TOTAL + head
        tl.store(out_ptr + slot[:, None] * V_DIM + v_dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
        if lse_ptr is not None:
            tl.store(lse_ptr + (batch * HEADS_TOTAL + head) * count + row, log_sum_exp(row_max, row_sum), mask=ok)


def attend_rows(
    rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, *, softcap: float = 0.0, lse: Tensor | None = None
) -> Tensor:
    """Dense attention of the rows, ``[batch, heads, rows.count, v_dim]``; fills ``lse`` where it is given."""
    q, scale = positive(q, scale)
    scale_log2, cap_scale = logit_scales(scale, softcap)
    k, v = loadable(k), loadable(v)
    batch, heads, _, dim = q.shape
    v_dim = v.shape[3]
    wide = max(dim, v_dim) > 128
    tile_rows, keys = (64, 32) if wide else (128, 64)
    tile_heads = heads_per_tile(heads // k.shape[1])
    positions = tile_rows // tile_heads
    row_tiles = -(-rows.count // positions)
    out = empty_output(q[:, :, : rows.count], v)
    steps, tiles = -(-k.shape[2] // keys), row_tiles * (heads // tile_heads) * batch
    # A tile walks over half of the keys on average.
    fair = max(tiles * steps // 2 // (4 * multiprocessors(q.device)), 4)
    splits = 1 if k.shape[2] <= splitting.ONE_LAUNCH else min(-(-steps // fair), MOST_SPLITS)
    split_keys = -(-steps // splits) * keys
    split_out = split_lse = out
    if splits > 1:
        split_lse = out.new_empty(splits, batch, rows.count, heads, dtype=torch.float32)
        split_out = split_lse.new_empty(*split_lse.shape, v_dim)
    block, v_block = block_dim(dim), block_dim(v_dim)
    k_tiles = TensorDescriptor(k, list(k.shape), list(k.stride()), [1, 1, keys, block])
    v_tiles = TensorDescriptor(v, list(v.shape), list(v.stride()), [1, 1, keys, v_block])
    options = {} if wide or q.device.type != "cuda" else {"maxnreg": 128}
    _rows[(tiles * splits,)](
        q, out, lse, split_out, split_lse, k_tiles, v_tiles, *q.stride(),
        rows.first, rows.delta, rows.count, rows.start, k.shape[2], row_tiles, split_keys, splits, batch,
        scale_log2, cap_scale,
        HEADS_TOTAL=heads, KV_HEADS=k.shape[1], HEADS=tile_heads, POSITIONS=positions,
        DIM=dim, V_DIM=v_dim, BLOCK_DIM=block, BLOCK_V_DIM=v_block, ROWS=tile_rows, KEYS=keys,
        num_warps=8, num_stages=2, **options,
    )  # fmt: skip
    if splits > 1:
        combine(split_out, split_lse, out, lse)
    return out


@triton.jit(do_not_specialize=["first", "delta", "start", "end"])
def _carry(
    out_ptr, differences_ptr, out_batch, out_head, out_row, by_batch, by_head, by_row, first, delta, start, end,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: one head's rows from a dense one up to the next."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    row = tl.program_id(0) // HEADS
    batch = tl.program_id(1).to(tl.int64)
    low = tl.maximum(first + row * delta, start)
    high = tl.minimum(first + (row + 1) * delta, end)
    v_dim = tl.arange(0, BLOCK_V_DIM)
    differences = differences_ptr + batch * by_batch + head * by_head + row.to(tl.int64) * by_row
    difference = tl.load(differences + v_dim, mask=v_dim < V_DIM, other=0.0)
    for position in range(low, high, ROWS):
        here = position + tl.arange(0, ROWS)
        inside = (here < high)[:, None] & (v_dim < V_DIM)[None, :]
        at = out_ptr + batch * out_batch + head * out_head + (here - start).to(tl.int64)[:, None] * out_row + v_dim[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32) + difference[None, :]
        tl.store(at, x.to(out_ptr.dtype.element_ty), mask=inside)


def carry(out: Tensor, differences: Tensor, rows: Rows) -> None:
    """Add to each row of ``out`` the difference, in float32, of the last dense row up to it.

    Both are ``[batch, heads, queries or rows.count, v_dim]`` with stride 1 in the last; out begins with the first query.
    """
    batch, heads, queries, v_dim = out.shape
    _carry[(rows.count * heads, batch)](
        out, differences, *out.stride()[:3], *differences.stride()[:3], rows.first, rows.delta, rows.start,
        rows.start + queries, HEADS=heads, V_DIM=v_dim, BLOCK_V_DIM=block_dim(v_dim), ROWS=64,
    )  # fmt: skip
