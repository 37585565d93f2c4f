"""Triangle attention of chunks of prompts whose keys and values lie scattered over a serving engine's paged cache.

The keys that a chunk's rows see are gathered into contiguous memory first, and any backend of the pattern attends over them.
Rows of the band see the sinks, the window and their own chunk, so no other key is read for them. Without the keys between,
the prompt is a shorter one with the same pattern: distances within the window stay, and sinks stay the first keys. Only a
chunk that holds some of its prompt's last rows gathers all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tmbench_kernels.triangle import Triangle


@dataclass(frozen=True)
class Chunk:
    """Some rows of one prompt that are computed together. Raises ValueError for what can be no chunk of a prompt."""

    row: int
    """The prompt's row in the table of slots."""
    start: int
    """The position of the first row: so many keys are in the cache before the chunk's."""
    end: int
    """The position behind the last row. The chunk's own keys are in the cache too."""
    length: int
    """How many tokens the whole prompt has."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= self.length:
            raise ValueError(f"rows {self.start} to {self.end} are no chunk of a prompt of {self.length} tokens")

    def gathered(self, pattern: Triangle) -> tuple[Triangle, int, int]:
        """The pattern for the chunk, and which keys it takes: as many first ones, and all from a position to the end.

        The pattern is for those keys alone, in their order.
        """
        chunk = pattern.of_chunk(self.end, self.length)
        low = max(self.start - max(pattern.n_local - 1, 0), 0)
        if chunk.last_n or low <= pattern.n_init:
            return chunk, 0, 0
        return chunk, pattern.n_init, low

    def keys(self, pattern: Triangle) -> int:
        """How many keys, and as many values, are gathered for the chunk."""
        _, sinks, low = self.gathered(pattern)
        return sinks + self.end - low


def attend_paged(
    pattern: Triangle,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    chunks: Sequence[Chunk],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Triangle attention of one layer for a ragged batch of chunks, each of a prompt of known length.

    Args:
        pattern: that of a whole prompt.
        q: ``[tokens, heads, dim]``, the rows of all chunks one after another. Rows behind them are padding.
        k_cache, v_cache: ``[slots, kv_heads, dim]`` and likewise v_dim: one slot holds one token's key or value.
        slots: ``[prompts, positions]``, whole numbers: the slot of each prompt's token at each position.
        chunks: which rows of which prompts q has.
        scale, softcap, sinks: as ``Pattern.attend`` has them.

    Returns:
        ``[tokens, heads, v_dim]``, contiguous; zeros for padding.

    Beside that it takes memory for the keys and values of one chunk at a time: those that ``Chunk.keys`` counts.
    Raises ValueError for more rows of chunks than q has, and as ``Pattern.attend`` does.
    """
    rows = sum(chunk.end - chunk.start for chunk in chunks)
    if rows > q.shape[0]:
        raise ValueError(f"the chunks have {rows} rows, and q has {q.shape[0]}")
    out = q.new_empty(*q.shape[:2], v_cache.shape[2])
    out[rows:] = 0
    first = 0
    for chunk in chunks:
        part = slice(first, first := first + chunk.end - chunk.start)
        near, n_init, low = chunk.gathered(pattern)
        table = slots[chunk.row]
        where = torch.cat([table[:n_init], table[low : chunk.end]]) if n_init else table[low : chunk.end]
        k, v = (cache.index_select(0, where).transpose(0, 1)[None] for cache in (k_cache, v_cache))
        attended = near.attend(q[part].transpose(0, 1)[None], k, v, scale=scale, softcap=softcap, sinks=sinks)
        out[part] = attended[0].transpose(0, 1)
    return out
