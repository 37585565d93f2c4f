"""Triangle attention on Hopper, in CUDA C++: the host's side of hopper_triangle.cu."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tmbench_kernels.hopper import Kernel, load_kernel, tensor_map
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
TEAMS = 3
TEAM_ROWS = 64
"""Query rows of a team: what one warpgroup multiplies at once."""
KEYS = 64
"""Keys of a tile."""
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
    sizes = {"TEAMS": TEAMS, "TEAM_ROWS": TEAM_ROWS, "KEYS": KEYS, "BOX": BOX, "UNITS": UNITS}
    shared = {"SHARED_BYTES": shared_bytes(dim, v_dim)}
    return {"DIM": _padded(dim), "V_DIM": _padded(v_dim), "HALF": int(dtype == torch.float16)} | sizes | shared


def shared_bytes(dim: int, v_dim: int) -> int:
    """Shared memory of a program: queries of two items, which the outputs take over, the tiles in flight, and the rest."""
    return 2 * max(_padded(dim), _padded(v_dim)) * (2 * TEAMS * TEAM_ROWS + UNITS * KEYS) + 512


def _padded(dim: int) -> int:
    return -(-dim // 64) * 64


def _kernel(device: torch.device, dim: int, v_dim: int, dtype: torch.dtype) -> Kernel:
    macros = tuple(settings(dim, v_dim, dtype).items())
    return load_kernel(device, SOURCE, "triangle", shared_bytes(dim, v_dim), THREADS, macros)


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


def _heads_map(x: Tensor, tile_heads: int, rows: int, box: tuple[int, int]) -> bytes:
    """The map of a tensor [batch, heads, length, dim] as [batch, length, head tiles, tile_heads, dim], up to ``rows``."""
    batch, heads, _, dim = x.shape
    by_batch, by_head, by_row, by_dim = x.stride()
    return tensor_map(
        x.data_ptr(), x.dtype, (batch, max(rows, 1), heads // tile_heads, tile_heads, dim),
        (by_batch, by_row, by_head * tile_heads, by_head, by_dim), (1, box[0], 1, box[1], 64),
    )  # fmt: skip


def _keys_map(x: Tensor, keys: int) -> bytes:
    return tensor_map(x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), (1, 1, keys, 64))


def attend(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Triangle attention ``[batch, heads, length, v_dim]``, as a view of ``[batch, length, heads, v_dim]``."""
    q, scale = positive(q, scale)
    q, k, v = loadable(q), loadable(k), loadable(v)
    batch, heads, length, dim = q.shape
    groups, v_dim = heads // k.shape[1], v.shape[3]
    tile_heads = heads_per_tile(groups)
    head_shift = (tile_heads - 1).bit_length()
    block = 1 << head_shift
    programs = multiprocessors(q.device)
    cut = cut_for(
        pattern, batch, heads, k.shape[1], length,
        positions=TEAMS * TEAM_ROWS // block, keys=KEYS, overhead=ITEM_STEPS, slots=programs,
    )  # fmt: skip
    out = empty_output(q, v)
    part_out, part_lse = new_parts(cut, out)
    maps = b"".join(
        (
            _heads_map(q, tile_heads, length, (TEAM_ROWS // block, block)),
            _keys_map(k, KEYS),
            _keys_map(v, KEYS),
            _keys_map(k, BOX),
            _keys_map(v, BOX),
            _heads_map(out, tile_heads, cut.tail, (16 // block, block)),
            _heads_map(out, tile_heads, length, (16 // block, block)),
        )
    )
    plan = PLAN.pack(
        part_out.data_ptr(), part_lse.data_ptr(),
        length, cut.tail, pattern.n_init, pattern.n_local, cut.part_keys, cut.parts, max(cut.last_tiles, 1), batch,
        *_deal(cut, batch, programs), heads, tile_heads, groups, head_shift, v_dim, scale * LOG2_E,
    )  # fmt: skip
    _kernel(q.device, dim, v_dim, q.dtype).launch(programs, q.device, maps, plan)
    if cut.parts > 1:
        merge_parts(part_out, part_lse, cut, out)
    return out
