"""Attention of one new token of each sequence over a cache of keys and values, each sequence with a length of its own.

What ``flash_attn_with_kvcache`` of FlashAttention does for one query: the new key and value are written into the cache, and
the query sees them and all before them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmbench_kernels.decode import torch_backend
from tmbench_kernels.pattern import add_sinks, check_logits, new_lse


def attend_with_kvcache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Write each sequence's new key and value behind its cached ones, and attend to all of them, or the last ones.

    Args:
        q: ``[batch, heads, 1, dim]``.
        k, v: ``[batch, kv_heads, 1, dim]`` and ``[batch, kv_heads, 1, v_dim]``; kv_heads divides heads.
        k_cache, v_cache: ``[batch, kv_heads, capacity, dim]`` and likewise v_dim, written in place.
        cache_seqlens: ``[batch]``, int32: the keys that are there of each sequence, fewer than the capacity. What lies
            behind them must be finite.
        scale: what logits are multiplied by.
        softcap, sinks: as ``Pattern.attend`` has them.
        window: how many keys the query sees at most, the new one among them; 0 for all.

    Returns:
        ``[batch, 1, heads, v_dim]``, contiguous.

    Raises ValueError for a cap below zero, or sinks that are not one number for each query head.
    """
    check_logits(q, softcap, sinks)
    lse = None if sinks is None else new_lse(q)
    small = max(q.shape[-1], v.shape[-1]) <= 512 and q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and small:
        from tmbench_kernels.decode import triton_backend

        attend = triton_backend.attend
    else:
        attend = torch_backend.attend
    out = attend(q, k, v, k_cache, v_cache, cache_seqlens, scale, softcap=softcap, lse=lse, window=window)
    if lse is not None and sinks is not None:
        add_sinks(out.transpose(1, 2), lse, sinks)
    return out
