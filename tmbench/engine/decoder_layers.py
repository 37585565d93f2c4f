"""The decoder layers of a model, as prefills and decoding steps run them one by one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tmbench.models.attention_modules import native_attentions, parents
from tmbench.models.geometry import has_latents, shares_keys

CACHES = ("cache", "past_key_values")
"""The parameter of a layer that takes the key-value cache, by release of transformers."""
WITH_ROUTER = ("GptOssMLP", "Llama4TextMoe")
"""MLPs that return what their router chose beside the hidden states; of all others these alone come."""


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer."""

    number: int
    module: Any
    mlp: nn.Module | None
    """None where nothing follows its attention or recurrence."""
    attention: Any | None
    """Its attention where a method acts on it; None where the layer stays the model's own."""
    native: Any | None = None
    """The attention of a layer that stays the model's own and has a window or chunks."""

    latents: bool = False
    """Whether the attention that a method acts on makes its keys and values from latents, and caches these."""

    @property
    def with_router(self) -> bool:
        """Whether the layer awaits two things of its MLP."""
        return type(self.mlp).__name__ in WITH_ROUTER

    @property
    def cache_name(self) -> str:
        """The parameter of its ``forward`` that takes the cache."""
        return _cache_name(self.module) or ""


def decoder_layers(model: PreTrainedModel, modules: Sequence[Any]) -> list[DecoderLayer] | None:
    """All decoder layers, of which ``modules`` are the attention modules that a method acts on.

    None where they cannot be run apart.
    """
    text = model.config.get_text_config()
    if shares_keys(text):
        return None
    holder = parents(model)
    holders = [holder.get(module) for module in modules]
    if None in holders or len(set(holders)) < len(holders):
        return None
    layers = list(holders)
    if len(layers) < text.num_hidden_layers:
        stack = holder.get(layers[0]) if layers and layers[0] is not None else None
        layers = list(stack) if isinstance(stack, nn.ModuleList) else []
    if len(layers) != text.num_hidden_layers:
        return None
    attention = dict(zip(holders, modules, strict=True))
    native = {holder[module]: module for module in native_attentions(model)}
    found = []
    for number, layer in enumerate(layers):
        own = attention.get(layer)
        mlp = None if layer is None else _mlp(layer)
        if layer is None or (mlp is None and not hasattr(layer, "mixer")) or (own is None and _cache_name(layer) is None):
            return None
        if own is not None and beside(layer, own):
            return None
        # Somebody else's wrapper, for instance accelerate's: there is no telling what it does.
        if any("forward" in vars(module) for module in layer.modules()):
            return None
        latents = own is not None and has_latents(text) and _cache_name(layer) is not None
        found.append(DecoderLayer(number, layer, mlp, own, native.get(layer), latents))
    return found


def beside(layer: nn.Module, attention: Any) -> bool:
    """Whether a layer has a recurrence beside its attention."""
    known = attention, _mlp(layer)
    return any(_mixes(part) and part not in known for part in layer.children())


def _mlp(layer: nn.Module) -> nn.Module | None:
    """What follows the attention of a layer: some families call it otherwise, and may return more than hidden states.

    Of experts with an MLP beside them it is the experts.
    """
    if _mixes(mixer := getattr(layer, "mixer", None)):
        return None
    found = [getattr(layer, name, None) for name in ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp")]
    return next((part for part in (*found, mixer) if isinstance(part, nn.Module)), None)


def _mixes(part: Any) -> bool:
    """Whether a module of a layer mixes positions: an attention, a recurrence or a convolution."""
    return isinstance(part, nn.Module) and getattr(part, "layer_idx", None) is not None


def _cache_name(layer: nn.Module) -> str | None:
    parameters = inspect.signature(type(layer).forward).parameters
    return next((name for name in CACHES if name in parameters), None)
