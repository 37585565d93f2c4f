"""How a prompt's rows are scheduled as tiles, and the last rows' keys into splits: alike for both triangle kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tmbench_kernels.triangle import Triangle

MAX_HEADS = 16
"""Query heads in one tile. More of them would leave too few positions to a tile."""
MAX_SPLITS = 64
ONE_LAUNCH = 4096
"""Up to this length the last rows walk over all keys in one program: a second launch would cost more than it saves."""


@dataclass(frozen=True)
class Schedule:
    """How a prompt's rows are cut into tiles, alike for both triangle kernels, in tiles of their own sizes."""

    tile_heads: int
    """Query heads in a tile, which share a key head."""
    head_tiles: int
    tail: int
    """The position of the first of the last rows."""
    last_n: int
    band_tiles: int
    last_tiles: int
    splits: int
    """How many splits the last rows' keys are cut into, each for one program."""
    split_keys: int
    band_steps: int
    """What one tile of the band costs, in tiles of keys."""


@lru_cache(maxsize=64)
def schedule_for(
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
    queries: int | None = None,
) -> Schedule:
    """Schedule for tiles of ``positions`` x ``keys``, for ``slots`` programs at a time that lose ``overhead`` tiles each.

    It is of a prompt of ``length`` tokens, or of its last ``queries`` alone. The last rows are split over the keys until one
    split takes no longer than what each slot has to do altogether; where there are no other rows, so that slots have the
    fewest tiles to do one after the other. Short prompts' are never split.
    """
    tile_heads = heads_per_tile(heads // kv_heads)
    head_tiles = heads // tile_heads
    rows = length if queries is None else queries
    last_n = min(pattern.last_n, rows)
    band_tiles = -(-(rows - last_n) // positions)
    last_tiles = -(-last_n // positions)
    steps = -(-length // keys)
    band_steps = pattern.n_local // keys + overhead
    work = batch * head_tiles * (band_tiles * band_steps + last_tiles * steps)
    splits = 1
    if length > ONE_LAUNCH and last_n and band_tiles:
        splits = min(-(-steps // max(work // slots, 4)), MAX_SPLITS)
    elif length > ONE_LAUNCH and last_n:
        programs = batch * head_tiles * last_tiles

        def cost(splits: int) -> int:
            return -(-programs * splits // slots) * (-(-steps // splits) + overhead)

        splits = min(range(1, min(steps // 4, MAX_SPLITS) + 1), key=cost, default=1)
    split_keys = -(-steps // splits) * keys
    return Schedule(tile_heads, head_tiles, length - last_n, last_n, band_tiles, last_tiles, splits, split_keys, band_steps)


@cache
def heads_per_tile(groups: int) -> int:
    """The most heads, of those that share a key head, that one tile takes."""
    return next(heads for heads in range(min(groups, MAX_HEADS), 0, -1) if groups % heads == 0)


def new_splits(schedule: Schedule, out: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the splits' outputs ``[splits, batch, last_n, heads, v_dim]`` and log-sum-exps, both to base 2."""
    if schedule.splits == 1:
        return out, out
    shape = (schedule.splits, out.shape[0], schedule.last_n, out.shape[1])
    split_out = torch.empty(*shape, out.shape[3], dtype=torch.float32, device=out.device)
    return split_out, torch.empty(shape, dtype=torch.float32, device=out.device)
