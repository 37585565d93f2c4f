"""What computes attention on a device, found out by trying it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tmbench_kernels import Dense, Pattern, SkipSoftmax, Triangle, VerticalSlash, XAttention

PATTERNS: Mapping[str, Pattern] = {
    "dense": Dense(),
    "triangle": Triangle(),
    "vertical slashes": VerticalSlash(),
    "key blocks": XAttention(),
    "skip-softmax": SkipSoftmax(),
}
"""One pattern for each set of backends: those of whole key blocks share theirs."""


def attention_backends(device: torch.device) -> dict[str, dict[str, str]]:
    """What computes attention on this device, pattern by pattern, each tried on a small prefill: "works", or why not.

    Heads of size 128, in bfloat16 on a GPU and float32 elsewhere; "works, picked" is what such a model gets. Behind the
    backends of dense attention come the kernels that torch may choose from for the last of them, ``sdpa``.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, heads, 256, 128, device=device, dtype=dtype) for heads in (4, 2, 2))
    found = {}
    for name, pattern in PATTERNS.items():
        states = {
            backend.name: backend.obstacle(pattern, q, k, v) or _tried(partial(backend.attend, pattern, q, k, v, 0.1))
            for backend in pattern.backends
        }
        states[pattern.backend(q, k, v).name] += ", picked"
        found[name] = states
    for kernel in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        with sdpa_kernel(SDPBackend.__members__[kernel]):
            found["dense"][f"sdpa {kernel.lower()}"] = _tried(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
    return found


def _tried(attend: Callable[[], Any]) -> str:
    """ "works", or why it does not: what a library raises is its own choice, and what it warns of is no answer."""
    try:
        with warnings.catch_warnings(action="ignore"):
            attend()
    except Exception as error:
        # torch's error is the same for every cause.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return "not on this device" if "No viable backend" in reason else reason
    return "works"
