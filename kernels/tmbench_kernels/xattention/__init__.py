"""XAttention's pattern: the fewest key blocks that hold a share of the attention, as antidiagonals estimate it.

Xu et al. 2025, arXiv 2503.16428, section 2. Queries and keys are cut into strides; the score of two strides is the sum along
the antidiagonal of their logits, which crosses every vertical line and every slash. Softmax over such scores, summed over a
block of 128 by 128, estimates what the block's queries give to its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tmbench_kernels.block_sparse import BlockSparse
from tmbench_kernels.block_sparse.lists import BLOCK, block_count
from tmbench_kernels.cuda import runs_triton
from tmbench_kernels.parameters import parameter
from tmbench_kernels.scores import heaviest_reaching, products, reaching, tiles


@dataclass(frozen=True)
class XAttention(BlockSparse):
    """The first block, the query block's own, and the heaviest others until they hold ``threshold`` of the row's mass.

    A block is taken while those before it fall short; ties go to the earlier block. ``stride``, in tokens, divides 128.

    ``first_chunk`` counts tokens, in whole blocks. The published code reads queries in chunks and treats the first chunk
    otherwise than the rest: of its query blocks only the own block comes first, the heaviest other one always follows, one
    block more than necessary is taken, and the first block of keys joins at last. 2048 is MInference's chunk; 0, the
    default, has no such chunk. Raises ValueError for values out of range.
    """

    stride: int = parameter(
        16,
        help="Tokens between antidiagonals that estimate a block.",
        divides=BLOCK,
        why="so that blocks hold whole strides",
    )
    threshold: float = parameter(
        0.9, help="The share of its estimated attention that a query block's key blocks hold.", above=0, at_most=1
    )
    first_chunk: int = parameter(
        0, help="First tokens under the published code's rule for its first chunk.", multiple_of=BLOCK, tokens=True
    )

    name: ClassVar[str] = "xattention"
    last_row_queries: ClassVar[int | None] = 1

    def rule(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        length, stride, blocks = len(k), self.stride, block_count(len(k))
        start, cells = length - len(q), BLOCK // stride
        first = start // BLOCK
        # Zeros stand for the tokens of a cut block that are not there, at either end.
        q, k = (F.pad(x.float(), (0, 0, front, blocks * BLOCK - length)) for x, front in ((q, start % BLOCK), (k, 0)))
        logits = sum((q[stride - 1 - t :: stride] @ k[t::stride].T for t in range(stride)), q.new_zeros(()))
        future = torch.ones_like(logits, dtype=torch.bool).triu(first * cells + 1)
        shares = (logits * (scale / stride)).masked_fill(future, -torch.inf).softmax(1)
        number = torch.arange(first * cells, blocks * cells, device=q.device)
        shares[(number < start // stride) | (number >= block_count(length, stride))] = 0
        mass = shares.view(blocks - first, cells, blocks, cells).sum((1, 3))
        kept = torch.zeros(blocks - first, blocks, dtype=torch.bool, device=q.device)
        for row, r in enumerate(range(first, blocks)):
            kept[row, self._cover(mass[row, : r + 1].tolist(), within_first=r * BLOCK < self.first_chunk)] = True
        return kept

    def _cover(self, mass: list[float], *, within_first: bool) -> list[int]:
        """The blocks of one row, of which the last is its own."""
        own = len(mass) - 1
        forced = [own] if within_first or own == 0 else [0, own]
        others = sorted(set(range(len(mass))) - set(forced), key=lambda n: (-mass[n], n))
        order = forced + others
        before = [sum(mass[n] for n in order[:place]) for place in range(len(order))]
        if within_first:
            before = [0.0, *before[:-1]]
        need = self.threshold * sum(mass[n] for n in order)
        return [0, *forced, *(n for n, held in zip(order, before, strict=True) if held < need)]

    def block_map(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        batch, heads, length = *q.shape[:2], k.shape[2]
        start, blocks, cells = length - q.shape[2], block_count(length), BLOCK // self.stride
        first = start // BLOCK
        if start % BLOCK:
            q = F.pad(q, (0, 0, start % BLOCK, 0))
        kept = torch.zeros(batch, heads, blocks - first, blocks, dtype=torch.bool, device=q.device)
        # Of two strides laid side by side, one of them backwards, the product of the whole is the antidiagonal's sum.
        keys = _strides(k, blocks, self.stride).flip(3).flatten(3)
        sums, strides = _sum_strides, block_count(length, self.stride)
        if runs_triton(q.device):
            # Imported when it is first used: it takes Triton.
            from tmbench_kernels.xattention.triton_backend import sum_strides

            sums = sum_strides
        for some, kv, part in tiles(heads, k.shape[1], blocks - first, batch * cells * cells * blocks):
            rows = range(first + part.start, first + part.stop)
            queries = q[:, some, part.start * BLOCK : part.stop * BLOCK]
            queries = _strides(queries, len(rows), self.stride).flatten(3)
            logits = products(queries, keys[:, kv, : rows.stop * cells])
            mass = sums(logits, rows.start, cells, strides, scale / self.stride, start // self.stride)
            del logits
            kept[:, some, part.start : part.stop, : rows.stop] = self._covers(mass, rows)
        return kept

    def _covers(self, mass: Tensor, rows: range) -> Tensor:
        """``_cover`` for the query blocks ``rows`` of all heads, ``[batch, heads, rows, blocks]``."""
        row = torch.arange(rows.start, rows.stop, device=mass.device)[:, None]
        column = torch.arange(mass.shape[3], device=mass.device)
        early = min(max(self.first_chunk // BLOCK - rows.start, 0), len(rows))
        forced = (column == row) | (column == 0)
        # Shares: the strides of a block of queries add up to 1 each.
        others = mass[:, :, early:] * (self.stride / BLOCK)
        held = others.masked_fill(~forced[early:], 0).sum(3, dtype=torch.float64)
        taken = heaviest_reaching(others.masked_fill_(forced[early:], 0), self.threshold, held)
        if early:
            taken = torch.cat([self._covers_first(mass[:, :, :early], (column == row)[:early]), taken], dim=2)
        return taken | forced

    def _covers_first(self, mass: Tensor, own: Tensor) -> Tensor:
        """What the rows of the first chunk take beside the first block of all."""
        ranked, order = mass.masked_fill(own, torch.inf).sort(dim=3, descending=True, stable=True)
        # The own block comes first: there infinity stands for what it holds.
        ranked[..., :1] = mass.gather(3, order[..., :1])
        taken = F.pad(reaching(ranked, self.threshold), (1, 0), value=True)[..., :-1]
        return torch.zeros_like(taken).scatter_(3, order, taken)


def _sum_strides(logits: Tensor, start: int, cells: int, strides: int, scale: float, skipped: int = 0) -> Tensor:
    """``triton.sum_strides`` in torch; it overwrites the logits."""
    size = logits.shape[2]
    future = torch.ones(size, size, dtype=torch.bool, device=logits.device).triu(1)
    logits.mul_(scale)[..., start * cells :].masked_fill_(future, -torch.inf)
    shares = logits.softmax(3)
    shares[:, :, : max(skipped - start * cells, 0)] = 0
    shares[:, :, strides - start * cells :] = 0
    return torch.unflatten(torch.unflatten(shares, 3, (-1, cells)).sum(4), 2, (-1, cells)).sum(3)


def _strides(x: Tensor, blocks: int, stride: int) -> Tensor:
    """Tokens stride by stride, filled up with zeros to whole blocks: ``[batch, heads, strides, stride, dim]``."""
    # A pad of nothing would be a copy.
    if missing := blocks * BLOCK - x.shape[2]:
        x = F.pad(x, (0, 0, 0, missing))
    return torch.unflatten(x, 2, (blocks * BLOCK // stride, stride))
