"""The floor under a time to first token: the arithmetic a method must do, at the matrix rate of this very device.

TTFT over floor says how good the software is: 1.0 would be matrix products and nothing else.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn
from transformers import PreTrainedModel

from tmbench.prefill import synchronize


def linear_flop(model: PreTrainedModel, length: int) -> float:
    """Floating-point operations of the model's linear layers for a prompt; the output head works on one position.

    Counts ``nn.Linear`` modules: a mixture of experts keeps its weights elsewhere and is underestimated.
    """
    head = model.get_output_embeddings()
    flop = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            flop += 2.0 * module.in_features * module.out_features * (1 if module is head else length)
    return flop


def attention_flop(pairs: float, head_dim: int) -> float:
    """Operations of attention over so many (query, key) pairs, batch and heads included: two products of head_dim."""
    return 4.0 * head_dim * pairs


def causal_pairs(length: int) -> int:
    """(query, key) pairs of one head under full causal attention."""
    return length * (length + 1) // 2


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating-point operations per second of a large square matrix product, the median of some repeats."""
    size = 8192 if device.type == "cuda" else 2048
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(seconds[1:])
