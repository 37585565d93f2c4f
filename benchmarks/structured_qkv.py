"""Structured Q, K, V for timing data-dependent sparse attention without a trained checkpoint.

Gaussian Q and K make every dynamic method look like dense attention: their top-k lands everywhere. These tensors carry the
features that long-context heads show (MInference, Jiang et al. 2024): a local band or RoPE slashes (a constant component of
q and k, rotated by RoPE), sink columns (the first four keys), and vertical columns (one key in 256). Their densities are in
dynamic_attention.csv.
"""

import torch
from torch import Tensor

SINKS, SINK_STRENGTH = 4, 30.0
COLUMN_EVERY, COLUMN_STRENGTH = 256, 20.0
QUERY_ALIGNMENT = 4.0  # of every query with the sink and column direction


def structured_qkv(
    length: int,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    rope_theta: float = 5e5,
    seed: int = 0,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [1, heads, length, dim] and k, v [1, kv_heads, length, dim]; RoPE is already applied to q and k."""
    generator = torch.Generator(device=device).manual_seed(seed)
    half = dim // 2
    frequency = rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=device).double()[:, None] * frequency.double()
    cos, sin = angle.cos().float(), angle.sin().float()

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def noise() -> Tensor:
        return torch.randn(length, dim, device=device, generator=generator)

    q = torch.empty(1, heads, length, dim, device=device, dtype=dtype)
    k = torch.empty(1, kv_heads, length, dim, device=device, dtype=dtype)
    v = torch.randn(1, kv_heads, length, dim, device=device, generator=generator).to(dtype)
    column_direction = torch.zeros(dim, device=device)
    column_direction[half - 1] = 1.0  # the slowest frequency: RoPE hardly moves it
    group = heads // kv_heads
    for kv_head in range(kv_heads):
        positional = _positional_component(kv_head % 3, dim, device)
        strength = torch.zeros(length, device=device)
        strength[:SINKS] = SINK_STRENGTH
        columns = torch.randperm(length, generator=generator, device=device)[: length // COLUMN_EVERY]
        strength[columns] += COLUMN_STRENGTH
        k[0, kv_head] = rotate(noise() + positional + strength[:, None] * column_direction).to(dtype)
        for head in range(kv_head * group, (kv_head + 1) * group):
            q[0, head] = rotate(noise() + positional + QUERY_ALIGNMENT * column_direction).to(dtype)
    return q, k, v


def _positional_component(kind: int, dim: int, device: str) -> Tensor:
    """The constant part [dim] of q and k; its RoPE product peaks at distance 0: a band (0), slashes (1), a comb (2)."""
    half = dim // 2
    amplitude = torch.zeros(half, device=device)
    if kind == 0:
        amplitude[: half // 2] = 1.0
    elif kind == 1:
        amplitude[half // 4 : half // 2 + 4] = 1.0
    else:
        amplitude[half // 4 :: 4] = 1.0
    peak_logit = (14.0, 10.0, 7.0)[kind]
    amplitude *= (peak_logit * dim**0.5 / amplitude.square().sum()).sqrt()
    return torch.cat([amplitude, torch.zeros(half, device=device)])
