"""Vertical-slash attention in Triton: runs of keys that lie anywhere, and gathered columns, for every block of queries.

Three steps, none of which waits for the host. Torch turns the two sets into tables: for each distance the next smaller one
that is selected, the columns in order, and their keys and values side by side. ``_index`` then walks each block of queries
from run to run, as the definition has it, and notes where its runs start and which columns lie between them. ``_walk``
attends: over the runs' keys where they lie, and over the gathered columns with a mask of those that count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tmbench_kernels.launch import block_dim, loadable, logit_scales, positive
from tmbench_kernels.online_softmax import attend_tile, log_sum_exp, soft_capped, softmax_step
from tmbench_kernels.pattern import empty_output
from tmbench_kernels.vertical_slash.runs import BLOCK, largest_below

ALL = 2**30
"""A reach beyond any prompt."""


@dataclass(frozen=True, eq=False)
class Index:
    """What every block of 64 queries of every head attends to. ``rows`` is the number of blocks, ``heads`` that of q."""

    starts: Tensor
    """int32 ``[batch, heads, rows, most]``: where the 64-key pieces of the runs start, ascending; ``counts`` of them."""
    counts: Tensor
    """int32 ``[batch, heads, rows]``."""
    columns: Tensor
    """int32 ``[batch, heads, width]``: the selected columns, ascending, then ``length``; width is a multiple of 64."""
    kept: Tensor
    """uint8 ``[batch, heads, rows, width]``: 1 for the columns that lie in none of a block's runs, nor after the block."""
    before: Tensor
    """int32 ``[batch, heads, rows]``: how many columns lie before the block's end."""
    reach: Tensor
    """int32 ``[heads]``: of its runs a query sees the keys that lie less than so many before it,"""
    sinks: Tensor
    """int32 ``[heads]``: and the first so many keys, wherever they are."""


@triton.jit
def _keep(kept, low, high, CHUNK: tl.constexpr):
    """Note that the columns low..high-1, by their place in order, lie between two runs."""
    while low < high:
        column = low + tl.arange(0, CHUNK)
        tl.store(kept + column, 1, mask=column < high)
        low += CHUNK


@triton.jit(do_not_specialize=["length", "first_row", "rows", "most", "width"])
def _index(
    below_ptr, rank_ptr, starts_ptr, counts_ptr, kept_ptr, before_ptr, length, first_row, rows, most, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    below = below_ptr + head * (length + 1)
    rank = rank_ptr + head * (length + 1)
    slot = head * rows + row
    starts = starts_ptr + slot * most
    kept = kept_ptr + slot * width
    end = (first_row + row) * BLOCK + BLOCK
    reach = 0
    count = 0
    column = 0
    distance = tl.load(below + tl.minimum(end, length))
    while (reach < end) & (distance >= 0):
        next_end = tl.maximum(end - distance, BLOCK)
        grows = (count > 0) & (next_end <= reach + BLOCK)
        reach = tl.where(grows, reach + BLOCK, next_end)
        start = reach - BLOCK
        tl.store(starts + count, start)
        count += 1
        _keep(kept, column, tl.load(rank + tl.minimum(start, length)), BLOCK)
        column = tl.load(rank + tl.minimum(reach, length))
        distance = tl.load(below + tl.minimum(tl.maximum(end - reach, 0), length))
    before = tl.load(rank + tl.minimum(end, length))
    _keep(kept, column, before, BLOCK)
    tl.store(counts_ptr + slot, count)
    tl.store(before_ptr + slot, before)


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


def build_index(columns: Tensor, distances: Tensor, most_columns: int, most_distances: int, start: int = 0) -> Index:
    """The index of a selection: two sets, bool ``[batch, heads, keys]``, of at most so many entries a head.

    It is for the queries from position ``start`` on.
    """
    batch, heads, length = columns.shape
    blocks = -(-length // BLOCK)
    rows = blocks - start // BLOCK
    most, width = max(1, min(blocks, most_distances)), -(-max(1, min(length, most_columns)) // BLOCK) * BLOCK
    device, shape = columns.device, (batch, heads, rows)
    ranks = F.pad(columns.cumsum(2, dtype=torch.int32), (1, 0))
    # Every column goes to its place in order; all that is not selected goes to one place beyond, which is cut off.
    places = torch.where(columns, ranks[..., :-1], width).long()
    ordered = torch.full((batch, heads, width + 1), length, dtype=torch.int32, device=device)
    numbers = torch.arange(length, dtype=torch.int32, device=device)
    ordered = ordered.scatter_(2, places, numbers.expand_as(places))[..., :width].contiguous()
    # Of several that go to the place beyond, any may win; places in order have one each.
    index = Index(
        starts=torch.empty(*shape, most, dtype=torch.int32, device=device),
        counts=torch.empty(shape, dtype=torch.int32, device=device),
        columns=ordered,
        kept=torch.zeros(*shape, width, dtype=torch.uint8, device=device),
        before=torch.empty(shape, dtype=torch.int32, device=device),
        reach=torch.full((heads,), ALL, dtype=torch.int32, device=device),
        sinks=torch.zeros(heads, dtype=torch.int32, device=device),
    )
    below = largest_below(distances).int()
    _index[(rows, batch * heads)](
        below, ranks, index.starts, index.counts, index.kept, index.before, length, start // BLOCK, rows, most, width,
        BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip
    return index


def count_pairs(index: Index, length: int, start: int = 0) -> int:
    """How many (query, key) pairs an index stands for, over batch and heads, if every block sees its own keys.

    It is of the queries from position ``start`` on, over ``length`` keys.
    """
    first = BLOCK * torch.arange(start // BLOCK, -(-length // BLOCK), device=index.counts.device)
    inside = (length - first).clamp(max=BLOCK)
    last = index.starts.gather(3, (index.counts - 1).clamp(min=0).long()[..., None]).squeeze(3)
    # The last piece may go on beyond its block's end.
    beyond = (last + BLOCK - (first + inside)).clamp(min=0).masked_fill(index.counts == 0, 0)
    keys = index.counts.long() * BLOCK - beyond + index.kept.sum(3)
    queries = inside - (start - first).clamp(min=0)
    # Of these the block's own are seen by its later queries only.
    return int((queries * keys - queries * (queries - 1) // 2).sum())


def gathered(x: Tensor, index: Index) -> Tensor:
    """Keys or values of the selected columns, ``[batch, heads, width, dim]``: each query head has columns of its own."""
    batch, heads = index.columns.shape[:2]
    key_heads = torch.arange(heads, device=x.device)[:, None] // (heads // x.shape[1])
    batches = torch.arange(batch, device=x.device)[:, None, None]
    return x[batches, key_heads, index.columns.clamp(max=x.shape[2] - 1).long()]


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
    k_columns, v_columns = (loadable(gathered(x, index)) for x in (k, v))
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
