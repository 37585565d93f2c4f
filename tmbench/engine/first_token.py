"""The first token of each prompt of a batch: what TTFT measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FirstToken:
    """One prefill: each prompt's first new token, the logits it was taken from, and how long all took."""

    tokens: tuple[int, ...]
    logits: Tensor
    """``[batch, vocabulary]``, float32, on the CPU."""
    seconds: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def first_token(prefill: Callable[[Tensor], Tensor], ids: Tensor) -> FirstToken:
    """Let ``prefill`` read ``ids`` ``[batch, length]``, which lie on the model's device, and pick the likeliest next tokens.

    Time to first token runs from the token ids on the device to the ids of all new tokens on the host, with the key-value
    cache of every layer filled for decoding. ``prefill`` returns the last position's logits: see ``tmbench.engine.prefill``.
    """
    synchronize(ids.device)
    start = time.perf_counter()
    logits = prefill(ids)
    tokens = tuple(logits.argmax(-1).tolist())
    seconds = time.perf_counter() - start
    return FirstToken(tokens, logits.float().cpu(), seconds)
