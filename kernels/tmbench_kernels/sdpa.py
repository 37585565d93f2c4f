"""Attention in torch, over any bias: what the torch backends of all patterns are made of.

``sdpa`` is torch's scaled_dot_product_attention, called so that it never falls back to the kernel that holds every logit.
torch picks that kernel, whose memory is quadratic, wherever a fused one refuses: for a v narrower or wider than q on the
CPU, and for grouped heads on CUDA outside of FlashAttention. Both are arranged for here, without repeating k or v. It has
neither soft-capped logits nor the log-sum-exp; ``written_out`` has both, block of queries by block of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right

from tmbench_kernels.pattern import empty_output, new_lse

_LOGITS = {"cpu": 2**20, "cuda": 2**26}
"""Logits that are held at a time where they are written out."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """``sdpa``, or ``written_out`` where logits are capped or their log-sum-exp is asked for."""
    if not softcap and lse is None:
        return sdpa(q, k, v, scale, bias=bias, causal=causal)
    return written_out(q, k, v, scale, bias=bias, causal=causal, softcap=softcap, lse=lse)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention of q ``[batch, heads, queries, dim]`` over k and v ``[batch, kv_heads, keys, dim]``, grouped or not.

    ``bias`` is added to the logits and broadcasts to ``[batch, heads, queries, keys]``; ``causal`` aligns the last query
    with the last key. Returns ``[batch, heads, queries, v_dim]``. A query whose keys all have a bias of -inf gets zeros.
    """
    width = v.shape[-1]
    dim = max(q.shape[-1], width)
    q, k, v = (x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1])) for x in (q, k, v))
    if causal and q.shape[2] != k.shape[2]:
        # torch's ``is_causal`` aligns the first query with the first key.
        if q.device.type != "cuda":
            return _combined_chunk(q, k, v, scale)[..., :width]
        bias, causal = causal_lower_right(q.shape[2], k.shape[2]), False
    groups = q.shape[1] // k.shape[1]
    with without_plans(q):
        if groups == 1 or _fuses_groups(q, bias):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=groups > 1
            )
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


@contextmanager
def without_plans(q: Tensor) -> Iterator[None]:
    """Inside, torch's attention of a single query ``[batch, heads, 1, dim]`` on a GPU is not cuDNN's.

    cuDNN, which torch prefers on Hopper and newer GPUs, makes a plan for each shape and stride that it has not met. For one
    query it takes the host many times as long as the kernel takes the GPU, and every text has a length of its own.
    """
    if q.device.type != "cuda" or q.shape[2] > 1 or torch.compiler.is_compiling():
        yield
        return
    switches: Any = torch.backends.cuda
    before = switches.cudnn_sdp_enabled()
    switches.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        switches.enable_cudnn_sdp(before)


def _combined_chunk(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last queries on a CPU: over the keys before them, and over their own, by the log-sum-exps.

    A mask would cost half as much again.
    """
    start = k.shape[2] - q.shape[2]
    return in_parts(q, [Part(k[:, :, :start], v[:, :, :start]), Part(k[:, :, start:], v[:, :, start:], causal=True)], scale)


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the keys and values that queries attend to, at least one."""

    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    causal: bool = False
    unseeing: Tensor | None = None
    """Queries that see none of these keys, bool, broadcast to ``[batch, heads, queries]``; None where all see one."""


def in_parts(q: Tensor, parts: Sequence[Part], scale: float) -> Tensor:
    """Attention on a CPU over keys in parts, combined by their log-sum-exps; q, k and v have one head size.

    Every query must see a key of the first part.
    """
    out, sums = with_lse(q, parts[0], scale)
    for part in parts[1:]:
        more, lse = with_lse(q, part, scale)
        out = more.lerp_(out, (sums - lse).sigmoid_()[..., None])
        sums = torch.logaddexp(sums, lse)
    return empty_output(q, parts[0].v).copy_(out)


def with_lse(q: Tensor, part: Part, scale: float, *, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Attention over one part, and the log-sum-exps ``[batch, heads, queries]``, both in the latter's type."""
    k, v, width = part.k, part.v, part.v.shape[-1]
    if softcap or q.device.type != "cpu":
        sums = new_lse(q)
        out = written_out(q, k, v, scale, bias=part.bias, causal=part.causal, softcap=softcap, lse=sums)
        return out.to(sums.dtype), sums
    dim = max(q.shape[-1], width)
    q, k, v = (x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1])) for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=part.causal, attn_mask=part.bias, scale=scale
    )
    if part.unseeing is not None:
        # torch has another number for a query that sees nothing.
        lse = lse.masked_fill(part.unseeing, -torch.inf)
    return out[..., :width].to(lse.dtype), lse


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """As ``sdpa``, with logits of at least float32 that are held for some queries at a time.

    Logits are capped to ``softcap * tanh(logit / softcap)`` before the bias is added, unless that is 0. ``lse``
    ``[batch, heads, queries]`` is filled with the log-sum-exp of each query's logits, -inf for a query without a key.
    """
    out = empty_output(q, v)
    if q.device.type != "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    rows, keys = q.shape[2], k.shape[2]
    start = keys - rows
    step = max(1, _LOGITS[q.device.type] // (q.shape[0] * q.shape[1] * keys))
    for low in range(0, rows, step):
        high = min(low + step, rows)
        seen = start + high if causal else keys
        logits = _grouped(q[:, :, low:high], k[:, :, :seen].transpose(2, 3), summed=True).mul_(scale)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            logits += bias[..., low:high, :] if bias.shape[-2] > 1 else bias
        if causal:
            positions = torch.arange(start + low, start + high, device=q.device)[:, None]
            logits.masked_fill_(torch.arange(seen, device=q.device) > positions, -torch.inf)
        total = logits.logsumexp(3)
        if lse is not None:
            lse[:, :, low:high] = total
        # A query that sees no key has a total of -inf, and -inf - -inf is not a number.
        weights = logits.sub_(total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp_()
        out[:, :, low:high] = _grouped(weights.to(v.dtype), v[:, :, :seen])
    return out


def from_an_edge(
    attend: Callable[[Tensor, Tensor | None], Tensor], q: Tensor, v: Tensor, skipped: int, lse: Tensor | None
) -> Tensor:
    """``attend(q, lse)`` for a q whose first block lacks its ``skipped`` first queries: zeros stand for them meanwhile.

    Returns ``[batch, heads, queries, v_dim]`` and fills ``lse``, if any, for the queries of q alone.
    """
    whole = F.pad(q, (0, 0, skipped, 0))
    sums = None if lse is None else new_lse(whole)
    out = empty_output(q, v).copy_(attend(whole, sums)[:, :, skipped:])
    if lse is not None and sums is not None:
        lse.copy_(sums[:, :, skipped:])
    return out


def _grouped(a: Tensor, b: Tensor, *, summed: bool = False) -> Tensor:
    """``a @ b`` for grouped heads: a ``[batch, heads, rows, n]``, b ``[batch, kv_heads, n, m]``; ``summed`` in float32."""
    batch, heads, rows, _ = a.shape
    a = a.reshape(batch * b.shape[1], heads // b.shape[1] * rows, a.shape[3])
    b = b.flatten(0, 1)
    # In 16 bits, which are left to the GPU, a product would be rounded to them.
    half = summed and a.dtype in (torch.float16, torch.bfloat16)
    out = torch.bmm(a, b, out_dtype=torch.float32) if half else a @ b
    return out.view(batch, heads, rows, -1)


def _fuses_groups(q: Tensor, bias: Tensor | None) -> bool:
    """Whether torch has a fused kernel for grouped heads here."""
    if q.device.type == "cuda":
        unmasked = bias is None or isinstance(bias, CausalBias)
        return unmasked and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256
    return True


def _slice_heads(bias: Tensor | None, member: int, groups: int) -> Tensor | None:
    if bias is None or isinstance(bias, CausalBias) or bias.dim() < 3 or bias.shape[-3] == 1:
        return bias
    return bias[..., member::groups, :, :]
