"""FlexPrefill's pattern: per head either vertical and slash blocks, or those and what pooled queries ask for.

Lai et al. 2025, arXiv 2502.20766, sections 3 and 4. The last 128 queries show how much each key and each diagonal is
attended to. How many of them hold a share gamma of the attention sets how many blocks of keys, and how many diagonals of
blocks, the head keeps. If mean queries and mean keys tell the same distribution over blocks as the last queries do, the head
is query-aware: mean queries then choose blocks for themselves. The rule is that of the released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tmbench_kernels.block_sparse import BlockSparse
from tmbench_kernels.block_sparse.lists import BLOCK, block_count, split_blocks
from tmbench_kernels.parameters import parameter
from tmbench_kernels.reference import causal_mask
from tmbench_kernels.scores import block_means, heaviest, heaviest_count, largest_of_positive, last_query_mass, products


@dataclass(frozen=True)
class FlexPrefill(BlockSparse):
    """``gamma`` is the share of attention to keep, ``tau`` the largest distance at which a head counts as query-aware.

    The distance is the square root of the Jensen-Shannon divergence, in nats; 0 makes no head query-aware, and neither does
    a distribution that holds an exact 0, whose distance is not a number. ``min_budget`` and ``max_budget`` (None: no limit)
    bound the columns and the diagonals of a head, in tokens, rounded up to blocks of 128; prompts of up to ``min_budget``
    or 256 tokens are dense. Ties go to the earlier block, and to the nearer diagonal. Raises ValueError for values out of
    range.
    """

    gamma: float = parameter(
        0.95, help="The share of attention that the columns, and the diagonals, of a head hold.", above=0, at_most=1
    )
    tau: float = parameter(
        0.1, help="Up to which distance between two estimates a head's queries choose for themselves.", at_least=0, at_most=1
    )
    min_budget: int = parameter(1024, help="The fewest tokens of columns, and of diagonals.", at_least=1, tokens=True)
    max_budget: int | None = None

    name: ClassVar[str] = "flex_prefill"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise ValueError(f"max_budget must be at least min_budget, {self.min_budget}, not {self.max_budget}")

    def rule(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        length, start, blocks, last = len(k), len(k) - len(q), block_count(len(k)), min(BLOCK, len(q))
        first = start // BLOCK
        if self._is_dense(length):
            return causal_mask(blocks, q.device, queries=blocks - first)
        q, k = q.float(), k.float()
        future = torch.ones(last, length, dtype=torch.bool, device=q.device).triu(length - last + 1)
        shares = (q[-last:] @ k.T * scale).masked_fill(future, -torch.inf).softmax(1)
        by_key = shares.mean(0)
        # The diagonal of index n ends at the last query and key n: the distance of all its pairs is length - 1 - n.
        by_diagonal = torch.zeros_like(by_key)
        for later in range(last):
            by_diagonal[later:] += shares[last - 1 - later, : length - later] / last
        columns, diagonals = (torch.stack([part.sum() for part in torch.split(x, BLOCK)]) for x in (by_key, by_diagonal))
        query_means, key_means = (
            torch.stack([part.mean(0) for part in split_blocks(x, BLOCK, begin)]) for x, begin in ((q, start), (k, 0))
        )
        estimate = (q[-last:].mean(0) @ key_means.T * scale).softmax(0)
        aware = bool(_distance(estimate, columns) < self.tau)
        count, diagonal_count = (self._least(length) if aware else self._blocks_for(x) for x in (by_key, by_diagonal))
        columns[0] = diagonals[-1] = torch.inf
        near_first = diagonals.flip(0)
        kept = torch.zeros(blocks - first, blocks, dtype=torch.bool, device=q.device)
        kept[:, columns.argsort(descending=True, stable=True)[:count]] = True
        for offset in near_first.argsort(descending=True, stable=True)[:diagonal_count].tolist():
            kept.diagonal(first - offset).fill_(True)
        if aware:
            past = causal_mask(blocks, q.device, queries=blocks - first)
            logits = (query_means @ key_means.T * scale).masked_fill(~past, -torch.inf)
            pooled = logits.softmax(1).flatten()
            heaviest = pooled.argsort(descending=True, stable=True)
            within = pooled[heaviest].double().cumsum(0) <= self.gamma * (blocks - first)
            kept.view(-1)[heaviest[within]] = True
        return kept & causal_mask(blocks, q.device, queries=blocks - first)

    def block_map(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        batch, heads, queries = q.shape[:3]
        length, last = k.shape[2], min(BLOCK, queries)
        blocks, first = block_count(length), (length - queries) // BLOCK
        if self._is_dense(length):
            return causal_mask(blocks, q.device, queries=blocks - first).expand(batch, heads, -1, -1)
        mass = last_query_mass(q, k, scale, BLOCK).div_(last)
        counts = self._blocks_for(mass)
        # Blocks of diagonals begin with the farthest: it is the nearest that may be short.
        if missing := blocks * BLOCK - length:
            mass = torch.stack([F.pad(mass[0], (0, missing)), F.pad(mass[1], (missing, 0))])
        sums = torch.unflatten(mass, 3, (blocks, BLOCK)).sum(4)
        asked = None
        if self.tau > 0:
            key_means = block_means(k, BLOCK)
            mean = q[:, :, queries - last :].mean(2, keepdim=True, dtype=torch.float32)
            estimate = products(mean, key_means).mul_(scale).softmax(3).squeeze(2)
            aware = _distance(estimate, sums[0]) < self.tau
            counts = counts.masked_fill(aware, self._least(length))
            asked = self._asked(block_means(q, BLOCK, length - queries), key_means, scale) & aware[..., None, None]
        # The first keys and the nearest diagonals are taken whatever they hold.
        sums[..., 0] = torch.inf
        columns, offsets = largest_of_positive(sums, counts)
        numbers = torch.arange(blocks, device=q.device)
        kept: Tensor = columns[:, :, None] | offsets[..., (numbers[first:, None] - numbers).clamp(min=0)]
        if asked is not None:
            kept |= asked
        return kept

    def _is_dense(self, length: int) -> bool:
        return length <= max(2 * BLOCK, block_count(self.min_budget) * BLOCK)

    def _least(self, length: int) -> int:
        return min(block_count(self.min_budget), block_count(length))

    def _blocks_for(self, shares: Tensor) -> Tensor:
        """How many blocks to keep: the tokens ``[..., length]`` that it takes to exceed gamma, in blocks, and one more."""
        length = shares.shape[-1]
        tokens = heaviest_count(shares, self.gamma) + 1
        most = block_count(length) if self.max_budget is None else min(block_count(self.max_budget), block_count(length))
        blocks: Tensor = (tokens // BLOCK + 1).clamp(self._least(length), most)
        return blocks

    def _asked(self, query_means: Tensor, key_means: Tensor, scale: float) -> Tensor:
        """The heaviest blocks of each head by pooled queries, as long as their sum is at most gamma of the whole.

        What it says of blocks in the future does not count.
        """
        rows, blocks = query_means.shape[2], key_means.shape[2]
        future = ~causal_mask(blocks, key_means.device, queries=rows)
        pooled = products(query_means, key_means).mul_(scale).masked_fill_(future, -torch.inf).softmax(3).flatten(2)
        return torch.unflatten(heaviest(pooled, self.gamma * rows), 2, (rows, blocks))


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions ``[..., n]``, in nats; not a number with an exact 0."""
    middle = (p + q) / 2
    divergence = (p * (p / middle).log() + q * (q / middle).log()).sum(-1) / 2
    # Of equal distributions rounding may leave less than nothing.
    return divergence.clamp(min=0).sqrt()
