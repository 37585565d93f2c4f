"""How light each tile of dense attention is, in torch: what a threshold is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tmbench_kernels.block_sparse.lists import BLOCK, block_count
from tmbench_kernels.scores import products, tiles

_SMALLER = {"cpu": 256}
"""How much smaller a tile of logits is than others: several are alive at once, and on a CPU they are to fit the caches."""


def margins(ascending: bool, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """By how much a tile's largest logit exceeds the largest one of the tiles before, of the query where it does most.

    Float32 ``[batch, heads, q_blocks, k_blocks]``, of q ``[batch, heads, queries, dim]``, which is of k's last tokens. The
    first tile in order has inf, a tile of later keys -inf.
    """
    batch, heads, length = *q.shape[:2], k.shape[2]
    start, blocks = length - q.shape[2], block_count(length)
    first, smaller = start // BLOCK, _SMALLER.get(q.device.type, 4)
    found = q.new_full((batch, heads, blocks - first, blocks), -torch.inf, dtype=torch.float32)
    for some, kv, part in tiles(heads, k.shape[1], blocks - first, smaller * batch * BLOCK * length):
        for row in part:
            own = first + row
            low, high = max(own * BLOCK, start), min((own + 1) * BLOCK, length)
            logits = products(q[:, some, low - start : high - start], k[:, kv, :high]).mul_(scale)
            later = torch.ones(high - low, high - low, dtype=torch.bool, device=q.device).triu_(1)
            logits[..., low:].masked_fill_(later, -torch.inf)
            top = torch.unflatten(F.pad(logits, (0, -high % BLOCK), value=-torch.inf), 3, (-1, BLOCK)).amax(4)
            found[:, some, row, : own + 1] = _above(top if ascending else top.flip(3)).amax(2)
            if not ascending:
                found[:, some, row, : own + 1] = found[:, some, row, : own + 1].flip(2)
    return found


def _above(top: Tensor) -> Tensor:
    """Each of a row's maxima less the largest of those before it; inf for the first."""
    running = top.cummax(3).values
    return F.pad(top[..., 1:] - running[..., :-1], (1, 0), value=torch.inf)
