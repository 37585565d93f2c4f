"""An MLP, or experts, over chunks of tokens, so that what is between two products takes a bounded part of the memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tmbench.models.geometry import is_experts

CHUNK = 16384
"""The fewest tokens of a long prompt that an MLP works on at a time; experts, who share them, work on twice as many."""
MLP_SHARE = 0.1
"""The part of a GPU's memory that an MLP's intermediate tensors may take: larger chunks spare copies of what they yield."""


def in_chunks(mlp: nn.Module, run: Callable[..., Any], x: Tensor) -> Tensor:
    """The MLP over ``[batch, length, hidden]``, in chunks of tokens of all texts where it treats these one by one."""
    tokens = x.shape[0] * x.shape[1]
    if tokens > (chunk := _chunk(mlp, x)):
        whole = torch.empty_like(x, memory_format=torch.contiguous_format)
        inner, outer = (tensor.reshape(1, tokens, x.shape[2]) for tensor in (x, whole))
        # Of even size: a remainder of a few tokens would read all the weights once more.
        size = math.ceil(tokens / math.ceil(tokens / chunk))
        for start in range(0, tokens, size):
            part = slice(start, start + size)
            outer[:, part] = hidden_of(run(mlp, inner[:, part]), inner[:, part])
        return whole
    return hidden_of(run(mlp, x), x).contiguous()


def with_router(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, None]:
    """For a layer that awaits what a router chose as well, and does not read it."""
    return run(x), None


def hidden_of(out: Any, x: Tensor) -> Tensor:
    """The hidden states of what an MLP returns of ``x``: they may be the first of several things, their tokens in a row."""
    hidden: Tensor = out[0].reshape(x.shape) if isinstance(out, tuple) else out
    return hidden


def _chunk(mlp: nn.Module, x: Tensor) -> int:
    """Tokens at a time. A gated MLP holds three tensors of its inner width."""
    if not is_plain(mlp):
        # How much experts hold is not known from outside: some yield all of their outputs for every token.
        return 2 * CHUNK if any(map(is_experts, mlp.children())) else x.shape[0] * x.shape[1]
    if x.device.type != "cuda":
        return CHUNK
    width = max((part.out_features for part in mlp.children() if isinstance(part, nn.Linear)), default=x.shape[-1])
    room = MLP_SHARE * torch.cuda.get_device_properties(x.device).total_memory
    return max(CHUNK, int(room // (3 * width * x.element_size())))


def is_plain(mlp: nn.Module) -> bool:
    """Whether an MLP is made of linear layers and activations alone; experts and their routers are not."""
    if next(mlp.parameters(recurse=False), None) is not None:
        return False
    return all(isinstance(part, nn.Linear) or next(part.parameters(), None) is None for part in mlp.children())
