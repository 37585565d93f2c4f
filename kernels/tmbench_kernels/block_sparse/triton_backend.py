"""Attention over block lists in Triton: every program owns one block of queries and walks over the key blocks listed for it.

One launch for all heads, whatever their budgets: the longest lists, those of the last queries, start first, and programs are
many times more than multiprocessors. Nothing is compiled again for a new prompt, nor read back to the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tmbench_kernels.block_sparse.lists import BlockLists
from tmbench_kernels.launch import block_dim, loadable, logit_scales, positive
from tmbench_kernels.online_softmax import attend_tile, log_sum_exp
from tmbench_kernels.pattern import empty_output


@triton.jit(do_not_specialize=["length", "first_query", "rows", "blocks", "batches", "stride_qb"])
def _walk(
    q_ptr, out_ptr, lse_ptr, k_tiles, v_tiles, counts_ptr, indices_ptr,
    stride_qb, stride_qh, stride_qn, stride_qd,
    length, first_query, rows, blocks, batches, scale_log2, cap_scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS query rows of one block, over tiles of KEYS keys of its listed blocks.

    lse_ptr is None where the log-sum-exp is not wanted, cap_scale where logits are not capped: then neither is compiled.
    """
    # The last queries have the longest lists. Heads vary fastest, so that what is in the cache serves those that share keys.
    pieces: tl.constexpr = BLOCK // ROWS
    steps: tl.constexpr = BLOCK // KEYS
    program = tl.program_id(0)
    head = program % HEADS
    program = program // HEADS
    batch = program % batches
    piece = blocks * pieces - 1 - program // batches
    block = piece // pieces
    start = piece * ROWS

    position = start + tl.arange(0, ROWS)
    row_ok = (position >= first_query) & (position < length)
    dim = tl.arange(0, BLOCK_DIM)
    v_dim = tl.arange(0, BLOCK_V_DIM)
    # Rows of q and of the outputs are counted from the first query on: their bases move, so that rows are positions.
    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh - first_query.to(tl.int64) * stride_qn
    q_rows = q_ptr + position.to(tl.int64) * stride_qn
    q = tl.load(q_rows[:, None] + dim[None, :] * stride_qd, mask=row_ok[:, None] & (dim < DIM)[None, :], other=0.0)

    acc = tl.zeros([ROWS, BLOCK_V_DIM], tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    row = (batch.to(tl.int64) * HEADS + head) * rows + block - (blocks - rows)
    count = tl.load(counts_ptr + row)
    indices = indices_ptr + row * blocks
    for t in range(count * steps):
        first = tl.load(indices + t // steps) * BLOCK + t % steps * KEYS
        k = k_tiles.load([batch, head // GROUPS, first, 0]).reshape(KEYS, BLOCK_DIM)
        v = v_tiles.load([batch, head // GROUPS, first, 0]).reshape(KEYS, BLOCK_V_DIM)
        acc, row_sum, row_max = attend_tile(
            q, k, v, first, length, first + KEYS - 1 > start, position, length, 0, scale_log2, cap_scale,
            acc, row_sum, row_max, KEYS,
        )  # fmt: skip

    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    queries = length - first_query
    slot = (batch.to(tl.int64) * queries - first_query + position) * HEADS + head
    tl.store(
        out_ptr + slot[:, None] * V_DIM + v_dim[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (v_dim < V_DIM)[None, :],
    )  # fmt: skip
    if lse_ptr is not None:
        place = (batch.to(tl.int64) * HEADS + head) * queries - first_query + position
        tl.store(lse_ptr + place, log_sum_exp(row_max, row_sum), mask=row_ok)


def attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention over the listed blocks, ``[batch, heads, queries, v_dim]``, a view of ``[batch, queries, heads, v_dim]``."""
    q, scale = positive(q, scale)
    scale_log2, cap_scale = logit_scales(scale, softcap)
    k, v = loadable(k), loadable(v)
    batch, heads, queries, dim = q.shape
    length, v_dim = k.shape[2], v.shape[3]
    q_blocks, blocks = lists.indices.shape[2:]
    widest = max(dim, v_dim)
    wide = widest > 128
    rows, keys = (64, 32) if wide else (lists.block, 64)
    block, v_block = block_dim(dim), block_dim(v_dim)
    out = empty_output(q, v)
    k_tiles = TensorDescriptor(k, list(k.shape), list(k.stride()), [1, 1, keys, block])
    v_tiles = TensorDescriptor(v, list(v.shape), list(v.stride()), [1, 1, keys, v_block])
    # Two programs of 8 warps share a multiprocessor if none takes more than half of its registers.
    options = {} if wide or rows < 128 or q.device.type != "cuda" else {"maxnreg": 128}
    _walk[(q_blocks * (lists.block // rows) * heads * batch,)](
        q, out, lse, k_tiles, v_tiles, lists.counts, lists.indices, *q.stride(),
        length, length - queries, q_blocks, blocks, batch,
        scale_log2, cap_scale,
        HEADS=heads, GROUPS=heads // k.shape[1], DIM=dim, V_DIM=v_dim, BLOCK_DIM=block, BLOCK_V_DIM=v_block,
        BLOCK=lists.block, ROWS=rows, KEYS=keys, num_warps=8 if rows == 128 or widest > 256 else 4, num_stages=2, **options,
    )  # fmt: skip
    return out
