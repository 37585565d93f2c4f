"""Which models' prompts are split over the ranks (context parallelism), each rank holding the model whole.

How a prompt is then read is in ``tmbench.engine.token_split``.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel

from tmbench.errors import UserError
from tmbench.models import parallel
from tmbench.models.attention_modules import kept_whole, native_attentions, windows
from tmbench.models.geometry import Geometry, has_latents
from tmbench.models.rotary import depends_on_length

_SPLIT: WeakSet[nn.Module] = WeakSet()


def check_split(name: str, model: Any) -> None:
    """Raise UserError for a model whose prompts the ranks cannot split; its geometry suffices."""
    ranks, shape, remedy = parallel.size(), Geometry.of(model), "leave --context-parallel out"
    if ranks == 1:
        raise UserError(
            "--context-parallel splits prompts over several GPUs: start the command by torchrun --nproc-per-node, or leave "
            "the option out"
        )
    if shape.kv_heads % ranks or shape.heads % ranks:
        raise UserError(
            f"--model {name} has {shape.heads} query heads and {shape.kv_heads} key heads, which {ranks} GPUs cannot share "
            "evenly in attention: give --nproc-per-node a number that divides both"
        )
    if windows(model):
        raise UserError(f"--model {name} has layers with a sliding window, whose prompts are not split: {remedy}")
    if native_attentions(model):
        raise UserError(f"--model {name} has layers of chunked attention, whose prompts are not split: {remedy}")
    if feature := kept_whole(model):
        raise UserError(f"--model {name} has {feature}, which prompts that are split do not go with: {remedy}")
    if has_latents(model.config):
        raise UserError(
            f"--model {name} caches the latents that its keys and values are made from, which no rank has a part of, so its "
            f"prompts are not split: {remedy}"
        )
    if depends_on_length(model):
        raise UserError(
            f"--model {name} has rotary embeddings that depend on a prompt's length, which no rank has whole: {remedy}"
        )


def split_prompts(model: PreTrainedModel) -> None:
    """Have sessions of this model split its prompts over the ranks from now on."""
    _SPLIT.add(model)


def splits_prompts(model: PreTrainedModel) -> bool:
    """Whether the prompts of this model are split over the ranks."""
    return model in _SPLIT
