"""Dense attention of every delta-th query on Hopper, by the kernel over listed keys with nothing listed: the host's side.

A block is 64 such rows of one head. Those of a long prompt's last block see all keys, those of its first almost none. So
keys are cut into pieces, several for each multiprocessor, and the longest come first. Pieces of one length begin at the same
keys, which then come from the cache. A second, small launch combines them by their log-sum-exp.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tmbench_kernels.block_sparse.hopper_backend import loaded, tile_map
from tmbench_kernels.hopper import KEYS, WARPGROUP_ROWS, consumers
from tmbench_kernels.launch import LOG2_E, loadable, multiprocessors, positive
from tmbench_kernels.pattern import empty_output
from tmbench_kernels.triangle.combine import combine
from tmbench_kernels.triangle.delta import Rows

PIECES = 8
"""How many pieces of the greatest length would be a multiprocessor's share."""
LEAST_KEYS = 16 * KEYS
"""The fewest keys that are worth a piece of their own."""
PLAN = struct.Struct("4q10if4x")
"""The kernel's struct Plan."""


class Piece(NamedTuple):
    """What a work tile computes, as the kernel reads it.

    A unit is a block of rows of one query head. Those of one key head are numbered by block, and then by head.
    """

    unit: int
    """The unit of the first consumer; every further consumer has the one before."""
    low: int
    """The first key."""
    high: int
    """The end of the keys: of the split, or of those that the first consumer's rows see."""
    split: int


def pieces(rows: Rows, groups: int, copies: int, workers: int, programs: int) -> list[Piece]:
    """The pieces of one key head, the longest first.

    They are for ``groups`` query heads, ``copies`` key heads alike, and programs of so many consumers.
    """
    blocks = -(-rows.count // WARPGROUP_ROWS)
    ends = {
        unit: rows.position(min((unit // groups + 1) * WARPGROUP_ROWS, rows.count) - 1) + 1
        for unit in range(blocks * groups - 1, -1, -workers)
    }
    share = copies * sum(ends.values()) // programs
    splits = -(-max(ends.values()) // max(share // PIECES, LEAST_KEYS))
    size = -(-max(ends.values()) // (splits * KEYS)) * KEYS
    cut = [Piece(unit, low, min(low + size, end), low // size) for unit, end in ends.items() for low in range(0, end, size)]
    return sorted(cut, key=lambda piece: (piece.low - piece.high, piece.split))


@lru_cache(maxsize=64)
def _table(rows: Rows, groups: int, copies: int, workers: int, programs: int) -> tuple[Tensor, int]:
    """The pieces as the kernel reads them, in memory that a GPU copies from while the host goes on, and how many splits."""
    found = pieces(rows, groups, copies, workers, programs)
    return torch.tensor(found, dtype=torch.int32).pin_memory(), 1 + max(piece.split for piece in found)


def attend_rows(rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, *, lse: Tensor | None = None) -> Tensor:
    """Dense attention of the rows, ``[batch, heads, rows.count, v_dim]``; fills ``lse`` where it is given."""
    queries, scale = positive(rows.take(q), scale)
    queries, k, v = loadable(queries), loadable(k), loadable(v)
    batch, heads, count, dim = queries.shape
    kv_heads, v_dim, programs = k.shape[1], v.shape[3], multiprocessors(q.device)
    table, splits = _table(rows, heads // kv_heads, batch * kv_heads, consumers(dim, v_dim), programs)
    out = empty_output(queries, v)
    split_lse = out.new_full((splits, batch, count, heads), -torch.inf, dtype=torch.float32)
    split_out = split_lse.new_empty(*split_lse.shape, v_dim)
    table = table.to(q.device, non_blocking=True)
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    plan = PLAN.pack(
        table.data_ptr(), taken.data_ptr(), split_out.data_ptr(), split_lse.data_ptr(),
        k.shape[2], rows.start, rows.first, rows.delta, count, heads, heads // kv_heads, batch, v_dim,
        len(table) * batch * kv_heads, scale * LOG2_E,
    )  # fmt: skip
    maps = b"".join(tile_map(x, KEYS) for x in (queries, k, v))
    loaded(q.device, dim, v_dim, q.dtype, spread=True).launch(programs, q.device, maps, plan)
    combine(split_out, split_lse, out, lse)
    return out
