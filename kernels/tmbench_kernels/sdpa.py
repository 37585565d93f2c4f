"""torch's scaled_dot_product_attention, called so that it never falls back to the kernel that holds every logit.

torch picks that kernel, whose memory is quadratic, wherever a fused one refuses: for a v narrower or wider than q on the
CPU, and for grouped heads on CUDA outside of FlashAttention. Both are arranged for here, without repeating k or v.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention of q ``[batch, heads, queries, dim]`` over k and v ``[batch, kv_heads, keys, dim]``, grouped or not.

    ``bias`` is added to the logits and broadcasts to ``[batch, heads, queries, keys]``; ``causal`` aligns the first query
    with the first key. Returns ``[batch, heads, queries, v_dim]``. A query whose keys all have a bias of -inf gets zeros.
    """
    width = v.shape[-1]
    dim = max(q.shape[-1], width)
    q, k, v = (x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1])) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if groups == 1 or _fuses_groups(q, bias):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=groups > 1)
    else:
        # One member of every group at a time: each such slice has as many heads as k.
        slices = [
            F.scaled_dot_product_attention(
                q[:, member::groups], k, v, attn_mask=_slice_heads(bias, member, groups), is_causal=causal, scale=scale
            )
            for member in range(groups)
        ]
        out = torch.stack(slices, dim=2).flatten(1, 2)
    return out[..., :width]


def _fuses_groups(q: Tensor, bias: Tensor | None) -> bool:
    """Whether torch has a fused kernel for grouped heads here."""
    if q.device.type == "cuda":
        return bias is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256
    return True


def _slice_heads(bias: Tensor | None, member: int, groups: int) -> Tensor | None:
    if bias is None or bias.dim() < 3 or bias.shape[-3] == 1:
        return bias
    return bias[..., member::groups, :, :]
