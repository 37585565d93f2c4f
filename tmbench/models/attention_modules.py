"""The attention modules of a model: which a method acts on, which stay the model's own, and what no method can honour.

transformers' models differ in what they keep where; the rest of tmbench asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tmbench.errors import UnsupportedModelError
from tmbench.methods.layer_kinds import CHUNKED, FULL, KINDS, SLIDING, kind_words, layer_kinds
from tmbench.models.own_code import source_of
from tmbench.results.words import counted

PLACE = "_tmbench_slot"
"""The attribute of an attention module that holds its pattern while a method is applied."""
LOOK_UPS = ("ALL_ATTENTION_FUNCTIONS.get_interface(", "ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]")
"""How code that a checkpoint brings looks up its attention: now, and before transformers had a function for it."""
SPARSE_KINDS = ("indexed", "sparse", "compressed")
"""Parts of the names of layer kinds under which a model chooses its keys by itself, as it was trained to."""


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The modules that a method acts on, in layer order; raises UnsupportedModelError where patterns cannot be right."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not _uses_interface(model):
        raise UnsupportedModelError(f"{name} does not use transformers' attention interface, so no method can be applied")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; methods are for decoder-only models")
    kinds = layer_kinds(model.config)
    _check_kinds(name, model, kinds)
    full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    found = sorted(self_attentions(model), key=lambda module: int(module.layer_idx))
    modules = [module for module in found if module.layer_idx >= len(kinds) or kinds[module.layer_idx] == FULL]
    if [module.layer_idx for module in modules] != full:
        raise UnsupportedModelError(
            f"{name} has {counted(len(full), 'layer')} but {counted(len(modules), 'attention module')} that can be served: "
            "models whose config does not say of what kind each layer is, or whose layers share a module, are not supported"
        )
    for module in modules:
        if hasattr(module, PLACE):
            raise UnsupportedModelError(f"{name} is already running {getattr(module, PLACE).session.plan.method}")
        if not module.is_causal:
            raise UnsupportedModelError(
                f"layer {module.layer_idx} of {name} has attention that is not causal, which no method here can honour"
            )
    _check_spans(name, model, kinds)
    return modules


def _check_spans(name: str, model: PreTrainedModel, kinds: tuple[str, ...]) -> None:
    """Raise UnsupportedModelError for windows or chunks that hold no other token than the query's own, or none."""
    for module in self_attentions(model):
        layer, tokens = int(module.layer_idx), span(module, model.config)
        local = layer < len(kinds) and kinds[layer] in (SLIDING, CHUNKED)
        # Of a window of 1, transformers' cache leaves out all but the last 0 keys, which are all, and decoding sees them.
        if tokens == 1 or (local and tokens < 1):
            raise UnsupportedModelError(
                f"layer {layer} of {name} has windows or chunks of {counted(tokens, 'token')}, which transformers' cache "
                "does not keep to: methods are for models with wider ones"
            )


def _uses_interface(model: PreTrainedModel) -> bool:
    """Whether a model looks its attention up by the name in its config each time that it runs."""
    # transformers tells by the text of the model's own class, or remembers what it said of a class that this one is made of.
    brought = [text for text in map(source_of, self_attentions(model)) if text]
    if brought:
        return all(any(look_up in text for look_up in LOOK_UPS) for text in brought)
    return bool(model._can_set_attn_implementation())


def _check_kinds(name: str, model: nn.Module, kinds: tuple[str, ...]) -> None:
    for layer, kind in enumerate(kinds):
        if any(part in kind for part in SPARSE_KINDS):
            raise UnsupportedModelError(
                f"{name} is natively sparse: layer {layer} has attention of type {kind}, which chooses its keys as it was "
                "trained to, so a method in its place would measure another model"
            )
        if kind not in KINDS:
            raise UnsupportedModelError(
                f"layer {layer} of {name} has attention of type {kind}, which no method here can honour"
            )
    if indexer := next((part for part, module in model.named_modules() if "indexer" in type(module).__name__.lower()), ""):
        raise UnsupportedModelError(
            f"{name} is natively sparse: it chooses its keys by an indexer ({indexer}) as it was trained to, so a method in "
            "its place would measure another model"
        )
    if FULL not in kinds:
        raise UnsupportedModelError(
            f"{name} has no layer of full attention, which a method could act on: its layers are {kind_words(kinds)}"
        )


def native_attentions(model: PreTrainedModel) -> list[Any]:
    """The attention modules of layers that stay the model's own: those with a window of their own, or with chunks."""
    kinds = layer_kinds(model.config)
    found = [module for module in self_attentions(model) if module.layer_idx < len(kinds)]
    return sorted((module for module in found if kinds[module.layer_idx] != FULL), key=lambda module: int(module.layer_idx))


def self_attentions(model: nn.Module) -> Iterator[Any]:
    """The modules that attend within a text, in no particular order; what reads images beside it is not among them."""
    config = getattr(model, "config", None)
    text = None if config is None else config.get_text_config()
    found = [
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) is not None and hasattr(module, "is_causal")
    ]
    of_text = [module for module in found if getattr(module, "config", None) is text]
    yield from of_text or found


def parents(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The module that holds each module: of an attention module, that is its decoder layer."""
    return {child: parent for parent in model.modules() for child in parent.children()}


def windows(model: PreTrainedModel) -> dict[int, int]:
    """The layers that have a sliding window, with its tokens: prompts up to that length are the same without it."""
    text = model.config.get_text_config()
    found = {int(module.layer_idx): _window(module, text, int(module.layer_idx)) for module in self_attentions(model)}
    return {layer: window for layer, window in sorted(found.items()) if window}


def limiting_windows(model: PreTrainedModel) -> dict[int, int]:
    """The windows that no prompt of a method may reach beyond: those of a model whose every layer has one."""
    kinds = layer_kinds(model.config)
    return {layer: window for layer, window in windows(model).items() if kinds[layer] == FULL}


def _window(module: Any, config: Any, layer: int) -> int | None:
    """A layer's sliding window in tokens; None or 0 where it has none."""
    layer_types = getattr(config, "layer_types", None)
    # Some models keep the window on every module, whatever its layer's kind.
    if layer_types is not None and layer < len(layer_types) and layer_types[layer] != SLIDING:
        return None
    # On a module, None means that this layer has none; other models pass the config's along.
    window: int | None = getattr(module if hasattr(module, "sliding_window") else config, "sliding_window", None)
    return window


def span(module: Any, config: Any) -> int:
    """How many tokens the queries of a layer with a window or chunks see, their own among them; 0 where none is said."""
    text, layer = config.get_text_config(), int(module.layer_idx)
    if layer_kinds(text)[layer:][:1] == (CHUNKED,):
        return int(text.attention_chunk_size)
    return _window(module, text, layer) or 0


def logits_feature(model: PreTrainedModel) -> str:
    """What sets the logits of some layer's attention apart from plain softmax attention, in words; "" where nothing does."""
    if any(getattr(module, "sinks", None) is not None for module in self_attentions(model)):
        return "learned attention sinks"
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "soft-capped logits" if capped else ""


def kept_whole(model: PreTrainedModel) -> str:
    """What a model has that several GPUs cannot share, in words; "" where there is nothing."""
    own = [kind for kind in layer_kinds(model.config) if kind not in (FULL, SLIDING, CHUNKED)]
    return f"layers of {kind_words(own)}" if own else logits_feature(model)
