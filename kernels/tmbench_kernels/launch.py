"""What the launches of all kernels of our own share: how tensors must lie, the scale, and the size of the device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; 1 for the CPU, where the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def loadable(x: Tensor) -> Tensor:
    """``x``, or a copy where the tensor memory accelerator cannot read it: its rows must start at multiples of 16 bytes."""
    size = x.element_size()
    *strides, last = x.stride()
    if last == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride * size % 16 == 0 for stride in strides):
        return x
    # In memory of its own: the stride of a dimension of one counts as well.
    return empty_rows(x, *x.shape[:-1]).copy_(x)


def empty_rows(x: Tensor, *sizes: int) -> Tensor:
    """Room for so many rows of the length and the type of those of ``x``, each padded to a multiple of 16 bytes."""
    size = x.element_size()
    dim = -(-x.shape[-1] * size // 16) * 16 // size
    return x.new_empty(*sizes, dim)[..., : x.shape[-1]]


def positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same logits with a scale above zero, which the kernels take for granted."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale else (torch.zeros_like(q), 1.0)


def logit_scales(scale: float, softcap: float) -> tuple[float, float | None]:
    """What the kernels in Triton multiply logits with: before the power of two, and before the tanh where they are capped.

    A capped logit is ``softcap * tanh(scale * logit / softcap)``, so its first factor is the cap.
    """
    return (softcap * LOG2_E, scale / softcap) if softcap else (scale * LOG2_E, None)


def block_dim(dim: int) -> int:
    """The size of the tile that holds a head's values: a power of two."""
    return max(16, 1 << (dim - 1).bit_length())
