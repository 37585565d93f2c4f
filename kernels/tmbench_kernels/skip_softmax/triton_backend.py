"""Skip-softmax in Triton: every program owns a block of queries and walks over all tiles of keys before it, in order.

The product of queries and keys comes first, then the tile's maxima, then the vote of all rows. Only a tile that some row
keeps has its values loaded. A tile of keys is as large as the rule's, so that one vote settles it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tmbench_kernels.block_sparse.lists import BLOCK, block_count
from tmbench_kernels.cuda import capability
from tmbench_kernels.launch import block_dim, loadable, logit_scales, positive
from tmbench_kernels.online_softmax import log_sum_exp, soft_capped, softmax_sum
from tmbench_kernels.pattern import empty_output

if TYPE_CHECKING:
    from tmbench_kernels.skip_softmax import SkipSoftmax


@triton.jit(do_not_specialize=["length", "first_query", "rows", "blocks", "batches", "stride_qb"])
def _walk(
    q_ptr, out_ptr, lse_ptr, margins_ptr, k_tiles, v_tiles,
    stride_qb, stride_qh, stride_qn, stride_qd,
    length, first_query, rows, blocks, batches, least, scale_log2, cap_scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr, BLOCK: tl.constexpr, ASCENDING: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries over all blocks of keys up to its own.

    ``least`` is compared with products of q and k, before their scale. lse_ptr is None where the log-sum-exp is not wanted,
    cap_scale where logits are not capped. With margins_ptr the margins alone are written, and out_ptr is None.
    """
    # The last queries take longest. Heads vary fastest, so that what is in the cache serves those that share keys.
    program = tl.program_id(0)
    head = program % HEADS
    program = program // HEADS
    batch = program % batches
    block = blocks - 1 - program // batches
    start = block * BLOCK

    position = start + tl.arange(0, BLOCK)
    row_ok = (position >= first_query) & (position < length)
    dim = tl.arange(0, BLOCK_DIM)
    # Rows of q and of the outputs are counted from the first query on: their bases move, so that rows are positions.
    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh - first_query.to(tl.int64) * stride_qn
    q_rows = q_ptr + position.to(tl.int64) * stride_qn
    q = tl.load(q_rows[:, None] + dim[None, :] * stride_qd, mask=row_ok[:, None] & (dim < DIM)[None, :], other=0.0)

    acc = tl.zeros([BLOCK, BLOCK_V_DIM], tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    # The largest product of each row so far: what votes are about, and but for cap and scale the softmax's maximum.
    running = tl.full([BLOCK], -float("inf"), tl.float32)
    for t in range(block + 1):
        tile = t if ASCENDING else block - t
        first = tile * BLOCK
        k = k_tiles.load([batch, head // GROUPS, first, 0]).reshape(BLOCK, BLOCK_DIM)
        s = tl.dot(q, k.T)
        if tile == block:
            s = tl.where(position[:, None] >= (first + tl.arange(0, BLOCK))[None, :], s, -float("inf"))
        top = tl.max(s, 1)
        margin = tl.max(tl.where(row_ok, top - running, -float("inf")), 0)
        higher = tl.maximum(running, top)
        if margins_ptr is not None:
            row = (batch.to(tl.int64) * HEADS + head) * rows + block - (blocks - rows)
            tl.store(margins_ptr + row * blocks + tile, margin)
        else:
            if margin >= least:
                v = v_tiles.load([batch, head // GROUPS, first, 0]).reshape(BLOCK, BLOCK_V_DIM)
                if cap_scale is not None:
                    s = tl.where(s == -float("inf"), s, soft_capped(s, cap_scale))
                acc, row_sum = softmax_sum(
                    s, v, scale_log2, acc, row_sum,
                    soft_capped(running, cap_scale) * scale_log2, soft_capped(higher, cap_scale) * scale_log2,
                )  # fmt: skip
        running = higher

    if margins_ptr is None:
        v_dim = tl.arange(0, BLOCK_V_DIM)
        acc = acc / row_sum[:, None]
        queries = length - first_query
        slot = (batch.to(tl.int64) * queries - first_query + position) * HEADS + head
        tl.store(
            out_ptr + slot[:, None] * V_DIM + v_dim[None, :], acc.to(out_ptr.dtype.element_ty),
            mask=row_ok[:, None] & (v_dim < V_DIM)[None, :],
        )  # fmt: skip
        if lse_ptr is not None:
            place = (batch.to(tl.int64) * HEADS + head) * queries - first_query + position
            tl.store(lse_ptr + place, log_sum_exp(soft_capped(running, cap_scale) * scale_log2, row_sum), mask=row_ok)


def attend(
    pattern: SkipSoftmax,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention ``[batch, heads, queries, v_dim]``, a view of ``[batch, queries, heads, v_dim]``."""
    out = empty_output(q, v)
    _launch(pattern.order == "ascending", q, k, v, scale, pattern.least(k.shape[2]), softcap=softcap, out=out, lse=lse)
    return out


def margins(ascending: bool, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """As ``tmbench_kernels.skip_softmax.margins`` has them."""
    rows, blocks = block_count(k.shape[2]) - (k.shape[2] - q.shape[2]) // BLOCK, block_count(k.shape[2])
    found = q.new_full((*q.shape[:2], rows, blocks), -torch.inf, dtype=torch.float32)
    return found.mul_(_launch(ascending, q, k, k, scale, 0.0, margins=found))


def _launch(
    ascending: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    least: float,
    *,
    softcap: float = 0.0,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    margins: Tensor | None = None,
) -> float:
    """Returns the scale of the products that are compared."""
    q, scale = positive(q, scale)
    scale_log2, cap_scale = logit_scales(scale, softcap)
    k, v = loadable(k), loadable(v)
    batch, heads, queries, dim = q.shape
    length, v_dim = k.shape[2], v.shape[3]
    blocks = block_count(length)
    rows = blocks - (length - queries) // BLOCK
    width, v_width = block_dim(dim), block_dim(v_dim)
    # A second stage is one more tile of keys in shared memory. Triton's compiler fails with it for Blackwell.
    staged = q.device.type == "cuda" and capability(q.device) == 9 and max(dim, v_dim) <= 128
    k_tiles = TensorDescriptor(k, list(k.shape), list(k.stride()), [1, 1, BLOCK, width])
    v_tiles = TensorDescriptor(v, list(v.shape), list(v.stride()), [1, 1, BLOCK, v_width])
    _walk[(rows * heads * batch,)](
        q, out, lse, margins, k_tiles, v_tiles, *q.stride(),
        length, length - queries, rows, blocks, batch, least / scale, scale_log2, cap_scale,
        HEADS=heads, GROUPS=heads // k.shape[1], DIM=dim, V_DIM=v_dim, BLOCK_DIM=width, BLOCK_V_DIM=v_width,
        BLOCK=BLOCK, ASCENDING=ascending, num_warps=8, num_stages=2 if staged else 1,
    )  # fmt: skip
    return scale
