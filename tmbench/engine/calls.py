"""How a model is called, whatever the release of transformers: names that changed are known here alone."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from tmbench.engine.left_padding import positions
from tmbench.models.rotary import depends_on_length


def keep_last(model: PreTrainedModel) -> dict[str, int]:
    """What to pass so that logits are made of the last position alone: nothing where a model makes them of all."""
    return {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}


def keep_by_place(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before a model's ``forward`` that says at which places logits are wanted, where the call says at how many.

    Given a number, transformers runs layers that share keys at those positions alone, with a mask that it cuts to them: a
    method would see no prompt there.
    """
    count = kwargs.get("logits_to_keep", 0)
    return args, kwargs | ({"logits_to_keep": slice(-count or None, None)} if isinstance(count, int) else {})


def cache_name(model: PreTrainedModel) -> str:
    """The parameter that takes the key-value cache: transformers 5.24 renamed it, and warns of the older name."""
    return "cache" if "cache" in _parameters(model) else "past_key_values"


def empty_cache(model: PreTrainedModel) -> Cache:
    """A cache that holds nothing, as the model makes one for itself: MiniMax has a class of its own, without sizes."""
    own = getattr(sys.modules[type(model).__module__], "MiniMaxCache", None)
    return DynamicCache(config=model.config.get_text_config()) if own is None else own()


def cache_of(output: Any) -> Any:
    """The key-value cache that a model returned."""
    return getattr(output, "cache", None) or output.past_key_values


def padded_call(model: PreTrainedModel, mask: Tensor, count: int) -> dict[str, Tensor]:
    """What to pass for the last ``count`` tokens of left-padded texts; ``mask`` ``[batch, length]`` is of all up to them."""
    known = {"attention_mask": mask}
    if takes_positions(model):
        known["position_ids"] = positions(mask)[:, -count:]
    return known


def rope_switch(model: PreTrainedModel) -> int | None:
    """The length beyond which a model rotates all keys by other angles than up to it (LongRoPE); None for other models."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    length = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return None if length is None else int(length)


def rotation(model: PreTrainedModel, length: int) -> int:
    """What a text's length decides of its rotary embeddings: texts for which it is the same number are rotated alike."""
    switch = rope_switch(model)
    if switch is not None:
        return int(length > switch)
    if depends_on_length(model):
        return max(length, int(model.config.get_text_config().max_position_embeddings))
    return 0


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a call may say where in its text each token stands."""
    return "position_ids" in _parameters(model)


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
