"""Triangle attention on Hopper, in CUDA C++: the host's side of hopper_triangle.cu."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tmbench_kernels.hopper import KEYS, TEAM_ROWS, Kernel, header_macros, load_kernel, padded, tensor_map
from tmbench_kernels.pattern import empty_output
from tmbench_kernels.triton_triangle import (
    LOG2_E,
    Cut,
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

SOURCE = Path(__file__).with_name("hopper_triangle.cu")
KERNEL = "triangle"
TEAMS = 3
BOX = 16
"""Keys that the tensor memory accelerator brings at a time to a tile that mixes the window's edge with sinks."""
UNITS = 8
"""Tiles of keys or values in flight."""
THREADS = 128 * (TEAMS + 1)
ITEM_STEPS = 2
"""What an item costs beyond its window, in tiles: the mixed tile, the masks, its queries and its output."""
PLAN = struct.Struct("2q17if")
"""The kernel's struct Plan."""


def settings(dim: int, v_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """The macros of the kernel for these head sizes, up to 128, and this type, fp16 or bf16."""
    return header_macros(dim, v_dim, dtype, TEAMS=TEAMS, BOX=BOX, UNITS=UNITS, SHARED_BYTES=shared_bytes(dim, v_dim))


def shared_bytes(dim: int, v_dim: int) -> int:
    """Shared memory of a program: queries of two items, which the outputs take over, the tiles in flight, and the rest."""
    return 2 * max(padded(dim), padded(v_dim)) * (2 * TEAMS * TEAM_ROWS + UNITS * KEYS) + 512


def _deal(cut: Cut, batch: int, programs: int) -> tuple[int, int, int, int]:
    """How items are dealt out: last-row items, band items, and from which program and after how many rounds it is uneven.

    Last-row items go round first. Where they do not come out even, the programs without one (from ``extra_from`` on) get as
    many band items more as take the same time, after ``rounds`` rounds for all.
    """
    last_items = cut.last_tiles * cut.parts * cut.head_tiles * batch
    band_items = cut.band_tiles * cut.head_tiles * batch
    extra_from = last_items % programs
    ahead = round(cut.part_keys / KEYS / cut.band_steps) if extra_from else 0
    rounds = max(0, (band_items - (programs - extra_from) * ahead) // programs)
    return last_items, band_items, extra_from, rounds


@dataclass(frozen=True)
class _Job:
    """All that a launch needs but for the addresses of its tensors."""

    kernel: Kernel
    programs: int
    cut: Cut
    block: int
    """Rows of a tile that are one position: the query heads in it, rounded up to a power of two."""
    numbers: tuple[int | float, ...]
    """The kernel's struct Plan behind its pointers."""


@lru_cache(maxsize=256)
def _job(
    pattern: Triangle,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    kv_heads: int,
    v_dim: int,
    scale: float,
) -> _Job:
    batch, heads, length, dim = shape
    tile_heads = heads_per_tile(heads // kv_heads)
    shift = (tile_heads - 1).bit_length()
    programs = multiprocessors(device)
    cut = cut_for(
        pattern, batch, heads, kv_heads, length,
        positions=TEAMS * TEAM_ROWS >> shift, keys=KEYS, overhead=ITEM_STEPS, slots=programs,
    )  # fmt: skip
    macros = tuple(settings(dim, v_dim, dtype).items())
    kernel = load_kernel(device, SOURCE, KERNEL, shared_bytes(dim, v_dim), THREADS, macros)
    numbers = (
        length, cut.tail, pattern.n_init, pattern.n_local, cut.part_keys, cut.parts, max(cut.last_tiles, 1), batch,
        *_deal(cut, batch, programs), heads, tile_heads, heads // kv_heads, shift, v_dim, scale * LOG2_E,
    )  # fmt: skip
    return _Job(kernel, programs, cut, 1 << shift, numbers)


Place = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Where a tensor lies: its address, shape and strides."""


def _place(x: Tensor) -> Place:
    return x.data_ptr(), x.shape, x.stride()


@lru_cache(maxsize=1024)
def _maps(dtype: torch.dtype, tile_heads: int, block: int, tail: int, q: Place, k: Place, v: Place, out: Place) -> bytes:
    """The kernel's struct Maps: queries and outputs as [batch, length, head tiles, tile_heads, dim], keys as they are."""

    def by_heads(place: Place, rows: int, positions: int) -> bytes:
        pointer, (batch, heads, _, dim), (by_batch, by_head, by_row, by_dim) = place
        sizes = (batch, max(rows, 1), heads // tile_heads, tile_heads, dim)
        strides = (by_batch, by_row, by_head * tile_heads, by_head, by_dim)
        return tensor_map(pointer, dtype, sizes, strides, (1, positions, 1, block, 64))

    def by_keys(place: Place, keys: int) -> bytes:
        pointer, shape, strides = place
        return tensor_map(pointer, dtype, shape, strides, (1, 1, keys, 64))

    queries = by_heads(q, q[1][2], TEAM_ROWS // block)
    outputs = (by_heads(out, rows, 16 // block) for rows in (tail, out[1][2]))
    return b"".join((queries, by_keys(k, KEYS), by_keys(v, KEYS), by_keys(k, BOX), by_keys(v, BOX), *outputs))


def attend(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Triangle attention ``[batch, heads, length, v_dim]``, as a view of ``[batch, length, heads, v_dim]``."""
    q, scale = positive(q, scale)
    q, k, v = loadable(q), loadable(k), loadable(v)
    job = _job(pattern, q.device, q.dtype, q.shape, k.shape[1], v.shape[3], scale)
    cut = job.cut
    out = empty_output(q, v)
    part_out, part_lse = new_parts(cut, out)
    maps = _maps(q.dtype, cut.tile_heads, job.block, cut.tail, _place(q), _place(k), _place(v), _place(out))
    plan = PLAN.pack(part_out.data_ptr(), part_lse.data_ptr(), *job.numbers)
    job.kernel.launch(job.programs, q.device, maps, plan)
    if cut.parts > 1:
        merge_parts(part_out, part_lse, cut, out)
    return out
