"""The kinds of layer that a model has: those that a method acts on, and those that stay the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

FULL = "full_attention"
"""Attention over all tokens so far: what a method acts on."""
SLIDING = "sliding_attention"
CHUNKED = "chunked_attention"
LINEAR = "linear_attention"
CONVOLUTION = "conv"
KINDS = {
    FULL: "full attention",
    SLIDING: "sliding-window attention",
    CHUNKED: "chunked attention",
    LINEAR: "linear or recurrent attention",
    CONVOLUTION: "a short convolution",
    "moe": "experts alone",
    "mlp": "an MLP alone",
}
"""The kinds that are served, by the names that transformers has for them, in words. All but the first are native ones."""
FULL_TOO = {"attention": FULL, "mamba": LINEAR, "hybrid": FULL}
"""Other names: older ones, and that of layers with full attention and a recurrent state side by side."""


def layer_kinds(config: Any) -> tuple[str, ...]:
    """The kind of each layer, by the names that transformers has for them.

    ``config`` is a model's. Layers are all of full attention where the config names no kinds, and also where each of them
    has a sliding window: methods then act on prompts that are no longer than the window, which makes no difference to them.
    """
    text = config.get_text_config()
    count = int(text.num_hidden_layers)
    named: Sequence[str] | None = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    kinds = tuple(FULL_TOO.get(kind, kind) for kind in (named or ())[:count])
    return (FULL,) * count if len(kinds) < count or set(kinds) == {SLIDING} else kinds


def kind_words(kinds: Iterable[str]) -> str:
    """Kinds in words, each once, in their order."""
    return ", ".join(dict.fromkeys(KINDS.get(kind, kind) for kind in kinds))
