"""Attention over listed keys on Hopper, in CUDA C++: the host's side of hopper_lists.cu.

Two callers: vertical-slash patterns, whose lists hold pieces of 64 keys that start anywhere and who have gathered columns
beside them, and patterns of whole key blocks.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from tmbench_kernels.block_lists import BlockLists
from tmbench_kernels.hopper import KEYS, TEAM_ROWS, header_macros, load_kernel, padded, tensor_map
from tmbench_kernels.pattern import empty_output
from tmbench_kernels.triton_triangle import LOG2_E, loadable, multiprocessors, positive
from tmbench_kernels.triton_vertical_slash import Index, gathered

SOURCE = Path(__file__).with_name("hopper_lists.cu")
KERNEL = "lists"
TEAMS = 3
UNITS = 5
"""Tiles in flight, of keys and values both."""
THREADS = 128 * (TEAMS + 1)
PLAN = struct.Struct("7q9if")
"""The kernel's struct Plan."""


def settings(dim: int, v_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """The macros of the kernel for these head sizes, up to 128, and this type, fp16 or bf16."""
    return header_macros(dim, v_dim, dtype, TEAMS=TEAMS, UNITS=UNITS, SHARED_BYTES=shared_bytes(dim, v_dim))


def shared_bytes(dim: int, v_dim: int) -> int:
    """Shared memory of a program: every team's queries, which its output takes over, the tiles in flight, and the rest."""
    dim, v_dim = padded(dim), padded(v_dim)
    return 2 * (TEAMS * TEAM_ROWS * max(dim, v_dim) + UNITS * KEYS * (dim + v_dim)) + 1024


def attend_index(q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float) -> Tensor:
    """Attention over an index, ``[batch, heads, length, v_dim]``, a view of ``[batch, length, heads, v_dim]``.

    The index must be of a selection with distance 0: then no selected column lies in a block of queries outside its runs.
    """
    return _attend(q, k, v, index, scale)


def attend_lists(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float) -> Tensor:
    """Attention over the listed blocks, of 64 keys or a multiple: as ``attend_index``."""
    return _attend(q, k, v, lists, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, listed: Index | BlockLists, scale: float) -> Tensor:
    q, scale = positive(q, scale)
    q, k, v = loadable(q), loadable(k), loadable(v)
    batch, heads, length, dim = q.shape
    v_dim, rows = v.shape[3], -(-length // TEAM_ROWS)
    if isinstance(listed, Index):
        entries, unit, block, width = listed.starts, 1, TEAM_ROWS, listed.columns.shape[2]
        columns = tuple(loadable(gathered(x, listed)) for x in (k, v))
        tables = [table.data_ptr() for table in (listed.kept, listed.before, listed.reach, listed.sinks)]
    else:
        entries, unit, block, width = listed.indices, listed.block, listed.block, 0
        columns, tables = (k, v), [0, 0, 0, 0]
    out = empty_output(q, v)
    maps = b"".join(_tiles(x, KEYS) for x in (q, k, v, *columns)) + _tiles(out, 16)
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    plan = PLAN.pack(
        entries.data_ptr(), listed.counts.data_ptr(), *tables, taken.data_ptr(),
        length, rows, block // TEAM_ROWS, unit, entries.shape[3], width, heads, heads // k.shape[1],
        batch * heads * -(-rows // TEAMS), scale * LOG2_E,
    )  # fmt: skip
    macros = tuple(settings(dim, v_dim, q.dtype).items())
    kernel = load_kernel(q.device, SOURCE, KERNEL, shared_bytes(dim, v_dim), THREADS, macros)
    kernel.launch(multiprocessors(q.device), q.device, maps, plan)
    return out


def _tiles(x: Tensor, rows: int) -> bytes:
    """The map of a tensor [batch, heads, length, dim] in tiles of so many rows."""
    return tensor_map(x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), (1, 1, rows, 64))
