"""Attention as transformers computes it: that of layers which stay the model's own, and that of decoding.

Masks are made when a layer asks for them: beside the layers that a method acts on none is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tmbench.errors import UnsupportedModelError
from tmbench_kernels.sdpa import without_plans

MADE = "_tmbench_mask"
"""The attribute of a stand-in for a mask that makes it."""
SDPA, EAGER = "sdpa", "eager"
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
        # A text that is decoded is one key longer at every step.
        with without_plans(query) if query.shape[2] == 1 else nullcontext():
            return attend(module, query, key, value, attention_mask, **kwargs)[0]
    plain = _plain(module)
    if plain is None:
        raise UnsupportedModelError(f"{type(module).__name__} has sinks or soft-capped logits, and no function for them")
    return plain(module, query, key, value, _added(attention_mask, query, key), **kwargs)[0]


def _plain(module: Any) -> Callable[..., tuple[Tensor, Any]] | None:
    """The attention of a model's file that is written out, which transformers calls eager."""
    found: Callable[..., tuple[Tensor, Any]] | None = getattr(
        sys.modules[type(module).__module__], "eager_attention_forward", None
    )
    return found


def _added(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask as such attention adds it to the logits: a causal one where there is none, but for a single query."""
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return mask


@dataclass(frozen=True)
class AsLoaded:
    """The attention of one layer by the function that transformers loaded the model with, over a whole prompt."""

    module: Any
    name: str
    """As transformers calls it."""
    function: Callable[..., tuple[Tensor, Any]]

    @classmethod
    def of(cls, module: Any) -> AsLoaded:
        """Of a layer, while its config names that function; raises UnsupportedModelError for one that takes other masks."""
        name = str(module.config._attn_implementation or EAGER)
        function = {SDPA: sdpa_attention_forward, EAGER: _plain(module)}.get(name)
        if function is None:
            raise UnsupportedModelError(
                f"--attn-native shows {SDPA} and {EAGER} attention, and {type(module).__name__} was loaded with another, "
                f"{name}: leave the option out"
            )
        return cls(module, name, function)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, **about: Any) -> Tensor:
        """``[batch, queries, heads, dim]``, of all queries or the last; ``about`` is what the model asks of the logits."""
        mask = None if self.name == SDPA else _added(None, q, k)
        names = {"softcap": "softcap", "sinks": "s_aux"}
        asked = {names[name]: value for name, value in about.items()}
        out: Tensor = self.function(self.module, q, k, v, mask, dropout=0.0, scaling=scale, **asked)[0]
        return out
