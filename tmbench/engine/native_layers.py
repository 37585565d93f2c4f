"""Layers that stay the model's own while it reads a prompt: windows, chunks, recurrences and convolutions."""

from __future__ import annotations

from typing import Any

from tmbench.engine.decoder_layers import DecoderLayer
from tmbench.engine.forwards import forward_of
from tmbench.engine.prefill_state import PrefillState, release


def run_native(state: PrefillState, layer: DecoderLayer, *args: Any, **kwargs: Any) -> Any:
    """One layer as transformers has it, which leaves in the cache what it keeps of the prompt."""
    if state.cache is None:
        raise RuntimeError("the model is prepared for prefills: decode after the with block")
    out = forward_of(layer.module, *args, **{**kwargs, layer.cache_name: state.cache})
    release(state.cache, layer.number)
    return out
