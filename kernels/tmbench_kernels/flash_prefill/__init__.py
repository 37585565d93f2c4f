"""FlashPrefill's pattern: the key blocks whose weight comes near that of the heaviest one.

Fan et al. 2026, arXiv 2603.06199. Each key block is represented by its mean key; a query block weighs it by what all its
queries would give to that mean. A threshold relative to the heaviest block decides, so nothing is sorted. First keys, a
local window and the last queries are always attended to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tmbench_kernels.block_sparse import BlockSparse
from tmbench_kernels.block_sparse.lists import BLOCK, block_count
from tmbench_kernels.cuda import triton_serves
from tmbench_kernels.parameters import parameter
from tmbench_kernels.scores import block_means, largest, products, tiles


@dataclass(frozen=True)
class FlashPrefill(BlockSparse):
    """A key block is kept when its weight is at least ``alpha`` times the largest of its query block.

    ``sinks``, ``window`` (the query block itself included) and ``last`` (query blocks that see everything) count blocks of
    128. ``min_budget`` counts tokens: so many, in whole blocks, are kept of the heaviest in any case; ties go to the earlier
    block. Means of keys are rounded to the keys' type, in which they are multiplied. Raises ValueError for values out of
    range.
    """

    alpha: float = parameter(
        0.1, help="How much of the heaviest key block's weight a block must have.", at_least=0, at_most=1
    )
    sinks: int = 2
    window: int = 4
    last: int = 2
    min_budget: int = 0

    name: ClassVar[str] = "flash_prefill"
    last_row_queries: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1, the query block itself, not {self.window}")
        for field in ("sinks", "last", "min_budget"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, but it is {getattr(self, field)}")

    def of_chunk(self, end: int, length: int) -> FlashPrefill:
        """With those of the prompt's last query blocks that come before ``end``."""
        return replace(self, last=max(self.last - (block_count(length) - block_count(end)), 0))

    def rule(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        length, blocks, start = len(k), block_count(len(k)), len(k) - len(q)
        first = start // BLOCK
        means = torch.stack([part.float().mean(0) for part in torch.split(k, BLOCK)]).to(k.dtype).float()
        logits = q.float() @ means.T * scale
        kept = torch.zeros(blocks - first, blocks, dtype=torch.bool, device=q.device)
        for row, r in zip(kept, range(first, blocks), strict=True):
            # Of a block's queries those count that see all of a key block: of its own, the last one alone.
            end = min((r + 1) * BLOCK, length) - start
            seen = [logits[max(r * BLOCK - start, (c + 1) * BLOCK - 1 - start, 0) : end, c] for c in range(r + 1)]
            weights = torch.stack([part.logsumexp(0) for part in seen])
            row[: r + 1] = (weights - weights.max()).exp() >= self.alpha
            heaviest = weights.argsort(descending=True, stable=True)
            row[heaviest[: block_count(self.min_budget)]] = True
            row[: self.sinks] = True
            row[max(r - self.window + 1, 0) :] = True
        kept[max(blocks - first - self.last, 0) :] = True
        return kept

    def block_map(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        batch, heads, length = *q.shape[:2], k.shape[2]
        blocks, start = block_count(length), length - q.shape[2]
        first, skipped = start // BLOCK, start % BLOCK
        means = block_means(k, BLOCK).to(k.dtype)
        if triton_serves(q):
            # Of the weights alone, a matrix of blocks, instead of one of queries by blocks.
            from tmbench_kernels.flash_prefill.triton_backend import mean_weights

            kept = self._heavy(mean_weights(q, means, scale, start))
        else:
            kept = torch.zeros(batch, heads, blocks - first, blocks, dtype=torch.bool, device=q.device)
            for some, kv, part in tiles(heads, k.shape[1], blocks - first, batch * BLOCK * blocks):
                rows = range(first + part.start, first + part.stop)
                queries = q[:, some, max(part.start * BLOCK - skipped, 0) : part.stop * BLOCK - skipped]
                weights = _weights(queries, means[:, kv, : rows.stop], rows, scale, 0 if part.start else skipped)
                kept[:, some, part.start : part.stop, : rows.stop] = self._heavy(weights)
        columns = torch.arange(blocks, device=q.device)
        row = columns[first:, None]
        kept |= (columns < self.sinks) | (row - columns < self.window) | (row >= blocks - self.last)
        return kept

    def _heavy(self, weights: Tensor) -> Tensor:
        """Which of these weights, logarithms ``[batch, heads, rows, blocks]``, are chosen for themselves."""
        # Not a number where no query sees a whole key block, in a short first block: it is within the window.
        chosen = (weights - weights.amax(3, keepdim=True)).exp() >= self.alpha
        if self.min_budget:
            chosen |= largest(weights, block_count(self.min_budget))
        return chosen


def _weights(q: Tensor, means: Tensor, rows: range, scale: float, skipped: int = 0) -> Tensor:
    """Logarithm of what the query blocks ``rows`` give to each mean, float32 ``[batch, heads, rows, blocks]``.

    A sum over the queries that see the whole key block; -inf where there are none. q holds the queries of ``rows`` alone,
    of the first block without its first ``skipped``.
    """
    missing = len(rows) * BLOCK - q.shape[2] - skipped
    logits = torch.unflatten(products(F.pad(q, (0, 0, skipped, missing)), means).mul_(scale), 2, (len(rows), BLOCK))
    logits[:, :, 0, :skipped] = -torch.inf
    logits[:, :, -1, BLOCK - missing :] = -torch.inf
    row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    column = torch.arange(means.shape[2], device=q.device)
    own = logits[:, :, :, -1].masked_fill(column > row, -torch.inf)
    return torch.where(column < row, logits.logsumexp(3), own)
