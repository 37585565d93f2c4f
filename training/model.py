"""The model, and the same model as a few compiled functions over a flat stream of tokens.

`LlamaForCausalLM` holds the parameters; `token_losses` computes with them what the class itself would compute, for rows of
any length at one compilation, because only attention sees rows. `tests/training` holds the two against each other.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

HEAD_DIM = 64
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def config(vocabulary: int, bos: int, eos: int, **changes: Any) -> LlamaConfig:
    """Eight layers of width 256: 4 query heads and 2 key-value heads of 64."""
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    }
    return LlamaConfig(vocab_size=vocabulary, bos_token_id=bos, eos_token_id=eos, pad_token_id=eos, **(shape | changes))


@cache
def _angles(length: int, theta: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inverse = theta ** (-torch.arange(0, HEAD_DIM, 2, device=device, dtype=torch.float32) / HEAD_DIM)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * inverse
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@cache
def rotation(tokens: int, length: int, theta: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[tokens, 1, HEAD_DIM]` of a stream that is cut into rows of `length`."""
    cos, sin = _angles(length, theta, device, dtype)
    repeats = tokens // length
    return cos.repeat(repeats, 1)[:, None], sin.repeat(repeats, 1)[:, None]


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _before_attention(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    packed = F.linear(_normed(x, norm, eps), torch.cat([wq, wk, wv]).to(x.dtype))
    q, k, v = (
        part.view(part.shape[0], -1, HEAD_DIM)
        for part in torch.split(packed, [wq.shape[0], wk.shape[0], wv.shape[0]], dim=-1)
    )
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v.contiguous()


def _after_attention(
    x: Tensor, attended: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    x = x + F.linear(attended, wo.to(x.dtype))
    normed = _normed(x, norm, eps)
    both = F.linear(normed, torch.cat([gate, up]).to(x.dtype))
    opened, raised = both.chunk(2, dim=-1)
    return x + F.linear(F.silu(opened) * raised, down.to(x.dtype))


def _losses(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, eps: float) -> Tensor:
    logits = F.linear(_normed(x, norm, eps), embedding.to(x.dtype))
    return F.cross_entropy(logits.float(), targets, reduction="none")


class Stream:
    """Per-token losses of `model` over a flat stream of `tokens` tokens."""

    def __init__(self, model: LlamaForCausalLM, compiled: bool, dtype: torch.dtype) -> None:
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self.model, self.dtype = model, dtype
        self.before, self.after, self.losses = wrap(_before_attention), wrap(_after_attention), wrap(_losses)

    def token_losses(self, ids: Tensor, targets: Tensor, length: int) -> Tensor:
        """The loss of each token `[tokens]`; a row is `length` tokens and sees nothing of the others."""
        inner, setting = self.model.model, self.model.config
        eps, theta = setting.rms_norm_eps, setting.rope_parameters["rope_theta"]
        cos, sin = rotation(ids.shape[0], length, theta, ids.device, self.dtype)
        x = F.embedding(ids, inner.embed_tokens.weight).to(self.dtype)
        for layer in inner.layers:
            attention, mlp = layer.self_attn, layer.mlp
            q, k, v = self.before(
                x,
                layer.input_layernorm.weight,
                attention.q_proj.weight,
                attention.k_proj.weight,
                attention.v_proj.weight,
                cos,
                sin,
                eps,
            )
            q, k, v = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in (q, k, v))
            with sdpa_kernel(BACKENDS, set_priority=True):
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self.after(
                x,
                attended.transpose(1, 2).reshape(ids.shape[0], -1),
                attention.o_proj.weight,
                layer.post_attention_layernorm.weight,
                mlp.gate_proj.weight,
                mlp.up_proj.weight,
                mlp.down_proj.weight,
                eps,
            )
        losses: Tensor = self.losses(x, inner.norm.weight, inner.embed_tokens.weight, targets, eps)
        return losses
