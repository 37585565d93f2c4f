"""Attention over listed keys on Hopper, in CUDA C++: the host's side of hopper.cu.

Three callers: patterns of whole key blocks, here; vertical-slash patterns, whose lists hold pieces of 64 keys that start
anywhere and who have gathered columns beside them; and dense rows that lie apart, which have no lists and a launch of their
own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tmbench_kernels.block_sparse.lists import BlockLists
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

SOURCE = Path(__file__).with_name("hopper.cu")
KERNEL = "lists"
MOST_STAGES = 5
"""Depth of the pipeline, where the shared memory suffices; a stage holds a tile of keys and one of values."""
REST_BYTES = 1024
"""Shared memory for barriers, work tiles and what is said of each tile of keys."""
PLAN = struct.Struct("7q11ifq")
"""The kernel's struct Plan."""


def settings(dim: int, v_dim: int, dtype: torch.dtype, *, lse: bool = False, spread: bool = False) -> dict[str, int]:
    """The macros of the kernel for these head sizes, up to 256, and this type, fp16 or bf16.

    ``spread`` is for rows that lie apart; they leave their log-sum-exp in any case.
    """
    shared = {"STAGES": stages(dim, v_dim), "SHARED_BYTES": shared_bytes(dim, v_dim), "SPREAD": int(spread)}
    return header_macros(dim, v_dim, dtype, CONSUMERS=consumers(dim, v_dim), LSE=int(lse), **shared)


def stages(dim: int, v_dim: int) -> int:
    """Depth of the pipeline."""
    return min((SHARED_LIMIT - REST_BYTES - _queries_bytes(dim, v_dim)) // _stage_bytes(dim, v_dim), MOST_STAGES)


def shared_bytes(dim: int, v_dim: int) -> int:
    """Shared memory of a program: every consumer's queries, which its output takes over, the stages, and the rest."""
    return _queries_bytes(dim, v_dim) + stages(dim, v_dim) * _stage_bytes(dim, v_dim) + REST_BYTES


def _queries_bytes(dim: int, v_dim: int) -> int:
    return 2 * max(padded(dim), padded(v_dim)) * consumers(dim, v_dim) * WARPGROUP_ROWS


def _stage_bytes(dim: int, v_dim: int) -> int:
    return 2 * KEYS * (padded(dim) + padded(v_dim))


@dataclass(frozen=True, eq=False)
class Lists:
    """Where the keys of every block of queries lie, for the kernel."""

    entries: Tensor
    """int32 ``[batch, heads, lists, most]``, ascending: where pieces start, in units of ``unit`` keys."""
    counts: Tensor
    """int32 ``[batch, heads, lists]``: how many entries each list has."""
    unit: int
    block: int
    """Queries that share a list, and keys of an entry: 64 or a multiple."""
    columns: tuple[Tensor, Tensor] | None = None
    """Keys and values gathered for each query head, ``[batch, heads, width, dim]``."""
    tables: tuple[Tensor, ...] = ()
    """``kept``, ``before``, ``reach`` and ``sinks`` of an index, where there are columns."""


def attend_lists(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, *, lse: Tensor | None = None) -> Tensor:
    """Attention over the listed blocks, of 64 keys or a multiple: ``[batch, heads, queries, v_dim]``.

    The output is a view of ``[batch, queries, heads, v_dim]``.
    """
    return attend(q, k, v, Lists(lists.indices, lists.counts, lists.block, lists.block), scale, lse=lse)


def attend(q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, *, lse: Tensor | None = None) -> Tensor:
    """As ``attend_lists``, over lists as the kernel takes them."""
    q, scale = positive(q, scale)
    q, k, v = loadable(q), loadable(k), loadable(v)
    batch, heads, queries, dim = q.shape
    length, v_dim, fold = k.shape[2], v.shape[3], lists.block // WARPGROUP_ROWS
    first_query = length - queries
    first_row = first_query // WARPGROUP_ROWS
    rows = -(-length // WARPGROUP_ROWS) - first_row
    k_columns, v_columns = lists.columns or (k, v)
    width = k_columns.shape[2] if lists.columns else 0
    tables = [table.data_ptr() for table in lists.tables] or [0, 0, 0, 0]
    out = empty_output(q, v)
    maps = b"".join(tile_map(x, KEYS) for x in (q, k, v, k_columns, v_columns))
    maps += tile_map(out[:, :, : (first_row + 1) * WARPGROUP_ROWS - first_query], 16) + tile_map(out, 16)
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    plan = PLAN.pack(
        lists.entries.data_ptr(), lists.counts.data_ptr(), *tables, taken.data_ptr(),
        length, first_query, first_row, rows, fold, lists.unit, lists.entries.shape[3], width,
        heads, heads // k.shape[1], batch * heads * -(-rows // consumers(dim, v_dim)), scale * LOG2_E,
        0 if lse is None else lse.data_ptr(),
    )  # fmt: skip
    loaded(q.device, dim, v_dim, q.dtype, lse=lse is not None).launch(multiprocessors(q.device), q.device, maps, plan)
    return out


def loaded(
    device: torch.device, dim: int, v_dim: int, dtype: torch.dtype, *, lse: bool = False, spread: bool = False
) -> Kernel:
    """The kernel with these ``settings`` on a device."""
    macros = tuple(settings(dim, v_dim, dtype, lse=lse, spread=spread).items())
    return load_kernel(device, SOURCE, KERNEL, shared_bytes(dim, v_dim), 128 * (consumers(dim, v_dim) + 1), macros)


def tile_map(x: Tensor, rows: int) -> bytes:
    """The map of a tensor [batch, heads, length, dim] in tiles of so many rows."""
    return tensor_map(x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), (1, 1, rows, 64))
