"""The oracle: plain masked softmax attention, against which every backend of every pattern is tested."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(length: int, device: torch.device | None = None, *, queries: int | None = None) -> Tensor:
    """Query i sees key j <= i: bool ``[queries, length]``, of all queries or of the last so many."""
    rows = length if queries is None else queries
    return torch.ones(rows, length, dtype=torch.bool, device=device).tril(length - rows)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Softmax attention over the pairs that ``mask`` allows, computed and returned in ``dtype``.

    ``mask`` is bool and broadcasts to ``[batch, heads, queries, keys]``; ``sinks`` ``[heads]`` are one more logit of each
    query, whose value is zero. The whole matrix of logits is held in memory, so this is for checking, not for long prompts.
    A query that may attend to no key gets zeros.
    """
    batch, kv_heads, length, _ = k.shape
    logits = masked_logits(q, k, mask, scale=scale, softcap=softcap, dtype=dtype)
    if sinks is not None:
        column = sinks.to(dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = (logits - logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = (weights / total.masked_fill(total == 0, 1))[..., :length]
    out: Tensor = weights.reshape(batch, kv_heads, -1, *weights.shape[2:]) @ v.to(dtype)[:, :, None]
    return out.view(*q.shape[:3], v.shape[3])


def masked_lse(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The log-sum-exp of each query's logits, ``[batch, heads, queries]`` in ``dtype``; -inf for a query without a key."""
    return masked_logits(q, k, mask, scale=scale, softcap=softcap, dtype=dtype).logsumexp(-1)


def masked_logits(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``scale * q k^T``, soft-capped to ``softcap * tanh(logit / softcap)`` unless that is 0, and -inf outside of ``mask``.

    ``[batch, heads, queries, keys]`` in ``dtype``.
    """
    q, k = q.to(dtype), k.to(dtype)
    batch, kv_heads, length, dim = k.shape
    grouped = q.reshape(batch, kv_heads, -1, q.shape[2], dim)
    logits = (grouped @ k[:, :, None].transpose(-1, -2)).view(*q.shape[:3], length)
    logits = logits * (dim**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    return logits.masked_fill(~mask, -torch.inf)
