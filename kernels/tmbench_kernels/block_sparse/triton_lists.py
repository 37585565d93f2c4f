"""Block lists from a bool map in Triton: the map is read once, its causal half alone, and the lists are written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "blocks"])
def _list(map_ptr, counts_ptr, indices_ptr, rows, blocks, TILE: tl.constexpr):
    """One row of the map: one block of queries of one head."""
    program = tl.program_id(0)
    own = blocks - rows + program % rows
    place = program.to(tl.int64) * blocks
    count = 0
    for first in range(0, blocks, TILE):
        column = first + tl.arange(0, TILE)
        listed = tl.load(map_ptr + place + column, mask=column <= own, other=0).to(tl.int32)
        ranks = count + tl.cumsum(listed, 0)
        # The list grows from the front, the other blocks from the back: no count needs to be known before.
        slots = tl.where(listed != 0, ranks - 1, blocks - 1 - column + ranks)
        tl.store(indices_ptr + place + slots, column, mask=column < blocks)
        count += tl.sum(listed, 0)
    tl.store(counts_ptr + program, count)


def list_blocks(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices of a bool map ``[batch, heads, q_blocks, k_blocks]``, as ``BlockLists.from_map`` defines them."""
    rows, blocks = block_map.shape[2:]
    block_map = block_map.contiguous()
    counts = torch.empty(block_map.shape[:3], dtype=torch.int32, device=block_map.device)
    indices = torch.empty(block_map.shape, dtype=torch.int32, device=block_map.device)
    _list[(counts.numel(),)](block_map.view(torch.uint8), counts, indices, rows, blocks, TILE=1024, num_warps=4)
    return counts, indices
