"""Attention as transformers computes it: that of layers which stay the model's own, and that of decoding.

Masks are made when a layer asks for them: beside the layers that a method acts on none is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tmbench.errors import UnsupportedModelError

MADE = "_tmbench_mask"
"""The attribute of a stand-in for a mask that makes it."""
LATER = ("s_aux", "softcap")
"""What torch's scaled_dot_product_attention does not compute: sinks, and soft-capped logits."""


def later_mask(*sizes: int | Tensor, **about: Any) -> Tensor:
    """A stand-in for the mask that ``sdpa_mask`` makes of such arguments: made where a layer needs it, and once."""
    stand_in = torch.zeros(1, 1, 1, 1)
    setattr(stand_in, MADE, cache(lambda: sdpa_mask(*sizes, **about)))
    return stand_in


def own_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """What the model itself computes in a layer, ``[batch, queries, heads, dim]``, as attention functions have it.

    By torch's own attention, or by the plain one of the model's file where it asks for what torch's does not compute.
    Raises UnsupportedModelError for a mask that is not of these keys.
    """
    if (make := getattr(attention_mask, MADE, None)) is not None:
        attention_mask = make()
    if attention_mask is not None and attention_mask.shape[-2:] != (query.shape[2], key.shape[2]):
        raise UnsupportedModelError(
            f"layer {module.layer_idx} of {type(module).__name__} was given a mask of other keys than it has"
        )
    if all(kwargs.get(name) is None for name in LATER):
        attend: Callable[..., tuple[Tensor, Any]] = sdpa_attention_forward
        return attend(module, query, key, value, attention_mask, **kwargs)[0]
    plain: Callable[..., tuple[Tensor, Any]] | None = getattr(
        sys.modules[type(module).__module__], "eager_attention_forward", None
    )
    if plain is None:
        raise UnsupportedModelError(f"{type(module).__name__} has sinks or soft-capped logits, and no function for them")
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
            ~attention_mask, torch.finfo(query.dtype).min
        )
    return plain(module, query, key, value, attention_mask, **kwargs)[0]
