"""Triangle attention in Triton: one launch for sinks, window and last rows, and one softmax over all of them.

Every program owns a tile of query rows and walks over tiles of keys. Two kinds of program share that walk:

- a band program owns consecutive positions of all the query heads that share a key head, so that a tile of keys, fetched
  once, serves all of its rows, and few keys beyond the rows' windows are computed;
- a last-row program owns the same kind of tile among the last queries, and a split of the keys before them. The splits are
  combined by their log-sum-exp in a second, small launch, which short prompts do without.

Tiles that all rows see in full are computed without a mask; the diagonal, the window's far edge and the sinks carry one.
Lengths and the sizes of the pattern are run-time numbers: nothing is compiled or tuned again for a new prompt.
docs/triangle-kernel.md has the reasons and the measurements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tmbench_kernels.dense.few_queries import as_last_rows, many
from tmbench_kernels.launch import block_dim, loadable, logit_scales, multiprocessors, positive
from tmbench_kernels.online_softmax import attend_tile, log_sum_exp
from tmbench_kernels.pattern import empty_output
from tmbench_kernels.triangle import Triangle
from tmbench_kernels.triangle.combine import combine
from tmbench_kernels.triangle.splits import heads_per_tile, new_splits, schedule_for

if TYPE_CHECKING:
    from tmbench_kernels.dense import Dense

FEW_SINKS = 16
"""Up to so many first keys make one small tile of their own."""


@triton.jit(
    do_not_specialize=[
        "length", "first_query", "tail", "n_init", "n_local", "split_keys", "splits", "last_tiles", "batches",
        "stride_qb", "stride_kb", "stride_vb",
    ]
)  # fmt: skip
def _walk(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, split_out_ptr, split_lse_ptr, k_tiles, v_tiles,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    length, first_query, tail, n_init, n_local, split_keys, splits, last_tiles, batches,
    scale_log2, cap_scale,
    HEADS_TOTAL: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr, POSITIONS: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """One program: ROWS query rows over their keys. SMALL is the size of the sinks' own tile, or 0 for whole tiles.

    lse_ptr is None where the log-sum-exp is not wanted, cap_scale where logits are not capped: then neither is compiled.
    """
    program = tl.program_id(0)
    head_tiles: tl.constexpr = HEADS_TOTAL // HEADS
    last_programs = last_tiles * splits * head_tiles * batches
    # The last rows come first: they take longest. Heads vary fastest: neighbours read neighbouring keys from the L2 cache.
    is_last = program < last_programs
    if not is_last:
        program -= last_programs
    head_tile = program % head_tiles
    program = program // head_tiles
    batch = (program % batches).to(tl.int64)
    program = program // batches
    first_head = head_tile * HEADS
    kv_head = first_head // (HEADS_TOTAL // KV_HEADS)

    split = 0
    if is_last:
        split = program // last_tiles
        start = tail + program % last_tiles * POSITIONS
        rows_end = length
        low = split * split_keys
        high = tl.minimum(tl.minimum(start + POSITIONS, length), low + split_keys)
        reach = length
        sinks = 0
    else:
        start = first_query + program * POSITIONS
        rows_end = tail
        low = tl.maximum(start - n_local + 1, 0)
        high = tl.minimum(start + POSITIONS, length)
        reach = n_local
        sinks = tl.minimum(n_init, low)
    low = tl.minimum(low, high)
    # Whole tiles end at the diagonal and reach down to the last key that all rows see.
    whole = (high - tl.minimum(tl.maximum(start + POSITIONS - reach, low), high)) // KEYS
    edge_end = high - whole * KEYS
    edge_tiles = tl.cdiv(edge_end - low, KEYS)
    tiles = whole + edge_tiles

    row = tl.arange(0, ROWS)
    position = start + row // HEADS
    head = first_head + row % HEADS
    row_ok = (row < POSITIONS * HEADS) & (position < rows_end)
    dim = tl.arange(0, BLOCK_DIM)
    v_dim = tl.arange(0, BLOCK_V_DIM)
    # Rows of q and of the outputs are counted from the first query on: their bases move, so that rows are positions.
    q_ptr += batch * stride_qb - first_query.to(tl.int64) * stride_qn
    q_rows = q_ptr + head.to(tl.int64) * stride_qh + position.to(tl.int64) * stride_qn
    q = tl.load(q_rows[:, None] + dim[None, :] * stride_qd, mask=row_ok[:, None] & (dim < DIM)[None, :], other=0.0)

    acc = tl.zeros([ROWS, BLOCK_V_DIM], tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    if SMALL > 0:
        if sinks > 0:
            sink = tl.arange(0, SMALL)
            ok = (sink < sinks)[:, None]
            k_rows = k_ptr + batch * stride_kb + kv_head.to(tl.int64) * stride_kh + sink.to(tl.int64) * stride_kn
            v_rows = v_ptr + batch * stride_vb + kv_head.to(tl.int64) * stride_vh + sink.to(tl.int64) * stride_vn
            k = tl.load(k_rows[:, None] + dim[None, :] * stride_kd, mask=ok & (dim < DIM)[None, :], other=0.0)
            v = tl.load(v_rows[:, None] + v_dim[None, :] * stride_vd, mask=ok & (v_dim < V_DIM)[None, :], other=0.0)
            acc, row_sum, row_max = attend_tile(
                q, k, v, 0, sinks, True, position, reach, n_init, scale_log2, cap_scale, acc, row_sum, row_max, SMALL
            )
    else:
        tiles += tl.cdiv(sinks, KEYS)
    for t in range(tiles):
        if t < whole:
            first = high - (t + 1) * KEYS
            limit = high
        elif t < whole + edge_tiles:
            first = low + (t - whole) * KEYS
            limit = edge_end
        else:
            first = (t - whole - edge_tiles) * KEYS
            limit = sinks
        masked = (t >= whole) | (first + KEYS - 1 > start)
        k = k_tiles.load([batch.to(tl.int32), kv_head, first, 0]).reshape(KEYS, BLOCK_DIM)
        v = v_tiles.load([batch.to(tl.int32), kv_head, first, 0]).reshape(KEYS, BLOCK_V_DIM)
        acc, row_sum, row_max = attend_tile(
            q, k, v, first, limit, masked, position, reach, n_init, scale_log2, cap_scale, acc, row_sum, row_max, KEYS
        )

    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    inside = row_ok[:, None] & (v_dim < V_DIM)[None, :]
    if is_last and splits > 1:
        slot = ((split * batches + batch) * (length - tail) + (position - tail)) * HEADS_TOTAL + head
        tl.store(split_out_ptr + slot[:, None] * V_DIM + v_dim[None, :], acc, mask=inside)
        tl.store(split_lse_ptr + slot, row_max + tl.log2(row_sum), mask=row_ok)
    else:
        queries = length - first_query
        slot = (batch * queries - first_query + position) * HEADS_TOTAL + head
        tl.store(out_ptr + slot[:, None] * V_DIM + v_dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
        if lse_ptr is not None:
            place = (batch * HEADS_TOTAL + head) * queries - first_query + position
            tl.store(lse_ptr + place, log_sum_exp(row_max, row_sum), mask=row_ok)


def attend_dense(pattern: Dense, q: Tensor, k: Tensor, v: Tensor, scale: float, **asked: Any) -> Tensor:
    """Dense attention: a triangle whose window is as long as the prompt, or whose last rows are all that there are."""
    rows = Triangle(0, k.shape[2], 0) if many(q, k) else as_last_rows(q)
    return attend(rows, q, k, v, scale, **asked)


def attend(
    pattern: Triangle,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Triangle attention ``[batch, heads, queries, v_dim]``, as a view of ``[batch, queries, heads, v_dim]``."""
    q, scale = positive(q, scale)
    scale_log2, cap_scale = logit_scales(scale, softcap)
    k, v = loadable(k), loadable(v)
    batch, heads, queries, dim = q.shape
    length, v_dim = k.shape[2], v.shape[3]
    wide = max(dim, v_dim) > 128
    rows, keys = (64, 32) if wide else (128, 64)
    positions = rows // heads_per_tile(heads // k.shape[1])
    schedule = schedule_for(
        pattern, batch, heads, k.shape[1], length, positions=positions, keys=keys, overhead=3,
        slots=4 * multiprocessors(q.device), queries=queries,
    )  # fmt: skip
    out = empty_output(q, v)
    split_out, split_lse = new_splits(schedule, out)
    block, v_block = block_dim(dim), block_dim(v_dim)
    k_tiles = TensorDescriptor(k, list(k.shape), list(k.stride()), [1, 1, keys, block])
    v_tiles = TensorDescriptor(v, list(v.shape), list(v.stride()), [1, 1, keys, v_block])
    # Two programs of 8 warps share a multiprocessor if none takes more than half of its registers.
    options = {} if wide or q.device.type != "cuda" else {"maxnreg": 128}
    _walk[((schedule.band_tiles + schedule.last_tiles * schedule.splits) * schedule.head_tiles * batch,)](
        q, k, v, out, lse, split_out, split_lse, k_tiles, v_tiles, *q.stride(), *k.stride(), *v.stride(),
        length, length - queries, schedule.tail, pattern.n_init, pattern.n_local, schedule.split_keys, schedule.splits,
        schedule.last_tiles, batch, scale_log2, cap_scale,
        HEADS_TOTAL=heads, KV_HEADS=k.shape[1], HEADS=schedule.tile_heads, POSITIONS=positions,
        DIM=dim, V_DIM=v_dim, BLOCK_DIM=block, BLOCK_V_DIM=v_block, ROWS=rows, KEYS=keys,
        SMALL=FEW_SINKS if pattern.n_init <= FEW_SINKS else 0, num_warps=8, num_stages=2, **options,
    )  # fmt: skip
    if schedule.splits > 1:
        combine(split_out, split_lse, out, lse)
    return out
