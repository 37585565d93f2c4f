"""PBS-Attn's pattern: keys sorted by their importance inside of segments, and whole blocks of the sorted keys.

Wang et al. 2025, arXiv 2510.21270. Keys that many queries want lie scattered, one or two in a block. Sorted, they share few
blocks, which hold more each. A query's own segment is always attended to as a whole, so that sorting moves no key past a
query: causality is that of the positions. Written from the published rule alone.

Queries of the last block decide about importance, so a chunk of a prompt sorts by its own last queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tmbench_kernels.block_sparse import BlockSparse, Listed, by_head
from tmbench_kernels.block_sparse.lists import BLOCK, BlockLists, block_count, split_blocks
from tmbench_kernels.cuda import runs_triton, triton_serves
from tmbench_kernels.dense import Dense
from tmbench_kernels.parameters import parameter
from tmbench_kernels.pattern import Backend, Pattern, default_scale, empty_output, new_lse
from tmbench_kernels.scores import block_means, heaviest_reaching, mean_key_shares, products


def _attend(
    backend: Backend,
    pattern: PBS,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Each query over its own segment, and by ``backend`` over blocks of sorted keys; two softmaxes made one."""
    sums = new_lse(q) if lse is None else lse
    out = pattern.attend_own(q, k, v, scale, softcap, sums)
    if k.shape[2] <= pattern.segment:
        return out
    order = pattern.sort(q, k, scale)
    keys, values = (sorted_tokens(x, order) for x in (k, v))
    listed = Listed(pattern.lists(q, keys, scale, order))
    asked: dict[str, Any] = {"softcap": softcap} if softcap else {}
    others_lse = new_lse(q)
    others = backend.attend(listed, q, keys, values, scale, lse=others_lse, **asked)
    merge(out, sums, others, others_lse)
    return out


def merge(out: Tensor, lse: Tensor, others: Tensor, others_lse: Tensor) -> None:
    """Make two softmaxes one, each given as an output and its log-sum-exp: the first pair becomes that of both.

    Outputs are ``[batch, heads, queries, v_dim]``. The first log-sum-exp is finite.
    """
    if triton_serves(out):
        # Imported when it is first used: it takes Triton.
        from tmbench_kernels.pbs import triton_backend

        triton_backend.merge(out, lse, others, others_lse)
        return
    wide = lse.dtype
    out.copy_(out.to(wide).lerp_(others.to(wide), (others_lse - lse).sigmoid()[..., None]))
    torch.logaddexp(lse, others_lse, out=lse)


def sorted_tokens(x: Tensor, order: Tensor) -> Tensor:
    """``[batch, kv_heads, keys, dim]`` as ``[batch, heads, keys, dim]`` in the order of every query head.

    ``order`` is as ``PBS.sort`` makes it. Tokens of no whole segment stay in their places.
    """
    heads, whole, dim = *order.shape[1:], x.shape[3]
    out = x.new_empty(x.shape[0], heads, *x.shape[2:])
    if runs_triton(x.device):
        # Imported when it is first used: it takes Triton.
        from tmbench_kernels.pbs import triton_backend

        triton_backend.sorted_tokens(x, order, out)
        return out
    groups = heads // x.shape[1]
    for member in range(groups):
        # One member of every group at a time: each such slice has as many heads as x.
        own = order[:, member::groups, :, None].expand(-1, -1, -1, dim)
        out[:, member::groups, :whole] = x.gather(2, own)
        out[:, member::groups, whole:] = x[:, :, whole:]
    return out


@dataclass(frozen=True)
class PBS(Pattern):
    """A query's own segment, and the fewest blocks of sorted keys before it that have the share ``score`` of its scores.

    Segments of ``segment`` tokens, a multiple of 128, begin at position 0. A key's importance is what the last 128 queries
    give it, each by a softmax over the keys of all whole segments. Inside of each whole segment keys are sorted by it,
    descending, ties in their order, for every query head. The score of a block of 128 sorted keys is the softmax, over the
    blocks of all segments before the query block's, of the product of mean query and mean key. The block that the first
    token of all is in joins in any case. Up to one segment is dense. Raises ValueError for values out of range.
    """

    segment: int = parameter(
        256, help="Tokens of a segment, inside of which keys are sorted.", multiple_of=BLOCK, at_least=BLOCK, tokens=True
    )
    score: float = parameter(
        0.9, help="The share of its scores that a query block's blocks of sorted keys have.", above=0, at_most=1
    )

    name: ClassVar[str] = "pbs"
    dynamic: ClassVar[bool] = True
    last_row_queries: ClassVar[int | None] = BLOCK
    backends: ClassVar[tuple[Backend, ...]] = tuple(
        replace(backend, attend=partial(_attend, backend)) for backend in BlockSparse.backends
    )

    def backend(self, q: Tensor, k: Tensor, v: Tensor, *, softcap: float = 0.0, lse: bool = False) -> Backend:
        """Named by both parts: what attends over sorted blocks, and what over own segments."""
        found = super().backend(q, k, v, softcap=softcap, lse=True)
        own = Dense().backend(q, k, v, softcap=softcap, lse=True).name
        return found if own == found.name else replace(found, name=f"{found.name}+{self.name}:{own}")

    def rule(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The definition for one head, q ``[queries, dim]`` and k ``[keys, dim]``: bool ``[queries, keys]``."""
        length, start, size = len(k), len(k) - len(q), self.segment
        q, k = q.float(), k.float()
        whole = length // size * size
        importance = (q[-BLOCK:] @ k[:whole].T * scale).softmax(1).mean(0)
        segments = torch.split(importance, size) if whole else ()
        order = [n * size + place for n, part in enumerate(segments) for place in part.sort(descending=True, stable=True)[1]]
        blocks = torch.split(torch.tensor(order, dtype=torch.long), BLOCK) if whole else ()
        seen = torch.zeros(len(q), length, dtype=torch.bool, device=q.device)
        row = 0
        for queries in split_blocks(q, start=start):
            own = (start + row) // size * size
            rows = slice(row, row + len(queries))
            before = blocks[: own // BLOCK]
            if before:
                scores = (torch.stack([k[keys].mean(0) for keys in before]) @ queries.mean(0) * scale).softmax(0).tolist()
                held = 0.0
                for n in sorted(range(len(before)), key=lambda n: (-scores[n], n)):
                    if held < self.score * sum(scores) or 0 in before[n]:
                        seen[rows, before[n]] = True
                    held += scores[n]
            seen[rows, own:] = (
                torch.arange(own, length, device=q.device) <= torch.arange(start, length, device=q.device)[rows, None]
            )
            row += len(queries)
        return seen

    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """Bool ``[batch, heads, queries, keys]``, by the rule head by head."""
        return by_head(self.rule, q, k, default_scale(q, scale))

    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """Counted from the selection of these q and k, at the cost of one."""
        batch, heads, queries = q.shape[:3]
        length, factor = k.shape[2], default_scale(q, scale)
        own = sum(position % self.segment + 1 for position in range(length - queries, length))
        if length <= self.segment:
            return batch * heads * own
        order = self.sort(q, k, factor)
        return batch * heads * own + self.lists(q, sorted_tokens(k, order), factor, order).pairs()

    def sort(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The positions of the keys of whole segments as they are sorted, ``[batch, heads, keys]``."""
        whole = k.shape[2] // self.segment * self.segment
        importance = mean_key_shares(q[:, :, -BLOCK:], k[:, :, :whole], scale)
        order = torch.unflatten(importance, 2, (-1, self.segment)).sort(dim=3, descending=True, stable=True).indices
        first = torch.arange(0, whole, self.segment, device=q.device)
        return (order + first[:, None]).flatten(2)

    def lists(self, q: Tensor, keys: Tensor, scale: float, order: Tensor) -> BlockLists:
        """The blocks of sorted keys ``[batch, heads, keys, dim]`` that each query block attends to beside its segment."""
        length, whole = keys.shape[2], order.shape[2]
        start = length - q.shape[2]
        queries, means = block_means(q, BLOCK, start), block_means(keys[:, :, :whole], BLOCK)
        scores = products(queries, means).mul_(scale)
        row = torch.arange(start // BLOCK, block_count(length), device=q.device)
        before = (
            torch.arange(whole // BLOCK, device=q.device) < (row * BLOCK // self.segment * (self.segment // BLOCK))[:, None]
        )
        # Rows with no block before them have no softmax; ``before`` leaves them empty.
        kept = heaviest_reaching(scores.masked_fill_(~before, -torch.inf).softmax(3).nan_to_num_(0.0), self.score)
        first = (order[:, :, : self.segment] == 0).int().argmax(2) // BLOCK
        kept.scatter_(3, first[:, :, None, None].expand(-1, -1, len(row), 1), True)
        kept &= before
        kept = F.pad(kept, (0, block_count(length) - kept.shape[3]))
        return BlockLists.from_map(kept, length, BLOCK, start)

    def attend_own(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, lse: Tensor) -> Tensor:
        """Each query over its own segment up to itself, ``[batch, heads, queries, v_dim]``; fills ``lse``."""
        start = k.shape[2] - q.shape[2]
        out = empty_output(q, v)
        for rows, count in self._own_parts(start, k.shape[2]):
            here = slice(rows.start - start, rows.stop - start)
            # A segment that a chunk's edge cuts has keys of its own before the first query.
            keys = slice(rows.start // self.segment * self.segment, rows.stop)
            queries = _split(q[:, :, here], count)
            sums = new_lse(queries)
            done = Dense().compute(
                queries, _split(k[:, :, keys], count), _split(v[:, :, keys], count), scale, softcap=softcap, lse=sums
            )
            out[:, :, here] = torch.unflatten(done, 0, (-1, count)).transpose(1, 2).flatten(2, 3)
            lse[:, :, here] = torch.unflatten(sums, 0, (-1, count)).transpose(1, 2).flatten(2, 3)
        return out

    def _own_parts(self, start: int, length: int) -> Iterator[tuple[range, int]]:
        """The queries from ``start`` on in runs that are attended together, each with how many segments it holds."""
        size = self.segment
        first = min(-(-start // size) * size, length)
        last = max(length // size * size, first)
        for rows, count in (
            (range(start, first), 1),
            (range(first, last), (last - first) // size),
            (range(last, length), 1),
        ):
            if rows:
                yield rows, count


def _split(x: Tensor, count: int) -> Tensor:
    """``[batch, heads, count * rows, dim]`` as ``[batch * count, heads, rows, dim]``, mostly without a copy."""
    return torch.unflatten(x.transpose(1, 2), 1, (count, -1)).flatten(0, 1).transpose(1, 2)
