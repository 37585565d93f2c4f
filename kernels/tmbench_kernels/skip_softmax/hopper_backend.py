"""Skip-softmax on Hopper, in CUDA C++: the host's side of hopper.cu."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tmbench_kernels.block_sparse.lists import BLOCK, block_count
from tmbench_kernels.hopper import SHARED_LIMIT, WARPGROUP_ROWS, header_macros, load_kernel, padded, tensor_map
from tmbench_kernels.launch import LOG2_E, loadable, multiprocessors, positive
from tmbench_kernels.pattern import empty_output

if TYPE_CHECKING:
    from tmbench_kernels.skip_softmax import SkipSoftmax

SOURCE = Path(__file__).with_name("hopper.cu")
KERNEL = "skip_softmax"
CONSUMERS = BLOCK // WARPGROUP_ROWS
"""Consumer warpgroups of a program: those of a tile's queries."""
MOST_STAGES = 5
"""Depth of the pipeline of keys, where the shared memory suffices."""
VALUE_STAGES = 2
"""Depth of the pipeline of values: one that is multiplied, and one that is filled."""
REST_BYTES = 1024
"""Shared memory for barriers and work tiles."""
PLAN = struct.Struct("2q8i2f")
"""The kernel's struct Plan."""


def settings(dim: int, v_dim: int, dtype: torch.dtype, *, lse: bool = False) -> dict[str, int]:
    """The macros of the kernel for these head sizes, q and k up to 192 and v up to 128, and this type, fp16 or bf16."""
    shared = {"STAGES": stages(dim, v_dim), "V_STAGES": VALUE_STAGES, "SHARED_BYTES": shared_bytes(dim, v_dim)}
    return header_macros(dim, v_dim, dtype, CONSUMERS=CONSUMERS, KEYS=BLOCK, LSE=int(lse), **shared)


def stages(dim: int, v_dim: int) -> int:
    """Depth of the pipeline of keys."""
    return min((SHARED_LIMIT - REST_BYTES - _other_bytes(dim, v_dim)) // _keys_bytes(dim), MOST_STAGES)


def shared_bytes(dim: int, v_dim: int) -> int:
    """Shared memory of a program: queries, whose place the output takes over, stages of keys and of values, and the rest."""
    return _other_bytes(dim, v_dim) + stages(dim, v_dim) * _keys_bytes(dim) + REST_BYTES


def _other_bytes(dim: int, v_dim: int) -> int:
    return 2 * BLOCK * (max(padded(dim), padded(v_dim)) + VALUE_STAGES * padded(v_dim))


def _keys_bytes(dim: int) -> int:
    return 2 * BLOCK * padded(dim)


def attend(pattern: SkipSoftmax, q: Tensor, k: Tensor, v: Tensor, scale: float, *, lse: Tensor | None = None) -> Tensor:
    """Attention ``[batch, heads, queries, v_dim]``, as a view of ``[batch, queries, heads, v_dim]``."""
    q, scale = positive(q, scale)
    q, k, v = loadable(q), loadable(k), loadable(v)
    batch, heads, queries, dim = q.shape
    length, v_dim = k.shape[2], v.shape[3]
    first_query = length - queries
    first_block, first_row = first_query // BLOCK, first_query // WARPGROUP_ROWS
    blocks = block_count(length) - first_block
    out = empty_output(q, v)
    written = out[:, :, : (first_row + 1) * WARPGROUP_ROWS - first_query]
    maps = b"".join(
        tensor_map(x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), (1, 1, rows, 64))
        for x, rows in ((q, WARPGROUP_ROWS), (k, BLOCK), (v, BLOCK), (written, 16), (out, 16))
    )
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    plan = PLAN.pack(
        taken.data_ptr(), 0 if lse is None else lse.data_ptr(),
        length, first_query, first_block, blocks, pattern.order == "ascending", heads, heads // k.shape[1],
        batch * heads * blocks, pattern.least(length) / scale, scale * LOG2_E,
    )  # fmt: skip
    macros = tuple(settings(dim, v_dim, q.dtype, lse=lse is not None).items())
    kernel = load_kernel(q.device, SOURCE, KERNEL, shared_bytes(dim, v_dim), 128 * (CONSUMERS + 1), macros)
    kernel.launch(multiprocessors(q.device), q.device, maps, plan)
    return out
