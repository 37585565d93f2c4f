"""Triangle attention on Hopper: warps that load and warps that compute, side by side for as long as the launch lasts.

The work is that of triton_triangle.py, cut into the same items: a tile of query rows that share a key head, over the keys
of their windows and the sinks, or over a part of all keys for the last rows. Here each multiprocessor runs one program that
goes from item to item. A loader warp brings queries, keys and values to shared memory with the tensor memory accelerator,
always some tiles ahead, across the borders of items too. Two teams of four warps own 64 rows each and share every tile of
keys; the softmax of a tile overlaps with the team's own product of the values before, and with all that the other team does.

The keys of an item are walked in two ways: whole tiles from the diagonal backwards, and below them rounds of a box of the
window's last keys beside a box of sinks, so that both cost one softmax.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tmbench_kernels.pattern import empty_output
from tmbench_kernels.triton_triangle import (
    LOG2_E,
    Cut,
    block_dim,
    cut_for,
    heads_per_tile,
    loadable,
    merge_parts,
    multiprocessors,
    new_parts,
    positive,
)

if TYPE_CHECKING:
    from tmbench_kernels.triangle import Triangle

TEAM_ROWS = 64
"""Query rows of a team: what one warpgroup multiplies at once."""
KEYS = 64
"""Keys of a whole tile."""
BOX = 32
"""Keys of a box: a tile's rows have 31 window edges if 4 heads share a key head, so one round of boxes is enough."""
STAGES = 4
"""Whole tiles in flight."""
REGISTERS = 240
"""Registers of a computing thread; the loader needs next to none."""
ITEM_STEPS = 4
"""What an item costs beyond its window, in whole tiles: the round of boxes, the masks, filling and emptying the pipe."""


@gluon.jit
def _share(plan):
    """How many last-row items this program does, and how many items in all."""
    last_items, band_items, extra_from, rounds = plan
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    lasts = gl.maximum((last_items - program + programs - 1) // programs, 0)
    alone = programs - extra_from
    late = gl.maximum((band_items - rounds * programs - (program - extra_from) + alone - 1) // alone, 0)
    return lasts, lasts + rounds + gl.where(program < extra_from, 0, late)


@gluon.jit
def _nth(n, lasts, plan):
    """The n-th item of this program: its last-row items first, then the band's, dealt out in rounds.

    Programs with fewer last-row items, those from ``extra_from`` on, go on among themselves after ``rounds`` rounds.
    """
    last_items, band_items, extra_from, rounds = plan
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    b = n - lasts
    late = rounds * programs + (b - rounds) * (programs - extra_from) + program - extra_from
    return gl.where(n < lasts, n * programs + program, last_items + gl.where(b < rounds, b * programs + program, late))


@gluon.jit
def _item(
    n, lasts, shape, plan, HEAD_TILES: gl.constexpr, POSITIONS: gl.constexpr, KEYS: gl.constexpr, BOX: gl.constexpr
):  # fmt: skip
    """Where this program's n-th item lies: its rows, and the keys that it walks over."""
    length, tail, n_init, n_local, part_keys, parts, last_tiles, batches = shape
    last_items = plan[0]
    i = _nth(n, lasts, plan)
    is_last = i < last_items
    rest = gl.where(is_last, i, i - last_items)
    head_tile = rest % HEAD_TILES
    rest = rest // HEAD_TILES
    batch = rest % batches
    rest = rest // batches
    tile = gl.where(is_last, rest % last_tiles, rest)
    part = gl.where(is_last, rest // last_tiles, 0)
    start = gl.where(is_last, tail, 0) + tile * POSITIONS
    low = gl.where(is_last, part * part_keys, gl.maximum(start - n_local + 1, 0))
    high = gl.minimum(start + POSITIONS, length)
    high = gl.where(is_last, gl.minimum(high, low + part_keys), high)
    bottom = gl.where(is_last, low, 0)
    reach = gl.where(is_last, length, n_local)
    # Whole tiles end at the diagonal and reach down to the last key that all rows see; one there is always, masked or not.
    whole = gl.maximum((high - gl.maximum(start + POSITIONS - reach, low)) // KEYS, 1)
    edge_end = high - whole * KEYS
    sinks = gl.where(is_last, 0, gl.minimum(n_init, gl.maximum(gl.minimum(low, edge_end), 0)))
    boxes = gl.maximum(gl.maximum(edge_end - low, sinks) + BOX - 1, 0) // BOX
    return is_last, head_tile, batch, part, start, low, high, bottom, reach, whole, edge_end, sinks, boxes


@gluon.jit
def _copy(desc, coordinates, full, smem):
    tma.async_copy_global_to_shared(
        desc, coordinates, full, smem._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    )


@gluon.jit
def _load(descs, smem, bars, shape, plan, GROUPS: gl.constexpr, HEADS: gl.constexpr, HEAD_TILES: gl.constexpr,
          PIECE: gl.constexpr, KEYS: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The loader warp."""
    q_desc, k_desc, v_desc, k_box_desc, v_box_desc = descs
    q_smem, k_smem, v_smem, k_box_smem, v_box_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, box_full, box_empty = bars
    lasts, count = _share(plan)
    j = 0
    r = 0
    for n in range(count):
        is_last, head_tile, batch, part, start, low, high, bottom, reach, whole, edge_end, sinks, boxes = _item(
            n, lasts, shape, plan, HEAD_TILES, 2 * PIECE, KEYS, BOX
        )
        head = head_tile * HEADS
        kv_head = head // GROUPS
        turn = n % 2
        mbarrier.wait(q_empty.index(turn), ((n // 2) & 1) ^ 1)
        mbarrier.expect(q_full.index(turn), 2 * q_desc.block_type.nbytes)
        for team in gl.static_range(2):
            _copy(q_desc, [batch, start + team * PIECE, head, 0], q_full.index(turn), q_smem.index(turn * 2 + team))
        for b in range(boxes):
            mbarrier.wait(box_empty, (r & 1) ^ 1)
            mbarrier.expect(box_full, 2 * k_box_desc.block_type.nbytes + 2 * v_box_desc.block_type.nbytes)
            _copy(k_box_desc, [batch, kv_head, low + b * BOX, 0], box_full, k_box_smem.index(0))
            _copy(k_box_desc, [batch, kv_head, b * BOX, 0], box_full, k_box_smem.index(1))
            _copy(v_box_desc, [batch, kv_head, low + b * BOX, 0], box_full, v_box_smem.index(0))
            _copy(v_box_desc, [batch, kv_head, b * BOX, 0], box_full, v_box_smem.index(1))
            r += 1
        for t in range(whole):
            stage = j % STAGES
            phase = (j // STAGES) & 1
            first = high - (t + 1) * KEYS
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            _copy(k_desc, [batch, kv_head, first, 0], k_full.index(stage), k_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            _copy(v_desc, [batch, kv_head, first, 0], v_full.index(stage), v_smem.index(stage))
            j += 1


@gluon.jit
def _masked(s, first, from_key, to_key, position, reach, n_init):
    """Logits ``s`` of the keys first, first + 1, ...: those outside of from_key..to_key-1 or of the triangle become -inf."""
    keys = first + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    distance = gl.expand_dims(position, 1) - gl.expand_dims(keys, 0)
    counted = gl.expand_dims((keys >= from_key) & (keys < to_key), 0)
    seen = counted & (distance >= 0) & ((distance < reach) | gl.expand_dims(keys < n_init, 0))
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def _columns(row, o_layout: gl.constexpr):
    """A value per row, ready to be multiplied with an accumulator."""
    return gl.expand_dims(gl.convert_layout(row, gl.SliceLayout(1, o_layout)), 1)


@gluon.jit
def _shift(peak):
    # A row that has seen no key yet has a peak of -inf, and -inf - -inf is not a number.
    return gl.where(peak == -float("inf"), 0.0, peak)


@gluon.jit
def _softmax(s, peak, total, scale_log2, dtype: gl.constexpr, p_layout: gl.constexpr):
    """One step of the online softmax: probabilities as an operand, the new peak and total, and what shrinks the old."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale_log2)
    shift = _shift(new_peak)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(shift, 1))
    shrink = gl.exp2(peak - shift)
    total = total * shrink + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), p_layout), new_peak, total, shrink


@gluon.jit
def _compute(team, outs, smem, bars, shape, plan, scale_log2, heads_total, HEADS: gl.constexpr, HEADS_BLOCK: gl.constexpr,
             HEAD_TILES: gl.constexpr, PIECE: gl.constexpr, KEYS: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
             V_DIM: gl.constexpr):  # fmt: skip
    """One of the two teams."""
    out, part_out, part_lse = outs
    length, tail, n_init, n_local, part_keys, parts, last_tiles, batches = shape
    q_smem, k_smem, v_smem, k_box_smem, v_box_smem = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, box_full, box_empty = bars
    ROWS: gl.constexpr = q_smem.shape[1]
    BLOCK_V: gl.constexpr = v_smem.shape[2]
    dtype: gl.constexpr = k_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    box_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BOX, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    box_row_layout: gl.constexpr = gl.SliceLayout(1, box_layout)
    lasts, count = _share(plan)
    j = 0
    r = 0
    for n in range(count):
        is_last, head_tile, batch, part, start, low, high, bottom, reach, whole, edge_end, sinks, boxes = _item(
            n, lasts, shape, plan, HEAD_TILES, 2 * PIECE, KEYS, BOX
        )
        start += team * PIECE
        position = start + gl.arange(0, ROWS, row_layout) // HEADS_BLOCK
        all_see = gl.maximum(start + PIECE - reach, bottom)
        turn = n % 2
        peak = gl.full([ROWS], -float("inf"), gl.float32, row_layout)
        total = gl.full([ROWS], 0.0, gl.float32, row_layout)
        acc = gl.full([ROWS, BLOCK_V], 0.0, gl.float32, o_layout)
        mbarrier.wait(q_full.index(turn), (n // 2) & 1)
        q = q_smem.index(turn * 2 + team).load(q_layout)
        mbarrier.arrive(q_empty.index(turn), count=1)

        for b in range(boxes):
            zero = gl.full([ROWS, BOX], 0.0, gl.float32, box_layout)
            mbarrier.wait(box_full, r & 1)
            edge = warpgroup_mma(q, k_box_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
            sink = warpgroup_mma(q, k_box_smem.index(1).permute((1, 0)), zero, use_acc=False, is_async=True)
            edge, sink = warpgroup_mma_wait(0, [edge, sink])
            edge_position = gl.convert_layout(position, box_row_layout)
            edge = _masked(edge, low + b * BOX, low, edge_end, edge_position, reach, n_init)
            counted = b * BOX + gl.arange(0, BOX, gl.SliceLayout(0, box_layout)) < sinks
            sink = gl.where(gl.expand_dims(counted, 0), sink, -float("inf"))
            box_peak = gl.maximum(gl.max(edge, 1), gl.max(sink, 1)) * scale_log2
            new_peak = gl.maximum(peak, gl.convert_layout(box_peak, row_layout))
            shift = _shift(new_peak)
            box_shift = gl.expand_dims(gl.convert_layout(shift, box_row_layout), 1)
            edge = gl.exp2(edge * scale_log2 - box_shift)
            sink = gl.exp2(sink * scale_log2 - box_shift)
            shrink = gl.exp2(peak - shift)
            total = total * shrink + gl.convert_layout(gl.sum(edge + sink, 1), row_layout)
            peak = new_peak
            acc = acc * _columns(shrink, o_layout)
            acc = warpgroup_mma(gl.convert_layout(edge.to(dtype), p_layout), v_box_smem.index(0), acc, is_async=False)
            acc = warpgroup_mma(gl.convert_layout(sink.to(dtype), p_layout), v_box_smem.index(1), acc, is_async=False)
            mbarrier.arrive(box_empty, count=1)
            r += 1

        none = gl.full([ROWS, KEYS], 0.0, gl.float32, s_layout)
        stage = j % STAGES
        phase = (j // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=False)
        mbarrier.arrive(k_empty.index(stage), count=1)
        s = _masked(s, high - KEYS, bottom, high, position, reach, n_init)
        p, peak, total, shrink = _softmax(s, peak, total, scale_log2, dtype, p_layout)
        acc = acc * _columns(shrink, o_layout)
        mbarrier.wait(v_full.index(stage), phase)
        for t in range(1, whole):
            v_stage = stage
            j += 1
            stage = j % STAGES
            phase = (j // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            s_token = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
            acc_token = warpgroup_mma(p, v_smem.index(v_stage), acc, is_async=True)
            s = warpgroup_mma_wait(1, [s_token])
            mbarrier.arrive(k_empty.index(stage), count=1)
            first = high - (t + 1) * KEYS
            if (first + KEYS - 1 > start) | (first < all_see):
                s = _masked(s, first, bottom, high, position, reach, n_init)
            next_p, peak, total, shrink = _softmax(s, peak, total, scale_log2, dtype, p_layout)
            # The assembler moves arithmetic behind a wait for products, but not behind this loop on a barrier: without it
            # the softmax would not overlap with the product of the values.
            mbarrier.wait(v_full.index(stage), phase)
            acc, p, next_p = warpgroup_mma_wait(0, [acc_token, p, next_p])
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            acc = acc * _columns(shrink, o_layout)
            p = next_p
        acc = warpgroup_mma(p, v_smem.index(stage), acc, is_async=False)
        mbarrier.arrive(v_empty.index(stage), count=1)
        j += 1

        o_row = gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
        o_position = start + o_row // HEADS_BLOCK
        o_head = o_row % HEADS_BLOCK
        ok = (o_position < gl.where(is_last, length, tail)) & (o_head < HEADS)
        head = head_tile * HEADS + o_head
        v_dim = gl.arange(0, BLOCK_V, gl.SliceLayout(0, o_layout))
        inside = gl.expand_dims(ok, 1) & gl.expand_dims(v_dim < V_DIM, 0)
        acc = acc * _columns(1.0 / gl.where(total == 0.0, 1.0, total), o_layout)
        if is_last & (parts > 1):
            slot = (part * batches + batch).to(gl.int64) * (length - tail) + (o_position - tail)
            slot = slot * heads_total + head
            gl.store(part_out + gl.expand_dims(slot * V_DIM, 1) + gl.expand_dims(v_dim, 0), acc, mask=inside)
            lse = gl.convert_layout(peak + gl.log2(total), gl.SliceLayout(1, o_layout))
            gl.store(part_lse + slot, lse, mask=ok)
        else:
            slot = (batch.to(gl.int64) * length + o_position) * heads_total + head
            pointers = out + gl.expand_dims(slot * V_DIM, 1) + gl.expand_dims(v_dim, 0)
            gl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit(
    do_not_specialize=[
        "length", "tail", "n_init", "n_local", "part_keys", "parts", "last_tiles", "batches", "last_items", "band_items",
        "extra_from", "rounds", "heads_total",
    ]
)  # fmt: skip
def _walk(out, part_out, part_lse, q_desc, k_desc, v_desc, k_box_desc, v_box_desc,
          length, tail, n_init, n_local, part_keys, parts, last_tiles, batches, last_items, band_items, extra_from, rounds,
          scale_log2, heads_total, GROUPS: gl.constexpr, HEADS: gl.constexpr, HEADS_BLOCK: gl.constexpr,
          HEAD_TILES: gl.constexpr, V_DIM: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
    PIECE: gl.constexpr = q_desc.block_type.shape[1]
    KEYS: gl.constexpr = k_desc.block_type.shape[2]
    BOX: gl.constexpr = k_box_desc.block_type.shape[2]
    DIM: gl.constexpr = k_desc.block_type.shape[3]
    BLOCK_V: gl.constexpr = v_desc.block_type.shape[3]
    dtype: gl.constexpr = k_desc.dtype
    k_layout: gl.constexpr = gl.NVMMASharedLayout(k_desc.layout.swizzle_byte_width, 16, rank=2)
    v_layout: gl.constexpr = gl.NVMMASharedLayout(v_desc.layout.swizzle_byte_width, 16, rank=2)
    smem = (
        gl.allocate_shared_memory(dtype, [4, PIECE * HEADS_BLOCK, DIM], k_layout),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], k_layout),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, BLOCK_V], v_layout),
        gl.allocate_shared_memory(dtype, [2, BOX, DIM], k_layout),
        gl.allocate_shared_memory(dtype, [2, BOX, BLOCK_V], v_layout),
    )
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    box_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    box_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    mbarrier.init(box_full, count=1)
    mbarrier.init(box_empty, count=2)
    for turn in gl.static_range(2):
        mbarrier.init(q_full.index(turn), count=1)
        mbarrier.init(q_empty.index(turn), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, box_full, box_empty)
    descs = (q_desc, k_desc, v_desc, k_box_desc, v_box_desc)
    outs = (out, part_out, part_lse)
    shape = (length, tail, n_init, n_local, part_keys, parts, last_tiles, batches)
    plan = (last_items, band_items, extra_from, rounds)
    gl.warp_specialize(
        [
            (_compute, (0, outs, smem, bars, shape, plan, scale_log2, heads_total,
                        HEADS, HEADS_BLOCK, HEAD_TILES, PIECE, KEYS, BOX, STAGES, V_DIM)),
            (_compute, (1, outs, smem, bars, shape, plan, scale_log2, heads_total,
                        HEADS, HEADS_BLOCK, HEAD_TILES, PIECE, KEYS, BOX, STAGES, V_DIM)),
            (_load, (descs, smem, bars, shape, plan, GROUPS, HEADS, HEAD_TILES, PIECE, KEYS, BOX, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@cache
def _layout(width: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=4)


def _tiles(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _layout(block[-1]))


def _deal(cut: Cut, batch: int, programs: int) -> tuple[int, int, int, int]:
    """How items are dealt out: last-row items, band items, and what ``_nth`` makes of the last two.

    Last-row items go round first. Where they do not come out even, the programs without one (from ``extra_from`` on) get as
    many band items more as take the same time, after ``rounds`` rounds for all.
    """
    last_items = cut.last_tiles * cut.parts * cut.head_tiles * batch
    band_items = cut.band_tiles * cut.head_tiles * batch
    extra_from = last_items % programs
    ahead = round(cut.part_keys / KEYS / cut.band_steps) if extra_from else 0
    rounds = max(0, (band_items - (programs - extra_from) * ahead) // programs)
    return last_items, band_items, extra_from, rounds


def attend(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Triangle attention ``[batch, heads, length, v_dim]``, as a view of ``[batch, length, heads, v_dim]``."""
    q, scale = positive(q, scale)
    q, k, v = loadable(q), loadable(k), loadable(v)
    batch, heads, length, dim = q.shape
    groups, v_dim = heads // k.shape[1], v.shape[3]
    heads_block = 1 << (heads_per_tile(groups) - 1).bit_length()
    piece = TEAM_ROWS // heads_block
    programs = multiprocessors(q.device)
    cut = cut_for(
        pattern, batch, heads, k.shape[1], length, positions=2 * piece, keys=KEYS, overhead=ITEM_STEPS, slots=programs
    )
    out = empty_output(q, v)
    part_out, part_lse = new_parts(cut, out)
    block, v_block = block_dim(dim), block_dim(v_dim)
    _walk[(programs,)](
        out, part_out, part_lse, _tiles(q.transpose(1, 2), [1, piece, heads_block, block]),
        _tiles(k, [1, 1, KEYS, block]), _tiles(v, [1, 1, KEYS, v_block]),
        _tiles(k, [1, 1, BOX, block]), _tiles(v, [1, 1, BOX, v_block]),
        length, cut.tail, pattern.n_init, pattern.n_local, cut.part_keys, cut.parts, max(cut.last_tiles, 1), batch,
        *_deal(cut, batch, programs), scale * LOG2_E, heads, GROUPS=groups, HEADS=cut.tile_heads, HEADS_BLOCK=heads_block,
        HEAD_TILES=cut.head_tiles, V_DIM=v_dim, STAGES=STAGES, REGISTERS=REGISTERS, num_warps=4,
    )  # fmt: skip
    if cut.parts > 1:
        merge_parts(part_out, part_lse, cut, out)
    return out
