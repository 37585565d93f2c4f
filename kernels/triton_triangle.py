"""Triangle attention in Triton: one launch for sinks, window and last rows, and one softmax over all of them.

Every program owns a tile of query rows and walks over tiles of keys. Two kinds of program share that walk:

- a band program owns consecutive positions of all the query heads that share a key head, so that a tile of keys, fetched
  once, serves all of its rows, and few keys beyond the rows' windows are computed;
- a last-row program owns the same kind of tile among the last queries, and a part of the keys before them. The parts are
  merged by their log-sum-exp in a second, small launch, which short prompts do without.

Tiles that all rows see in full are computed without a mask; the diagonal, the window's far edge and the sinks carry one.
Lengths and the sizes of the pattern are run-time numbers: nothing is compiled or tuned again for a new prompt.
docs/triangle-kernel.md has the reasons and the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tmbench_kernels.pattern import empty_output

if TYPE_CHECKING:
    from tmbench_kernels.triangle import Triangle

MAX_HEADS = 16
"""Query heads in one tile. More of them would leave too few positions to a tile."""
FEW_SINKS = 16
"""Up to so many first keys make one small tile of their own."""
ONE_LAUNCH = 4096
"""Up to this length the last rows walk over all keys in one program: a second launch would cost more than it saves."""
LOG2_E = 1.4426950408889634


@triton.jit
def softmax_step(s, v, scale_log2, acc, total, peak):
    """One step of the online softmax: logits ``s`` [rows, keys], -inf where a row does not see a key, and their values."""
    new_peak = tl.maximum(peak, tl.max(s, 1) * scale_log2)
    # A row that has seen no key yet has a peak of -inf, and -inf - -inf is not a number.
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    p = tl.exp2(s * scale_log2 - shift[:, None])
    shrink = tl.exp2(peak - shift)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, total, new_peak


@triton.jit
def attend_tile(q, k, v, first, limit, masked, position, reach, n_init, scale_log2, acc, total, peak, KEYS: tl.constexpr):
    """One step over the keys first..first+KEYS-1, of which those from ``limit`` on are not counted."""
    s = tl.dot(q, k.T)
    if masked:
        keys = first + tl.arange(0, KEYS)
        distance = position[:, None] - keys[None, :]
        seen = (keys < limit)[None, :] & (distance >= 0) & ((distance < reach) | (keys < n_init)[None, :])
        s = tl.where(seen, s, -float("inf"))
    return softmax_step(s, v, scale_log2, acc, total, peak)


@triton.jit(
    do_not_specialize=[
        "length", "tail", "n_init", "n_local", "part_keys", "parts", "last_tiles", "batches", "stride_qb", "stride_kb",
        "stride_vb",
    ]
)  # fmt: skip
def _walk(
    q_ptr, k_ptr, v_ptr, out_ptr, part_out_ptr, part_lse_ptr, k_tiles, v_tiles,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    length, tail, n_init, n_local, part_keys, parts, last_tiles, batches,
    scale_log2,
    HEADS_TOTAL: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr, POSITIONS: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """One program: ROWS query rows over their keys. SMALL is the size of the sinks' own tile, or 0 for whole tiles."""
    program = tl.program_id(0)
    head_tiles: tl.constexpr = HEADS_TOTAL // HEADS
    last_programs = last_tiles * parts * head_tiles * batches
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

    part = 0
    if is_last:
        part = program // last_tiles
        start = tail + program % last_tiles * POSITIONS
        rows_end = length
        low = part * part_keys
        high = tl.minimum(tl.minimum(start + POSITIONS, length), low + part_keys)
        reach = length
        sinks = 0
    else:
        start = program * POSITIONS
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
    q_rows = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh + position.to(tl.int64) * stride_qn
    q = tl.load(q_rows[:, None] + dim[None, :] * stride_qd, mask=row_ok[:, None] & (dim < DIM)[None, :], other=0.0)

    acc = tl.zeros([ROWS, BLOCK_V_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    if SMALL > 0:
        if sinks > 0:
            sink = tl.arange(0, SMALL)
            ok = (sink < sinks)[:, None]
            k_rows = k_ptr + batch * stride_kb + kv_head.to(tl.int64) * stride_kh + sink.to(tl.int64) * stride_kn
            v_rows = v_ptr + batch * stride_vb + kv_head.to(tl.int64) * stride_vh + sink.to(tl.int64) * stride_vn
            k = tl.load(k_rows[:, None] + dim[None, :] * stride_kd, mask=ok & (dim < DIM)[None, :], other=0.0)
            v = tl.load(v_rows[:, None] + v_dim[None, :] * stride_vd, mask=ok & (v_dim < V_DIM)[None, :], other=0.0)
            acc, total, peak = attend_tile(
                q, k, v, 0, sinks, True, position, reach, n_init, scale_log2, acc, total, peak, SMALL
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
        acc, total, peak = attend_tile(
            q, k, v, first, limit, masked, position, reach, n_init, scale_log2, acc, total, peak, KEYS
        )

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    inside = row_ok[:, None] & (v_dim < V_DIM)[None, :]
    if is_last and parts > 1:
        slot = ((part * batches + batch) * (length - tail) + (position - tail)) * HEADS_TOTAL + head
        tl.store(part_out_ptr + slot[:, None] * V_DIM + v_dim[None, :], acc, mask=inside)
        tl.store(part_lse_ptr + slot, peak + tl.log2(total), mask=row_ok)
    else:
        slot = (batch * length + position) * HEADS_TOTAL + head
        tl.store(out_ptr + slot[:, None] * V_DIM + v_dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "parts", "out_batch"])
def _merge(
    part_out_ptr, part_lse_ptr, out_ptr, rows, parts, out_batch,
    V_DIM: tl.constexpr, BLOCK_V_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the parts' outputs, each weighted by its share of the softmax, to the last rows of the output."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    v_dim = tl.arange(0, BLOCK_V_DIM)
    ok = row < rows
    inside = ok[:, None] & (v_dim < V_DIM)[None, :]
    acc = tl.zeros([ROWS, BLOCK_V_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    for part in range(parts):
        slot = (part * tl.num_programs(1) + batch) * rows + row
        lse = tl.load(part_lse_ptr + slot, mask=ok, other=-float("inf"))
        out = tl.load(part_out_ptr + slot[:, None] * V_DIM + v_dim[None, :], mask=inside, other=0.0)
        new_peak = tl.maximum(peak, lse)
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weight = tl.exp2(lse - shift)
        shrink = tl.exp2(peak - shift)
        acc = acc * shrink[:, None] + out * weight[:, None]
        total = total * shrink + weight
        peak = new_peak
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptr += batch * out_batch
    tl.store(out_ptr + row[:, None] * V_DIM + v_dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Cut:
    """How a prompt's rows are cut into programs or items. Both triangle kernels cut alike, in tiles of their own sizes."""

    tile_heads: int
    """Query heads in a tile, which share a key head."""
    head_tiles: int
    tail: int
    """The first of the last rows."""
    last_n: int
    band_tiles: int
    last_tiles: int
    parts: int
    """How many parts the last rows' keys are cut into, each for one program."""
    part_keys: int
    band_steps: int
    """What one tile of the band costs, in tiles of keys."""


@lru_cache(maxsize=64)
def cut_for(
    pattern: Triangle,
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    *,
    positions: int,
    keys: int,
    overhead: int,
    slots: int,
) -> Cut:
    """Cut for tiles of ``positions`` x ``keys``, for ``slots`` programs at a time that lose ``overhead`` tiles each.

    The last rows are split over the keys until one part takes no longer than what each slot has to do altogether; short
    prompts' are never split.
    """
    tile_heads = heads_per_tile(heads // kv_heads)
    head_tiles = heads // tile_heads
    last_n = min(pattern.last_n, length)
    band_tiles = -(-(length - last_n) // positions)
    last_tiles = -(-last_n // positions)
    steps = -(-length // keys)
    band_steps = pattern.n_local // keys + overhead
    work = batch * head_tiles * (band_tiles * band_steps + last_tiles * steps)
    parts = 1 if length <= ONE_LAUNCH or not last_n else min(-(-steps // max(work // slots, 4)), 64)
    part_keys = -(-steps // parts) * keys
    return Cut(tile_heads, head_tiles, length - last_n, last_n, band_tiles, last_tiles, parts, part_keys, band_steps)


@cache
def heads_per_tile(groups: int) -> int:
    """The most heads, of those that share a key head, that one tile takes."""
    return next(heads for heads in range(min(groups, MAX_HEADS), 0, -1) if groups % heads == 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; 1 for the CPU, where the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def loadable(x: Tensor) -> Tensor:
    """``x``, or a copy where the tensor memory accelerator cannot read it: its rows must start at multiples of 16 bytes."""
    size = x.element_size()
    *strides, last = x.stride()
    if last == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride * size % 16 == 0 for stride in strides):
        return x
    # Rows padded to 16 bytes, in memory of their own; the stride of a dimension of one counts as well.
    dim = -(-x.shape[-1] * size // 16) * 16 // size
    return x.new_empty(*x.shape[:-1], dim)[..., : x.shape[-1]].copy_(x)


def positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same logits with a scale above zero, which the kernels take for granted."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale else (torch.zeros_like(q), 1.0)


def new_parts(cut: Cut, out: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the parts' outputs ``[parts, batch, last_n, heads, v_dim]`` and log-sum-exps, both to base 2."""
    if cut.parts == 1:
        return out, out
    shape = (cut.parts, out.shape[0], cut.last_n, out.shape[1])
    part_out = torch.empty(*shape, out.shape[3], dtype=torch.float32, device=out.device)
    return part_out, torch.empty(shape, dtype=torch.float32, device=out.device)


def merge_parts(part_out: Tensor, part_lse: Tensor, cut: Cut, out: Tensor) -> None:
    """Write the last rows of ``out``, made by ``empty_output``, from their parts."""
    parts, batch, rows, heads, v_dim = part_out.shape
    _merge[(-(-rows * heads // 16), batch)](
        part_out, part_lse, out[:, :, cut.tail :], rows * heads, parts, out.stride(0),
        V_DIM=v_dim, BLOCK_V_DIM=block_dim(v_dim), ROWS=16,
    )  # fmt: skip


def block_dim(dim: int) -> int:
    """The size of the tile that holds a head's values: a power of two."""
    return max(16, 1 << (dim - 1).bit_length())


def attend(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Triangle attention ``[batch, heads, length, v_dim]``, as a view of ``[batch, length, heads, v_dim]``."""
    q, scale = positive(q, scale)
    k, v = loadable(k), loadable(v)
    batch, heads, length, dim = q.shape
    v_dim = v.shape[3]
    wide = max(dim, v_dim) > 128
    rows, keys = (64, 32) if wide else (128, 64)
    positions = rows // heads_per_tile(heads // k.shape[1])
    cut = cut_for(
        pattern, batch, heads, k.shape[1], length, positions=positions, keys=keys, overhead=3,
        slots=4 * multiprocessors(q.device),
    )  # fmt: skip
    out = empty_output(q, v)
    part_out, part_lse = new_parts(cut, out)
    block, v_block = block_dim(dim), block_dim(v_dim)
    k_tiles = TensorDescriptor(k, list(k.shape), list(k.stride()), [1, 1, keys, block])
    v_tiles = TensorDescriptor(v, list(v.shape), list(v.stride()), [1, 1, keys, v_block])
    # Two programs of 8 warps share a multiprocessor if none takes more than half of its registers.
    options = {} if wide or q.device.type != "cuda" else {"maxnreg": 128}
    _walk[((cut.band_tiles + cut.last_tiles * cut.parts) * cut.head_tiles * batch,)](
        q, k, v, out, part_out, part_lse, k_tiles, v_tiles, *q.stride(), *k.stride(), *v.stride(),
        length, cut.tail, pattern.n_init, pattern.n_local, cut.part_keys, cut.parts, cut.last_tiles, batch, scale * LOG2_E,
        HEADS_TOTAL=heads, KV_HEADS=k.shape[1], HEADS=cut.tile_heads, POSITIONS=positions,
        DIM=dim, V_DIM=v_dim, BLOCK_DIM=block, BLOCK_V_DIM=v_block, ROWS=rows, KEYS=keys,
        SMALL=FEW_SINKS if pattern.n_init <= FEW_SINKS else 0, num_warps=8, num_stages=2, **options,
    )  # fmt: skip
    if cut.parts > 1:
        merge_parts(part_out, part_lse, cut, out)
    return out
