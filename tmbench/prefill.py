"""The first token: what TTFT measures."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


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
def first_token(model: PreTrainedModel, ids: Tensor) -> FirstToken:
    """Prefill ``ids`` ``[1, length]``, which lie on the model's device, and pick the likeliest next token.

    Time to first token runs from the token ids on the device to the new token's id on the host, with the key-value cache
    of every layer filled for decoding. Only the last position's logits are computed, as ``generate`` does.
    """
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    synchronize(ids.device)
    start = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, **keep)
    logits = output.logits[0, -1]
    token = int(logits.argmax())
    seconds = time.perf_counter() - start
    return FirstToken(token, logits.float().cpu(), seconds)
