"""Vertical-slash attention on Hopper, in CUDA C++: the host's side of hopper_vertical_slash.cu."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from tmbench_kernels.hopper import load_kernel, padded, tensor_map
from tmbench_kernels.pattern import empty_output
from tmbench_kernels.triton_triangle import LOG2_E, loadable, multiprocessors, positive
from tmbench_kernels.triton_vertical_slash import Index, build_index, gathered
from tmbench_kernels.vertical_slash_torch import BLOCK

SOURCE = Path(__file__).with_name("hopper_vertical_slash.cu")
TEAMS = 3
UNITS = 5
"""Tiles in flight, of keys and values both."""
THREADS = 128 * (TEAMS + 1)
PLAN = struct.Struct("7q7if")
"""The kernel's struct Plan."""


def settings(dim: int, v_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """The macros of the kernel for these head sizes, up to 128, and this type, fp16 or bf16."""
    sizes = {"TEAMS": TEAMS, "TEAM_ROWS": BLOCK, "KEYS": BLOCK, "UNITS": UNITS, "SHARED_BYTES": shared_bytes(dim, v_dim)}
    return {"DIM": padded(dim), "V_DIM": padded(v_dim), "HALF": int(dtype == torch.float16)} | sizes


def shared_bytes(dim: int, v_dim: int) -> int:
    """Shared memory of a program: every team's queries, which its output takes over, the tiles in flight, and the rest."""
    dim, v_dim = padded(dim), padded(v_dim)
    return 2 * BLOCK * (TEAMS * max(dim, v_dim) + UNITS * (dim + v_dim)) + 1024


def _tiles(x: Tensor, rows: int = BLOCK) -> bytes:
    """The map of a tensor [batch, heads, length, dim] in tiles of so many rows."""
    return tensor_map(x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), (1, 1, rows, 64))


def attend_index(q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float) -> Tensor:
    """Attention over an index, ``[batch, heads, length, v_dim]``, a view of ``[batch, length, heads, v_dim]``.

    The index must be of a selection with distance 0: then no selected column lies in a block of queries outside its runs.
    """
    q, scale = positive(q, scale)
    q, k, v = loadable(q), loadable(k), loadable(v)
    k_columns, v_columns = (loadable(gathered(x, index)) for x in (k, v))
    batch, heads, length, dim = q.shape
    rows, most, width = index.counts.shape[2], index.starts.shape[3], index.columns.shape[2]
    v_dim = v.shape[3]
    out = empty_output(q, v)
    maps = b"".join(_tiles(x) for x in (q, k, v, k_columns, v_columns)) + _tiles(out, 16)
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    plan = PLAN.pack(
        *(x.data_ptr() for x in (index.starts, index.counts, index.kept, index.before, index.reach, index.sinks, taken)),
        length, rows, most, width, heads, heads // k.shape[1], batch * heads * -(-rows // TEAMS), scale * LOG2_E,
    )  # fmt: skip
    macros = tuple(settings(dim, v_dim, q.dtype).items())
    kernel = load_kernel(q.device, SOURCE, "vertical_slash", shared_bytes(dim, v_dim), THREADS, macros)
    kernel.launch(multiprocessors(q.device), q.device, maps, plan)
    return out


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, columns: Tensor, distances: Tensor, most_columns: int, most_distances: int, scale: float
) -> Tensor:
    """Attention over a selection of at most so many columns and distances a head, distance 0 among them."""
    return attend_index(q, k, v, build_index(columns, distances, most_columns, most_distances), scale)
