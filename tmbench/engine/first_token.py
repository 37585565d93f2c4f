"""The first token: what TTFT measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FirstToken:
    """One prefill: the first new token, the logits it was taken from, and how long it took."""

    token: int
    logits: Tensor
    """``[vocabulary]``, float32, on the CPU."""
    seconds: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def first_token(prefill: Callable[[Tensor], Tensor], ids: Tensor) -> FirstToken:
    """Let ``prefill`` read ``ids`` ``[1, length]``, which lie on the model's device, and pick the likeliest next token.

    Time to first token runs from the token ids on the device to the new token's id on the host, with the key-value cache
    of every layer filled for decoding. ``prefill`` returns the last position's logits: see ``tmbench.engine.prefill``.
    """
    synchronize(ids.device)
    start = time.perf_counter()
    logits = prefill(ids)
    token = int(logits[0].argmax())
    seconds = time.perf_counter() - start
    return FirstToken(token, logits[0].float().cpu(), seconds)
