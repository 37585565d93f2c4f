"""Attention of one new token of each sequence over a cache of keys and values, each sequence with a length of its own.

What ``flash_attn_with_kvcache`` of FlashAttention does for one query: the new key and value are written into the cache, and
the query sees them and all before them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmbench_kernels.decode import torch_backend


def attend_with_kvcache(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, scale: float
) -> Tensor:
    """Write each sequence's new key and value behind its cached ones, and attend to all of them.

    Args:
        q: ``[batch, heads, 1, dim]``.
        k, v: ``[batch, kv_heads, 1, dim]`` and ``[batch, kv_heads, 1, v_dim]``; kv_heads divides heads.
        k_cache, v_cache: ``[batch, kv_heads, capacity, dim]`` and likewise v_dim, written in place.
        cache_seqlens: ``[batch]``, int32: the keys that are there of each sequence, fewer than the capacity. What lies
            behind them must be finite.
        scale: what logits are multiplied by.

    Returns:
        ``[batch, 1, heads, v_dim]``, contiguous.
    """
    small = max(q.shape[-1], v.shape[-1]) <= 512 and q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and small:
        from tmbench_kernels.decode import triton_backend

        return triton_backend.attend(q, k, v, k_cache, v_cache, cache_seqlens, scale)
    return torch_backend.attend(q, k, v, k_cache, v_cache, cache_seqlens, scale)
