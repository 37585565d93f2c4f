"""A prompt that is fed in chunks, as serving engines feed it: each is read by the method over the keys of all before it.

What a pattern makes of a chunk is said in ``tmbench_kernels.pattern``. Which queries count as the prompt's *last* depends on
whether the engine tells attention how long the prompt is. Where it does (``known``), these are the prompt's own, as in one
piece. Where it does not, every chunk is treated as if the prompt ended with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, PreTrainedModel

from tmbench.methods.layer_kinds import CHUNKED, layer_kinds
from tmbench.models.rotary import depends_on_length
from tmbench_kernels import Dense, Pattern
from tmbench_kernels.parameters import LARGEST_COUNT


@dataclass(frozen=True)
class Chunks:
    """How prompts are fed."""

    size: int
    """Tokens of a chunk; of the last one at most so many."""
    known: bool = True
    """Whether attention is told how long the prompt is."""

    @property
    def columns(self) -> dict[str, Any]:
        """What rows say of it."""
        return {"chunk": self.size, "prompt_length": "known" if self.known else "unknown"}

    def of(self, length: int) -> Iterator[Chunk]:
        """The chunks of a prompt of so many tokens, in order."""
        for start in range(0, length, self.size):
            yield Chunk(start, min(start + self.size, length), length if self.known else None)


def why_whole_by_config(model: PreTrainedModel) -> str:
    """Why prompts are read in one piece, as far as a config says, in words that follow a comma; empty where it does not."""
    if depends_on_length(model):
        return "as its rotary embeddings depend on a prompt's length"
    if CHUNKED in layer_kinds(model.config):
        return "as it has layers of chunked attention, whose own chunks lie elsewhere"
    return ""


WHOLE = Chunks(LARGEST_COUNT)
"""One chunk, whatever the length: a prompt in one piece, over whose keys something else is to be read."""


@dataclass(frozen=True)
class Chunk:
    """A stretch of a prompt's tokens, from ``start`` on and before ``end``."""

    start: int
    end: int
    length: int | None = None
    """Of the whole prompt; None where it is not known."""
    dense: bool = False
    """Whether its queries see all keys, whatever the method, as a question does that is asked later."""
    padding: tuple[int, ...] = ()
    """How many of each row's tokens here stand in front of its text; none where no row has any."""

    def call(self, ids: Tensor) -> dict[str, Tensor]:
        """What the model is called with, given the chunk's own ids ``[batch, end - start]``."""
        places = torch.arange(self.start, self.end, device=ids.device).expand(ids.shape[0], -1)
        if not self.padding:
            return {"input_ids": ids, "position_ids": places}
        places = (places - torch.tensor(self.padding, device=ids.device)[:, None]).clamp(min=self.start)
        # Without a mask transformers takes places that begin anew for several texts in one row.
        return {"input_ids": ids, "position_ids": places, "attention_mask": torch.ones_like(ids)}

    def pattern(self, of: Pattern) -> Pattern:
        """What a pattern is for these queries."""
        if self.dense:
            return Dense()
        return of if self.length is None else of.of_chunk(self.end, self.length)


class Growing(DynamicLayer):  # type: ignore[misc]
    """One layer's cache with room for a whole prompt: what comes is copied to its place, and what was there stays.

    transformers' own copies all keys anew for every chunk. Behind the prompt it grows as that does.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, tokens, dim]``; returns those of all tokens so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self.room:
            # Nor is there room again where tokens are let go of: what stays is elsewhere.
            self._held, self.room = None, 0
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        if self._held is None:
            self.lazy_initialization(key_states, value_states)
            keys, values = (x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states))
            self._held = keys, values
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, start:end] = new
        self.keys, self.values = (held[:, :, :end] for held in self._held)
        return self.keys, self.values


def with_room(cache: Cache, length: int) -> Cache:
    """An empty cache whose layers that keep every token have room for a prompt of so many."""
    cache.layers = [Growing(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
