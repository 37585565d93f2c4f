"""MInference's block-sparse pattern: of each row the key blocks whose mean goes best with the mean of its queries.

Jiang et al. 2024, arXiv 2407.02490, section 3.2, the third of its patterns. The rule is that of the released code: blocks of
64, zeros fill up the last block before its mean is taken, and nothing is forced, not even the query block itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tmbench_kernels.block_sparse import BlockSparse
from tmbench_kernels.block_sparse.lists import block_count, split_blocks
from tmbench_kernels.reference import causal_mask
from tmbench_kernels.scores import block_means, largest, products, tiles


@dataclass(frozen=True)
class BlockTopK(BlockSparse):
    """``blocks`` key blocks of 64 for each query block, or all where there are no more; ties go to the earlier block.

    Scores are products of means, unscaled. Raises ValueError for fewer than one block.
    """

    blocks: int = 100

    name: ClassVar[str] = "block_topk"
    last_row_queries: ClassVar[int | None] = 1
    block: ClassVar[int] = 64

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")

    def rule(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        start = len(k) - len(q)
        first = start // self.block
        queries, keys = (
            torch.stack([part.float().sum(0) / self.block for part in split_blocks(x, self.block, begin)])
            for x, begin in ((q, start), (k, 0))
        )
        kept = torch.zeros(len(queries), len(keys), dtype=torch.bool, device=q.device)
        for r in range(len(queries)):
            scores = keys[: first + r + 1] @ queries[r]
            kept[r, scores.argsort(descending=True, stable=True)[: self.blocks]] = True
        return kept

    def block_map(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        batch, heads = q.shape[:2]
        queries, keys = self._means(q, k.shape[2] - q.shape[2]), self._means(k, 0)
        q_blocks, blocks = queries.shape[2], keys.shape[2]
        causal = causal_mask(blocks, q.device, queries=q_blocks)
        kept = torch.zeros(batch, heads, q_blocks, blocks, dtype=torch.bool, device=q.device)
        for some, kv, rows in tiles(heads, k.shape[1], q_blocks, batch * blocks):
            scores = products(queries[:, some, rows.start : rows.stop], keys[:, kv])
            scores.masked_fill_(~causal[rows.start : rows.stop], -torch.inf)
            kept[:, some, rows.start : rows.stop] = largest(scores, self.blocks)
        return kept

    def _means(self, x: Tensor, start: int) -> Tensor:
        """Means of blocks, the first and the last one over as many tokens as the others."""
        means = block_means(x, self.block, start)
        blocks, end = means.shape[2], start + x.shape[2]
        if missing := start % self.block:
            means[:, :, 0] *= (min(self.block - missing, x.shape[2])) / self.block
        if blocks > 1 or not missing:
            means[:, :, -1] *= (end - (block_count(end, self.block) - 1) * self.block) / self.block
        return means
