"""XAttention's softmax over strides, summed over blocks, in Triton; the probabilities are never written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tmbench_kernels.launch import LOG2_E
from tmbench_kernels.online_softmax import softmax_sums


@triton.jit
def _stride_logits(lines, first, own, scale_log2, KEYS: tl.constexpr):
    key = (first + tl.arange(0, KEYS))[None, :]
    s = tl.load(lines + key, mask=key <= own, other=0.0) * scale_log2
    return tl.where(key <= own, s, -float("inf"))


@triton.jit(do_not_specialize=["start", "rows", "columns", "skipped", "strides"])
def _sum_strides(
    logits_ptr, out_ptr, start, rows, columns, skipped, strides, scale_log2, CELLS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """One block of queries of one head, CELLS strides, over the strides of keys up to its own."""
    # The last blocks have the longest rows.
    row = rows - 1 - tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * rows + row
    own = ((start + row) * CELLS + tl.arange(0, CELLS))[:, None]
    width = columns * CELLS
    lines = logits_ptr + (place * CELLS + tl.arange(0, CELLS)[:, None]) * width
    seen = (start + row + 1) * CELLS
    row_max = tl.full([CELLS], -float("inf"), tl.float32)
    row_sum = tl.zeros([CELLS], tl.float32)
    for first in range(0, seen, KEYS):
        # The first key of all counts: no row_max remains -inf.
        row_max, row_sum = softmax_sums(row_max, row_sum, _stride_logits(lines, first, own, scale_log2, KEYS))
    # Strides beyond the prompt, or before the chunk, hold nothing.
    weight = tl.where((own >= skipped) & (own < strides), 1.0 / row_sum[:, None], 0.0)
    for first in range(0, width, KEYS):
        held = tl.zeros([KEYS // CELLS], tl.float32)
        if first < seen:
            shares = tl.exp2(_stride_logits(lines, first, own, scale_log2, KEYS) - row_max[:, None]) * weight
            held = tl.sum(tl.reshape(tl.sum(shares, 0), [KEYS // CELLS, CELLS]), 1)
        column = first // CELLS + tl.arange(0, KEYS // CELLS)
        tl.store(out_ptr + place * columns + column, held, mask=column < columns)


def sum_strides(logits: Tensor, start: int, cells: int, strides: int, scale: float, skipped: int = 0) -> Tensor:
    """Softmax over strides, summed over blocks of ``cells`` by ``cells``: float32 ``[batch, heads, rows, columns]``.

    Logits are float32 ``[batch, heads, rows * cells, columns * cells]``, contiguous, for the query blocks from ``start`` on;
    a stride of queries sees those of keys up to its own. Of queries, the first ``skipped`` strides and those from
    ``strides`` on do not count. The probabilities are never written down.
    """
    batch, heads, rows, columns = *logits.shape[:2], logits.shape[2] // cells, logits.shape[3] // cells
    out = logits.new_empty(batch, heads, rows, columns)
    _sum_strides[(batch * heads, rows)](
        logits,
        out,
        start,
        rows,
        columns,
        skipped,
        strides,
        scale * LOG2_E,
        CELLS=cells,
        KEYS=max(8192 // cells, cells),
        num_warps=8,
    )
    return out
