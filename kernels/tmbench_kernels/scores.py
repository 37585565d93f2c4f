"""What selections share: products for grouped heads, means of blocks, what the last queries see, largest entries, tiles.

Nothing here reads a value back to the host, so a selection made of these never waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tmbench_kernels.cuda import runs_triton, triton_serves

TILE_ELEMENTS = 2**28
"""Largest part of a score matrix that is held at a time: 1 GiB in float32, of which a selection has two or three."""


def products(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T`` for grouped heads: a ``[batch, heads, rows, dim]``, b ``[batch, kv_heads, n, dim]``, of one type.

    Returns float32 ``[batch, heads, rows, n]``: 16-bit inputs are multiplied as such and summed in float32, never rounded
    in between.
    """
    batch, heads, rows, dim = a.shape
    kv_heads, n = b.shape[1:3]
    # Spelled out where a size may be 0, for which -1 would be ambiguous.
    a = a.reshape(batch * kv_heads, heads // kv_heads * rows, dim)
    b = b.reshape(batch * kv_heads, n, dim).transpose(1, 2)
    if a.device.type == "cuda" and a.dtype != torch.float32:
        out = torch.bmm(a, b, out_dtype=torch.float32)
    else:
        out = a.float() @ b.float()
    return out.view(batch, heads, rows, n)


def block_means(x: Tensor, block: int, start: int = 0) -> Tensor:
    """The mean of every block of tokens, float32 ``[batch, heads, blocks, dim]``, where the first is position ``start``.

    The first and the last block are means over as many tokens as there are.
    """
    if head := -start % block:
        first = x[:, :, :head].mean(2, keepdim=True, dtype=torch.float32)
        return first if head >= x.shape[2] else torch.cat([first, block_means(x[:, :, head:], block)], dim=2)
    length = x.shape[2]
    whole = length // block
    means = torch.unflatten(x[:, :, : whole * block], 2, (whole, block)).mean(3, dtype=torch.float32)
    if length > whole * block:
        means = torch.cat([means, x[:, :, whole * block :].mean(2, keepdim=True, dtype=torch.float32)], dim=2)
    return means


def last_query_mass(q: Tensor, k: Tensor, scale: float, last: int) -> Tensor:
    """Probability that the last min(last, queries) queries give to each key and to each distance, summed over them.

    Float32 ``[2, batch, heads, keys]``, by key and by distance; a distance is query minus key. A large one has fewer pairs
    and is not scaled up for it. In torch the logits are held for a few heads at a time: at 128K tokens all take gigabytes.
    """
    q = q[:, :, max(q.shape[2] - last, 0) :]
    batch, heads, rows = q.shape[:3]
    if triton_serves(q):
        # Imported when it is first used: it takes Triton.
        from tmbench_kernels.triton_scores import sum_shares

        return sum_shares(q, k, scale)
    mass = q.new_empty(2, batch, heads, k.shape[2], dtype=torch.float32)
    for some, kv, _ in tiles(heads, k.shape[1], 1, batch * rows * k.shape[2]):
        mass[0, :, some], mass[1, :, some] = _sum_shares(q[:, some], k[:, kv], scale)
    return mass


def _sum_shares(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``triton_scores.sum_shares`` in torch."""
    rows, length = q.shape[2], k.shape[2]
    logits = products(q, k)
    future = torch.ones(rows, rows, dtype=torch.bool, device=logits.device).triu(1)
    logits.mul_(scale)[..., length - rows :].masked_fill_(future, -torch.inf)
    shares = logits.softmax(3)
    del logits
    by_key = shares.sum(2)
    # With rows - 1 zeros in front, a step of one row and one column follows a diagonal.
    padded = F.pad(shares, (rows - 1, 0))
    del shares
    strides = (*padded.stride()[:2], padded.shape[3] + 1, 1)
    return by_key, padded.as_strided((*padded.shape[:2], rows, length), strides).sum(2).flip(-1)


def mean_key_shares(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What the softmax over all keys gives to each, the mean of the queries: float32 ``[batch, heads, keys]``."""
    batch, heads, rows = q.shape[:3]
    if triton_serves(q):
        # Imported when it is first used: it takes Triton.
        from tmbench_kernels.triton_scores import sum_key_shares

        return sum_key_shares(q, k, scale).div_(rows)
    shares = q.new_empty(batch, heads, k.shape[2], dtype=torch.float32)
    for some, kv, _ in tiles(heads, k.shape[1], 1, batch * rows * k.shape[2]):
        shares[:, some] = products(q[:, some], k[:, kv]).mul_(scale).softmax(3).mean(2)
    return shares


def largest(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Which entries of the last dimension are among the ``counts`` largest, bool; ties go to the first.

    ``counts`` broadcasts to ``scores`` without its last dimension.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    none = torch.zeros_like(scores, dtype=torch.bool)
    if not isinstance(counts, Tensor):
        return none.scatter_(-1, order[..., :counts], True)
    taken = torch.arange(scores.shape[-1], device=scores.device) < counts[..., None]
    return none.scatter_(-1, order, taken.expand_as(order))


def largest_of_positive(scores: Tensor, counts: Tensor) -> Tensor:
    """``largest`` of scores that are float32 and not negative, infinite ones among them. Counts are int32.

    On a GPU nothing is sorted.
    """
    if runs_triton(scores.device):
        # Imported when it is first used: it takes Triton.
        from tmbench_kernels import triton_heaviest

        return triton_heaviest.largest(scores, counts)
    return largest(scores, counts)


def heaviest(shares: Tensor, limit: float) -> Tensor:
    """Which of probabilities ``[..., n]`` are taken, heaviest first, while their sum is at most the limit. Bool.

    They are float32, not negative and below 2; of equal ones the first is taken first. Sums run in float64, in another
    order on a GPU: there no more than rounding to float64 tells the choice from the one by sorting.
    """
    if runs_triton(shares.device):
        # Imported when it is first used: it takes Triton.
        from tmbench_kernels import triton_heaviest

        return triton_heaviest.heaviest(shares, limit)
    ranked, order = shares.sort(dim=-1, descending=True, stable=True)
    within = ranked.cumsum(-1, dtype=torch.float64) <= limit
    return torch.zeros_like(within).scatter_(-1, order, within)


def heaviest_count(shares: Tensor, limit: float) -> Tensor:
    """How many entries ``heaviest`` takes, ``[...]``."""
    if runs_triton(shares.device):
        # Imported when it is first used: it takes Triton.
        from tmbench_kernels import triton_heaviest

        return triton_heaviest.heaviest_count(shares, limit)
    ranked = shares.sort(dim=-1, descending=True).values
    return (ranked.cumsum(-1, dtype=torch.float64) <= limit).sum(-1)


def heaviest_reaching(shares: Tensor, share: float, held: Tensor | None = None) -> Tensor:
    """Which of weights ``[..., n]`` are taken to hold a share of all, heaviest first: each while those before it fall short.

    Bool; weights and sums are as in ``heaviest``. ``held``, float64 ``[...]``, counts as taken before all of them. What is
    taken of a row of zeros without it differs by device: such rows are the caller's to mask.
    """
    if runs_triton(shares.device):
        # Imported when it is first used: it takes Triton.
        from tmbench_kernels import triton_heaviest

        return triton_heaviest.reaching(shares, share, held)
    ranked, order = shares.sort(dim=-1, descending=True, stable=True)
    if held is None:
        taken = reaching(ranked, share)
    else:
        # In float64 as a first entry, which is taken whatever it is.
        taken = reaching(torch.cat([held[..., None], ranked.double()], dim=-1), share)[..., 1:]
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def reaching(ranked: Tensor, share: float) -> Tensor:
    """Which of weights, in descending order, are taken to hold a share: each while those before it fall short. Bool."""
    held = ranked.cumsum(-1, dtype=torch.float64)
    return F.pad(held < share * held[..., -1:], (1, 0), value=True)[..., :-1]


def tiles(heads: int, kv_heads: int, blocks: int, elements: int) -> Iterator[tuple[slice, slice, range]]:
    """Parts of a matrix of scores that fit ``TILE_ELEMENTS``: query heads, their key heads, and blocks of queries.

    ``elements`` is what one block of queries of one head takes, over the whole batch. Each part holds whole groups of heads
    or lies within one group, so that its tensors are grouped heads again.
    """
    most, groups = max(1, TILE_ELEMENTS // elements), heads // kv_heads
    if most >= groups:
        width = min(most // groups, kv_heads) * groups
    else:
        width = next(n for n in range(most, 0, -1) if groups % n == 0)
    rows = max(1, most // width)
    for low in range(0, heads, width):
        high = min(low + width, heads)
        for first in range(0, blocks, rows):
            yield slice(low, high), slice(low // groups, -(-high // groups)), range(first, min(first + rows, blocks))
