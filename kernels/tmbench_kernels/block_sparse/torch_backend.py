"""Attention over block lists in torch: each block of queries over its own keys, gathered block by block.

Memory is linear in length: one copy of k and v, and for some query blocks at a time their gathered keys and values. On a
GPU it serves where no kernel does; there it waits for the lists and takes far longer than a kernel would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from tmbench_kernels.block_sparse.lists import BlockLists
from tmbench_kernels.pattern import empty_output
from tmbench_kernels.sdpa import attention, from_an_edge

_GATHERED_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""How much of k is gathered at a time: on a CPU what stays in the caches, on a GPU what keeps it busy."""
_MOST_TOGETHER = 2**14
"""Query blocks that are attended together: CUDA kernels take fewer than 2^16."""


@dataclass(frozen=True)
class _Batch:
    """Query blocks that are attended together because their lists are alike: 1-D tensors of where each one is."""

    batch: Tensor
    head: Tensor
    row: Tensor
    count: int
    """How many key blocks each has."""
    own: bool
    """Whether the last of them is the query block's own."""


def attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention over the lists: ``[batch, heads, queries, v_dim]``, in q's type; a query without keys gets zeros."""
    block, groups, first = lists.block, q.shape[1] // k.shape[1], lists.first_block
    if skipped := lists.start % block:
        aligned = replace(lists, start=first * block)

        def attend(q: Tensor, lse: Tensor | None) -> Tensor:
            return attend_lists(q, k, v, aligned, scale, softcap=softcap, lse=lse)

        return from_an_edge(attend, q, v, skipped, lse)
    blocks = lists.indices.shape[3]
    everything = lists.counts == torch.arange(first + 1, blocks + 1, device=q.device)
    if bool(everything.all()):
        return attention(q, k, v, scale, causal=True, softcap=softcap, lse=lse)
    out = empty_output(q, v)
    dense = everything.all(2)
    for b, h in dense.nonzero().tolist():
        query, key, value = (x[b, n][None, None] for x, n in ((q, h), (k, h // groups), (v, h // groups)))
        sums = None if lse is None else lse[b, h][None, None]
        out[b, h] = attention(query, key, value, scale, causal=True, softcap=softcap, lse=sums)[0, 0]
    sources = [_block_rows(x, blocks, block) for x in (k, v)]
    bias = _bias(q, blocks, block)
    most = max(1, _GATHERED_ELEMENTS[k.device.type] // (block * k.shape[3]))
    # Fresh memory for every batch would cost more in page faults than the copies themselves.
    buffers = [x.new_empty(max(most, blocks), x.shape[1]) for x in sources]
    whole = q.shape[2] // block
    # The last query block may be shorter, so it does not go together with the others.
    for rows in (range(whole), range(whole, blocks - first)):
        if not rows:
            continue
        tokens = slice(rows.start * block, rows.stop * block)
        queries, results = (torch.unflatten(x[:, :, tokens], 2, (len(rows), -1)) for x in (q, out))
        totals = None if lse is None else torch.unflatten(lse[:, :, tokens], 2, (len(rows), -1))
        for part in _batches(lists, rows, dense, most):
            place = part.batch, part.head, part.row - rows.start
            if part.count == 0:
                results[place] = 0
                if totals is not None:
                    totals[place] = -torch.inf
                continue
            head_blocks = (part.batch * k.shape[1] + part.head // groups) * blocks
            listed = head_blocks[:, None] + lists.indices[part.batch, part.head, part.row, : part.count]
            keys, values = (
                torch.index_select(x, 0, listed.flatten(), out=buffer[: listed.numel()]).view(
                    len(part.row), 1, part.count * block, -1
                )
                for x, buffer in zip(sources, buffers, strict=True)
            )
            own = bias[: queries.shape[3], -part.count * block :] if part.own else None
            some = queries[place][:, None]
            sums = None if lse is None else lse.new_empty(some.shape[:3])
            results[place] = attention(some, keys, values, scale, bias=own, softcap=softcap, lse=sums)[:, 0]
            if totals is not None and sums is not None:
                totals[place] = sums[:, 0]
    return out


def _block_rows(x: Tensor, blocks: int, block: int) -> Tensor:
    """A copy with one block of tokens per row, filled up with zeros: ``[batch * kv_heads * blocks, block * dim]``."""
    batch, heads, length, dim = x.shape
    rows = x.new_empty(batch, heads, blocks * block, dim)
    rows[:, :, :length] = x
    rows[:, :, length:] = 0
    return rows.view(-1, block * dim)


def _bias(q: Tensor, blocks: int, block: int) -> Tensor:
    """What is added to the logits of a query block over keys that end with its own: ``[block, blocks * block]``.

    All keys before the own block are in the past, and what the own one has beyond the prompt is in the future: so the last
    columns serve a list of any count, and the first rows a short block.
    """
    bias = q.new_zeros(block, blocks * block)
    bias[:, -block:] = q.new_full((block, block), -torch.inf).triu_(1)
    return bias


def _batches(lists: BlockLists, rows: range, dense: Tensor, most: int) -> Iterator[_Batch]:
    """The query blocks ``rows`` of all heads but the dense ones, those with lists of one kind together."""
    counts = lists.counts[:, :, rows.start : rows.stop]
    kinds = (2 * counts + lists.own_listed()[:, :, rows.start : rows.stop]).masked_fill(dense[..., None], -1).flatten()
    kinds, order = kinds.sort(stable=True)
    heads = counts.shape[1]
    first = 0
    for kind, alike in groupby(kinds.tolist()):
        size = len(list(alike))
        members, first = order[first : first + size], first + size
        if kind < 0:
            continue
        count, own = divmod(kind, 2)
        for some in torch.split(members, min(max(1, most // max(count, 1)), _MOST_TOGETHER)):
            place = some // len(rows)
            yield _Batch(place // heads, place % heads, some % len(rows) + rows.start, count, bool(own))
