"""Triangle attention on Hopper, in CUDA C++: the host's side of hopper.cu."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tmbench_kernels.hopper import (
    KEYS,
    SHARED_LIMIT,
    WARPGROUP_ROWS,
    Kernel,
    consumers,
    header_macros,
    load_kernel,
    padded,
    tensor_map,
)
from tmbench_kernels.launch import LOG2_E, loadable, multiprocessors, positive
from tmbench_kernels.pattern import empty_output
from tmbench_kernels.triangle.combine import combine
from tmbench_kernels.triangle.splits import Schedule, heads_per_tile, new_splits, schedule_for

if TYPE_CHECKING:
    from tmbench_kernels.triangle import Triangle

SOURCE = Path(__file__).with_name("hopper.cu")
KERNEL = "triangle"
BOX = 16
"""Keys that the tensor memory accelerator brings at a time to a tile that mixes the window's edge with sinks."""
MOST_STAGES = 8
"""Depth of the pipeline, where the shared memory suffices; a stage holds a tile of keys or of values."""
REST_BYTES = 512
"""Shared memory for barriers and work tiles."""
WORK_TILE_STEPS = 2
"""What a work tile costs beyond its window, in tiles: the mixed tile, the masks, its queries and its output."""
PLAN = struct.Struct("2q18ifq")
"""The kernel's struct Plan."""


def settings(dim: int, v_dim: int, dtype: torch.dtype, *, lse: bool = False) -> dict[str, int]:
    """The macros of the kernel for these head sizes, up to 256, and this type, fp16 or bf16."""
    shared = {"STAGES": stages(dim, v_dim), "SHARED_BYTES": shared_bytes(dim, v_dim)}
    return header_macros(dim, v_dim, dtype, CONSUMERS=consumers(dim, v_dim), BOX=BOX, LSE=int(lse), **shared)


def stages(dim: int, v_dim: int) -> int:
    """Depth of the pipeline."""
    width = 2 * max(padded(dim), padded(v_dim))
    return min((SHARED_LIMIT - REST_BYTES - _queries_bytes(dim, v_dim)) // (width * KEYS), MOST_STAGES)


def shared_bytes(dim: int, v_dim: int) -> int:
    """Shared memory of a program: queries of two work tiles, which the outputs take over, the stages, and the rest."""
    width = 2 * max(padded(dim), padded(v_dim))
    return _queries_bytes(dim, v_dim) + width * stages(dim, v_dim) * KEYS + REST_BYTES


def _queries_bytes(dim: int, v_dim: int) -> int:
    return 2 * max(padded(dim), padded(v_dim)) * 2 * consumers(dim, v_dim) * WARPGROUP_ROWS


def _tile_schedule(schedule: Schedule, batch: int, programs: int) -> tuple[int, int, int, int]:
    """The tile schedule: last-row tiles, band tiles, and from which program and after how many rounds it is uneven.

    Last-row tiles go round first. Where they do not come out even, the programs without one (from ``extra_from`` on) get as
    many band tiles more as take the same time, after ``rounds`` rounds for all.
    """
    last_work = schedule.last_tiles * schedule.splits * schedule.head_tiles * batch
    band_work = schedule.band_tiles * schedule.head_tiles * batch
    extra_from = last_work % programs
    ahead = round(schedule.split_keys / KEYS / schedule.band_steps) if extra_from else 0
    rounds = max(0, (band_work - (programs - extra_from) * ahead) // programs)
    return last_work, band_work, extra_from, rounds


@dataclass(frozen=True)
class _Launch:
    """All that a launch needs but for the addresses of its tensors."""

    kernel: Kernel
    programs: int
    schedule: Schedule
    block: int
    """Rows of a tile that are one position: the query heads in it, rounded up to a power of two."""
    numbers: tuple[int | float, ...]
    """The kernel's struct Plan between its pointers."""


@lru_cache(maxsize=256)
def _launch(
    pattern: Triangle,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    length: int,
    kv_heads: int,
    v_dim: int,
    scale: float,
    lse: bool,
) -> _Launch:
    batch, heads, queries, dim = shape
    tile_heads = heads_per_tile(heads // kv_heads)
    shift = (tile_heads - 1).bit_length()
    programs = multiprocessors(device)
    schedule = schedule_for(
        pattern, batch, heads, kv_heads, length,
        positions=consumers(dim, v_dim) * WARPGROUP_ROWS >> shift, keys=KEYS, overhead=WORK_TILE_STEPS, slots=programs,
        queries=queries,
    )  # fmt: skip
    macros = tuple(settings(dim, v_dim, dtype, lse=lse).items())
    threads = 128 * (consumers(dim, v_dim) + 1)
    kernel = load_kernel(device, SOURCE, KERNEL, shared_bytes(dim, v_dim), threads, macros)
    numbers = (
        length, length - queries, schedule.tail, pattern.n_init, pattern.n_local, schedule.split_keys, schedule.splits,
        max(schedule.last_tiles, 1), batch, *_tile_schedule(schedule, batch, programs),
        heads, tile_heads, heads // kv_heads, shift, v_dim, scale * LOG2_E,
    )  # fmt: skip
    return _Launch(kernel, programs, schedule, 1 << shift, numbers)


Place = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Where a tensor lies: its address, shape and strides."""


def _place(x: Tensor) -> Place:
    return x.data_ptr(), x.shape, x.stride()


@lru_cache(maxsize=1024)
def _maps(dtype: torch.dtype, tile_heads: int, block: int, last_n: int, q: Place, k: Place, v: Place, out: Place) -> bytes:
    """The kernel's struct Maps: queries and outputs as [batch, queries, head tiles, tile_heads, dim], keys as they are."""

    def by_heads(place: Place, rows: int, positions: int) -> bytes:
        pointer, (batch, heads, _, dim), (by_batch, by_head, by_row, by_dim) = place
        sizes = (batch, max(rows, 1), heads // tile_heads, tile_heads, dim)
        strides = (by_batch, by_row, by_head * tile_heads, by_head, by_dim)
        return tensor_map(pointer, dtype, sizes, strides, (1, positions, 1, block, 64))

    def by_keys(place: Place, keys: int) -> bytes:
        pointer, shape, strides = place
        return tensor_map(pointer, dtype, shape, strides, (1, 1, keys, 64))

    queries = by_heads(q, q[1][2], WARPGROUP_ROWS // block)
    outputs = (by_heads(out, rows, 16 // block) for rows in (out[1][2] - last_n, out[1][2]))
    return b"".join((queries, by_keys(k, KEYS), by_keys(v, KEYS), by_keys(k, BOX), by_keys(v, BOX), *outputs))


def attend(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor, scale: float, *, lse: Tensor | None = None) -> Tensor:
    """Triangle attention ``[batch, heads, queries, v_dim]``, as a view of ``[batch, queries, heads, v_dim]``."""
    q, scale = positive(q, scale)
    q, k, v = loadable(q), loadable(k), loadable(v)
    launch = _launch(pattern, q.device, q.dtype, q.shape, k.shape[2], k.shape[1], v.shape[3], scale, lse is not None)
    schedule = launch.schedule
    out = empty_output(q, v)
    split_out, split_lse = new_splits(schedule, out)
    maps = _maps(q.dtype, schedule.tile_heads, launch.block, schedule.last_n, _place(q), _place(k), _place(v), _place(out))
    sums = 0 if lse is None else lse.data_ptr()
    plan = PLAN.pack(split_out.data_ptr(), split_lse.data_ptr(), *launch.numbers, sums)
    launch.kernel.launch(launch.programs, q.device, maps, plan)
    if schedule.splits > 1:
        combine(split_out, split_lse, out, lse)
    return out
