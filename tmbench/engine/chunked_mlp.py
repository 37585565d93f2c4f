"""An MLP, or experts, over chunks of tokens, so that what is between two products takes a bounded part of the memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from functools import cache
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
    if tokens > (chunk := chunk_of(mlp, x)):
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


def chunk_of(mlp: nn.Module, like: Tensor) -> int:
    """The most tokens that an MLP works on at a time, of hidden states on this device and in this dtype.

    A gated one holds three tensors of its inner width.
    """
    if not is_plain(mlp):
        # How much experts hold is not known from outside: some yield all of their outputs for every token.
        return 2 * CHUNK if any(map(is_experts, mlp.children())) else sys.maxsize
    if like.device.type != "cuda":
        return CHUNK
    width = max((part.out_features for part in mlp.children() if isinstance(part, nn.Linear)), default=like.shape[-1])
    return max(CHUNK, int(MLP_SHARE * _memory(like.device) // (3 * width * like.element_size())))


def common_chunk(mlps: Iterable[nn.Module | None], like: Tensor) -> int:
    """The most tokens that each of these works on at a time which is plain; 0 where none is."""
    return min((chunk_of(mlp, like) for mlp in mlps if mlp is not None and is_plain(mlp)), default=0)


@cache
def _memory(device: torch.device) -> int:
    """Bytes of a GPU, which torch takes longer to tell than it takes to launch a kernel."""
    return torch.cuda.get_device_properties(device).total_memory


def is_plain(mlp: nn.Module) -> bool:
    """Whether an MLP is made of linear layers and activations alone; experts and their routers are not."""
    if next(mlp.parameters(recurse=False), None) is not None:
        return False
    return all(isinstance(part, nn.Linear) or next(part.parameters(), None) is None for part in mlp.children())
