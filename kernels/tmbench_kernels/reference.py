"""The oracle: plain masked softmax attention, against which every backend of every pattern is tested."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Query i sees key j <= i: bool ``[length, length]``."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Softmax attention over the pairs that ``mask`` allows, computed and returned in ``dtype``.

    ``mask`` is bool and broadcasts to ``[batch, heads, queries, keys]``. The whole matrix of logits is held in memory, so
    this is for checking, not for long prompts. A query that may attend to no key gets zeros.
    """
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    batch, kv_heads, length, dim = k.shape
    scale = dim**-0.5 if scale is None else scale
    grouped = q.reshape(batch, kv_heads, -1, q.shape[2], dim)
    logits = (grouped @ k[:, :, None].transpose(-1, -2)).view(*q.shape[:3], length) * scale
    logits = logits.masked_fill(~mask, -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1)
    out: Tensor = weights.view(*grouped.shape[:4], length) @ v[:, :, None]
    return out.view(*q.shape[:3], v.shape[3])
