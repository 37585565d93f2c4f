"""Attention of one new token over a cache, in torch: the reference, and what runs where no kernel serves."""

from __future__ import annotations

import torch
from torch import Tensor

from tmbench_kernels.sdpa import attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """As ``tmbench_kernels.decode.attend_with_kvcache``, without sinks; fills ``lse`` ``[batch, heads, 1]`` where given."""
    sequences = torch.arange(len(q), device=q.device)
    places = cache_seqlens.long()
    k_cache[sequences, :, places] = k[:, :, 0]
    v_cache[sequences, :, places] = v[:, :, 0]
    # A graph on a GPU must not depend on the lengths, which it does not know while it is recorded.
    keys = k_cache.shape[2] if q.device.type == "cuda" else int(places.max()) + 1
    back = places[:, None] - torch.arange(keys, device=q.device)[None, :]
    seen = (back >= 0) & (back < (window or keys))
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    keys_values = k_cache[:, :, :keys], v_cache[:, :, :keys]
    out = attention(q, *keys_values, scale, bias=bias[:, None, None], softcap=softcap, lse=lse)
    return out.transpose(1, 2).contiguous()
