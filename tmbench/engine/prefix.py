"""What several prompts begin with, read once: its keys and values are kept, and each prompt's own tokens are read over them.

A method reads the prefix as a prompt of its own, as an engine does that caches it: nobody knows yet what will follow. What
follows is read as the last chunk of its prompt, so the method's rule for the last rows of a text is kept in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ReferenceType

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, PreTrainedModel

from tmbench.engine.calls import empty_cache, takes_positions
from tmbench.engine.chunks import Growing, why_whole_by_config
from tmbench.engine.kv_cache import CacheSlot
from tmbench.errors import UnsupportedModelError, UserError
from tmbench.methods.plan import Plan
from tmbench.models.context import splits_prompts
from tmbench.models.geometry import has_latents


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that were read, and what every layer keeps of them; several batches may follow it."""

    ids: Tensor
    """``[1, length]``."""
    model: ReferenceType[PreTrainedModel]
    """What read them, which a prefix does not keep alive."""
    plan: Plan
    """The method that read them."""
    layers: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each layer, ``[1, kv_heads, length, dim]``."""

    @property
    def length(self) -> int:
        """Tokens."""
        return self.ids.shape[1]

    def fill(self, cache: Cache | CacheSlot, rows: int) -> None:
        """Put it into an empty cache, the same for every row."""
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)

    def before(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Whole prompts with their mask: ``[rows, length + own]``, of what follows the prefix in each row."""
        whole = torch.cat([self.ids.expand(ids.shape[0], -1), ids], dim=1)
        front = self.ids.new_ones(ids.shape[0], self.length)
        return whole, None if mask is None else torch.cat([front, mask.to(front.dtype)], dim=1)

    def check(self, model: PreTrainedModel, plan: Plan) -> None:
        """Raise UserError for another model, or another method, than the one that has read it."""
        if self.model() is not model:
            raise UserError(
                f"the prefix was read by another model, whose keys say nothing to this {type(model).__name__}: have it read "
                "the prefix too"
            )
        if plan != self.plan:
            raise UserError(
                f"the prefix was read by {self.plan.method}, and {plan.method} with its own parameters is at work: have it "
                "read the prefix too"
            )


def let_go(cache: Cache, length: int) -> bool:
    """Have a cache hold its first so many tokens and no others; False where a layer keeps something else, which stays."""
    if not lets_go(cache):
        return False
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    return True


def lets_go(cache: Cache) -> bool:
    """Whether every layer of a cache keeps all of its tokens and nothing else."""
    # MiniMax's recurrent states lie beside its layers.
    return not hasattr(cache, "linear_cache") and all(type(layer) in (DynamicLayer, Growing) for layer in cache.layers)


def check_prefixes(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a model whose prefixes cannot be kept apart from what follows them."""
    obstacle = why_whole_by_config(model)
    if splits_prompts(model):
        obstacle = "as its prompts are split over several GPUs"
    elif has_latents(model.config):
        obstacle = "as it caches the latents that its keys and values are made from"
    elif not takes_positions(model):
        obstacle = "as it is not told where in a text its tokens stand"
    elif not obstacle and any(type(layer) is not DynamicLayer for layer in empty_cache(model).layers):
        obstacle = "as it has layers that keep something else than the keys of all tokens"
    if obstacle:
        raise UnsupportedModelError(
            f"no prefix of {type(model).__name__} can be kept for other prompts, {obstacle}: read whole prompts"
        )
