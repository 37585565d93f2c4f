"""The last rows' splits combined by their log-sum-exp, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tmbench_kernels.launch import block_dim
from tmbench_kernels.online_softmax import log_sum_exp


@triton.jit(do_not_specialize=["rows", "splits", "out_batch", "length", "tail"])
def _combine(
    split_out_ptr, split_lse_ptr, out_ptr, lse_ptr, rows, splits, out_batch, length, tail, heads,
    V_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the splits' outputs, each weighted by its share of the softmax, to the last rows of the output.

    A row is a head of a position. lse_ptr and the three sizes of the whole are None where the log-sum-exp is not wanted.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    v_dim = tl.arange(0, BLOCK_V_DIM)
    ok = row < rows
    inside = ok[:, None] & (v_dim < V_DIM)[None, :]
    acc = tl.zeros([ROWS, BLOCK_V_DIM], tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    for split in range(splits):
        slot = (split * tl.num_programs(1) + batch) * rows + row
        lse = tl.load(split_lse_ptr + slot, mask=ok, other=-float("inf"))
        # A split without a key of a row's may have left that row as it was.
        seen = inside & (lse > -float("inf"))[:, None]
        out = tl.load(split_out_ptr + slot[:, None] * V_DIM + v_dim[None, :], mask=seen, other=0.0)
        new_max = tl.maximum(row_max, lse)
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weight = tl.exp2(lse - shift)
        acc_scale = tl.exp2(row_max - shift)
        acc = acc * acc_scale[:, None] + out * weight[:, None]
        row_sum = row_sum * acc_scale + weight
        row_max = new_max
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    out_ptr += batch * out_batch
    tl.store(out_ptr + row[:, None] * V_DIM + v_dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    if lse_ptr is not None:
        place = (batch * heads + row % heads) * length + tail + row // heads
        tl.store(lse_ptr + place, log_sum_exp(row_max, row_sum), mask=ok)


def combine(split_out: Tensor, split_lse: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Write the last rows of ``out``, made by ``empty_output``, and of ``lse``, if any, from their splits.

    Splits are ``[splits, batch, rows, heads, v_dim]`` and ``[splits, batch, rows, heads]``, these to base 2.
    """
    splits, batch, rows, heads, v_dim = split_out.shape
    tail = out.shape[2] - rows
    whole = (None, None, None) if lse is None else (out.shape[2], tail, heads)
    _combine[(-(-rows * heads // 16), batch)](
        split_out, split_lse, out[:, :, tail:], lse, rows * heads, splits, out.stride(0), *whole,
        V_DIM=v_dim, BLOCK_V_DIM=block_dim(v_dim), ROWS=16,
    )  # fmt: skip
