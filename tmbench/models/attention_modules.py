"""The attention modules of a model: which they are, which layers have windows, and what no method can honour.

transformers' models differ in what they keep where; the rest of tmbench asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tmbench.errors import UnsupportedModelError
from tmbench.results.words import counted

PLACE = "_tmbench_slot"
"""The attribute of an attention module that holds its pattern while a method is applied."""


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The model's self-attention modules in layer order; raises UnsupportedModelError where patterns cannot be right."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise UnsupportedModelError(f"{name} does not use transformers' attention interface, so no method can be applied")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; methods are for decoder-only models")
    text = model.config.get_text_config()
    modules = sorted(self_attentions(model), key=lambda module: int(module.layer_idx))
    if [module.layer_idx for module in modules] != list(range(text.num_hidden_layers)):
        raise UnsupportedModelError(
            f"{name} has {counted(text.num_hidden_layers, 'layer')} but {counted(len(modules), 'attention module')} that "
            "can be served: models that mix attention with other kinds of layer are not supported"
        )
    for layer, module in enumerate(modules):
        if hasattr(module, PLACE):
            raise UnsupportedModelError(f"{name} is already running {getattr(module, PLACE).session.plan.method}")
        if feature := _own_feature(module, text, layer):
            raise UnsupportedModelError(f"layer {layer} of {name} has {feature}, which no method here can honour")
    return modules


def self_attentions(model: nn.Module) -> Iterator[Any]:
    """The modules that attend within a sequence, in no particular order."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) is not None and hasattr(module, "is_causal"):
            yield module


def parents(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The module that holds each module: of an attention module, that is its decoder layer."""
    return {child: parent for parent in model.modules() for child in parent.children()}


def windows(model: PreTrainedModel) -> dict[int, int]:
    """The layers that have a sliding window, with its tokens: prompts up to that length are the same without it."""
    text = model.config.get_text_config()
    found = {int(module.layer_idx): _window(module, text, int(module.layer_idx)) for module in self_attentions(model)}
    return {layer: window for layer, window in sorted(found.items()) if window}


def _window(module: Any, config: Any, layer: int) -> int | None:
    """A layer's sliding window in tokens; None or 0 where it has none."""
    layer_types = getattr(config, "layer_types", None)
    # Some models keep the window on the module, where None means that this layer has none; others pass the config's along.
    if hasattr(module, "sliding_window"):
        window: int | None = module.sliding_window
    elif layer_types is None or (layer < len(layer_types) and layer_types[layer] == "sliding_attention"):
        window = getattr(config, "sliding_window", None)
    else:
        window = None
    return window


def _own_feature(module: Any, config: Any, layer: int) -> str | None:
    """What sets this layer's attention apart from plain causal softmax attention, in words."""
    layer_types = getattr(config, "layer_types", None)
    # A window that no query reaches changes nothing: lengths decide, see ``windows``.
    served = {"full_attention"} | ({"sliding_attention"} if _window(module, config, layer) else set())
    if layer_types is not None and layer_types[layer] not in served:
        return f"attention of type {layer_types[layer]}"
    if getattr(module, "sinks", None) is not None:
        return "learned attention sinks"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "soft-capped logits"
    if not module.is_causal:
        return "attention that is not causal"
    return None
