"""MInference's offline search: how much of a head's attention each candidate pattern keeps.

Jiang et al. 2024, arXiv 2407.02490, section 3.2; candidates and objective are those of the released code. The objective is
the attention that falls on a candidate's pairs, averaged over the queries from 2500 on. It is counted token by token: runs,
kernel blocks and forced distances beyond 30, which exist at run time only, play no part in it. The matrix of probabilities
is never whole: blocks of query rows are computed, weighed and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tmbench_kernels.minference.head_patterns import HeadPattern
from tmbench_kernels.scores import last_query_mass
from tmbench_kernels.vertical_slash import DEFAULT_BUDGET, LAST_QUERIES, top_entries

CANDIDATES = (
    HeadPattern("stream_llm", 100, 800),
    HeadPattern("vertical_and_slash", 30, 800),
    HeadPattern("vertical_and_slash", 100, 750),
    HeadPattern("vertical_and_slash", 500, 700),
    HeadPattern("vertical_and_slash", 3500, 100),
    HeadPattern("block_sparse", *DEFAULT_BUDGET),
)
"""In the order in which a tie is decided. The numbers of the block-sparse one are those that the published files give such a
head when they call it vertical-slash; as a block-sparse head it has no budget."""

FIRST_ROW = 2500
"""Queries before this one do not count: they see little that could be left out."""
FORCED = 30
"""First columns and smallest distances that a vertical-slash candidate always has in the search."""
BLOCK = 32
BLOCK_SHARE = 8
"""A block-sparse candidate keeps, for 32 queries, the heaviest of all blocks of 32 keys, one in so many."""

_ELEMENTS = {"cpu": 2**23, "cuda": 2**28}
"""How many probabilities are held at a time; what is made of them takes a few times as much."""


def kept_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    candidates: Sequence[HeadPattern] = CANDIDATES,
    first_row: int = FIRST_ROW,
    advance: Callable[[float], None] = lambda part: None,
) -> Tensor:
    """The part of its attention, 0 to 1, that each candidate keeps of each head: float64 ``[heads, candidates]``.

    Args:
        q: ``[heads, length, head_dim]``, the query heads of one key head, rotary embedding applied.
        k: ``[length, head_dim]``.
        scale: multiplies the logits.
        candidates: what to weigh.
        first_row: the first query that counts.
        advance: told after each block of rows what part of the work it was; the parts add up to 1.

    Raises:
        ValueError: ``first_row`` is past the last query.
    """
    heads, length = q.shape[:2]
    if not 0 <= first_row < length:
        raise ValueError(f"the search counts queries from {first_row} on, but there are {length}")
    sets = {n: _sets(entry, q, k, scale) for n, entry in enumerate(candidates) if entry.type != "block_sparse"}
    kept = torch.zeros(heads, len(candidates), dtype=torch.float64, device=q.device)
    # Whole blocks of rows, so that each block's keys are chosen once, by all of its rows.
    start = first_row // BLOCK * BLOCK
    rows = max(1, _ELEMENTS[q.device.type] // (heads * length * BLOCK)) * BLOCK
    for low in range(start, length, rows):
        high = min(low + rows, length)
        attention = _attention(q[:, low:high], k[:high], low, scale)
        counted = torch.arange(low, high, device=q.device) >= first_row
        for n, entry in enumerate(candidates):
            if entry.type == "block_sparse":
                by_row = _kept_by_blocks(attention, -(-length // BLOCK))
            else:
                by_row = _kept_by_sets(attention, *sets[n], low)
            kept[:, n] += (by_row.double() * counted).sum(1)
        advance((high - low) / (length - start))
    return kept / (length - first_row)


def best_pattern(kept: Sequence[float], candidates: Sequence[HeadPattern] = CANDIDATES) -> HeadPattern:
    """The candidate that keeps most, the first of those that keep as much; its score is what it keeps."""
    best = max(range(len(candidates)), key=kept.__getitem__)
    winner = candidates[best]
    return HeadPattern(winner.type, winner.vertical, winner.slash, kept[best])


def published_remapping(head: HeadPattern) -> HeadPattern:
    """What the released search writes for a winner: vertical-slash always, a block-sparse one with the default budget."""
    budget = DEFAULT_BUDGET if head.type == "block_sparse" else (head.vertical, head.slash)
    return HeadPattern("vertical_and_slash", *budget, head.score)


def _sets(entry: HeadPattern, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The columns and distances of a candidate, bool ``[heads, length]`` each."""
    heads, length = q.shape[:2]
    if entry.type == "stream_llm":
        positions = torch.arange(length, device=q.device).expand(heads, -1)
        # The window of the search reaches one key further than that of a streaming head at run time.
        return positions < entry.vertical, positions <= entry.slash
    columns, distances = last_query_mass(q[None], k[None, None], scale, LAST_QUERIES)
    columns[..., :FORCED] = torch.inf
    distances[..., :FORCED] = torch.inf
    columns, distances = (
        top_entries(mass, (min(length, size),)) for mass, size in ((columns, entry.vertical), (distances, entry.slash))
    )
    return columns[0], distances[0]


def _attention(q: Tensor, k: Tensor, low: int, scale: float) -> Tensor:
    """Probabilities of the queries from ``low`` on over the keys up to the last of them, float32 ``[heads, rows, keys]``."""
    rows = q.shape[1]
    logits = (q.float() @ k.float().T).mul_(scale)
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    logits[..., low:].masked_fill_(future, -torch.inf)
    return logits.softmax(-1)


def _kept_by_sets(attention: Tensor, columns: Tensor, distances: Tensor, low: int) -> Tensor:
    """What falls on selected columns or distances, by row: ``[heads, rows]``."""
    heads, rows, keys = attention.shape
    # From the largest distance down, a step of one key follows a row; a step back by one, the next row. Strides go
    # forward only, so the rows are laid out from the last to the first.
    falling = F.pad(distances[:, :keys].flip(1), (0, rows))
    mask = falling.as_strided((heads, rows, keys), (falling.stride(0), 1, 1)).flip(1)
    mask |= columns[:, None, :keys]
    return torch.where(mask, attention, 0.0).sum(2)


def _kept_by_blocks(attention: Tensor, blocks: int) -> Tensor:
    """What falls on the heaviest of ``blocks`` key blocks, chosen for every 32 rows, by row: ``[heads, rows]``."""
    heads, rows, keys = attention.shape
    padded = F.pad(attention, (0, -keys % BLOCK, 0, -rows % BLOCK))
    by_block = padded.view(heads, -1, BLOCK, padded.shape[2] // BLOCK, BLOCK).sum(4)
    count = min(max(1, blocks // BLOCK_SHARE), by_block.shape[3])
    chosen = by_block.sum(2, keepdim=True).topk(count, dim=3).indices
    kept = by_block.gather(3, chosen.expand(-1, -1, BLOCK, -1)).sum(3)
    return kept.flatten(1)[:, :rows]
