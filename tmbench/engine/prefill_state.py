"""What a prefill of tmbench's own and the attention inside of it tell each other: kept here, and nowhere else.

Attention calls; it keeps nothing. What traced code writes to is an object of its own, ``LayerPass``: torch keeps all that
such an object holds, so a cache must not hang on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from tmbench.engine.chunks import Chunk
from tmbench.engine.kv_cache import CacheSlot
from tmbench.engine.token_split import OwnHeads, TokenSplit, all_heads


@dataclass
class LayerPass:
    """One decoder layer while it reads a prompt. The prefill begins and ends it, attention reports to it."""

    begun: bool = False
    """Whether a layer is at work that ``begin`` began, and ``end`` will end."""
    last_row: bool = False
    """Whether of this layer only the last query's output is wanted."""
    narrow_queries: bool = False
    """Whether it needs that query alone from the start, its pattern choosing nothing by the others."""
    attended: bool = False
    """Whether attention is done in a layer of which only the last row is wanted."""
    kept: tuple[Tensor, Tensor] | None = None
    """Keys and values that a layer has given to attention, or to ``update``, on their way into the cache.

    Where one projection makes queries as well, all of its product stays until the layer ends and ``fill`` copies its part.
    """
    latents: bool = False
    """Whether that is handed to ``update``, and attention is given what the layer makes of it."""
    before: tuple[Tensor, Tensor] | None = None
    """What was handed so of the chunks before; None where there are none."""

    def begin(
        self, *, last_row: bool, dynamic: bool, latents: bool = False, before: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Begin a layer, of which the last row alone may be wanted; a dynamic pattern needs several of its queries."""
        self.begun = True
        self.latents, self.before = latents, before
        self.last_row = last_row
        self.narrow_queries = last_row and not dynamic

    def end(self) -> tuple[Tensor, Tensor] | None:
        """End the layer, however it ended; returns what is to go into the cache."""
        kept = self.kept
        self.begun = self.last_row = self.narrow_queries = self.attended = self.latents = False
        self.kept = self.before = None
        return kept

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What a layer caches that attention is not given, as transformers' caches take it: see ``has_latents``.

        Returns that of all tokens so far.
        """
        self.kept = key, value
        if self.before is None:
            return key, value
        return torch.cat([self.before[0], key], dim=2), torch.cat([self.before[1], value], dim=2)

    def is_narrow(self, *, queries: bool) -> bool:
        """Whether a module that runs now works on the last position alone; ``queries`` says that it yields queries."""
        return self.attended or (queries and self.narrow_queries)

    def yielded(self, out: Tensor, queries: int) -> Tensor:
        """What attention hands to its module: the last row stands for all, ``[batch, queries, heads, dim]``."""
        if not self.last_row:
            return out
        self.attended = True
        return out.expand(-1, queries, -1, -1)


@dataclass
class PrefillState:
    """The state of a session's prefills."""

    layer: LayerPass = field(default_factory=LayerPass)
    """The layer at work."""
    cache: Cache | CacheSlot | None = None
    """Where keys and values go; None outside of such a prefill."""
    split: TokenSplit | None = None
    """How the prompt is split over ranks; None where this process reads all of it."""
    chunk: Chunk | None = None
    """Which part of the prompt is being read; None for all of it."""

    @contextmanager
    def filling(
        self, cache: Cache | CacheSlot, split: TokenSplit | None = None, chunk: Chunk | None = None
    ) -> Iterator[None]:
        """Inside, the keys and values that attention is given go into ``cache``: of a chunk, behind those before it."""
        self.cache, self.split, self.chunk = cache, split, chunk
        try:
            yield
        finally:
            self.cache = self.split = self.chunk = None

    @property
    def active(self) -> bool:
        """Whether a prompt is being read so, and not decoded after."""
        return self.cache is not None

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put a layer's keys and values into the cache, where there is one to be filled and the layer keeps no latents.

        Of a prompt that is split or comes in chunks it gets those that attention works on: see ``exchanged``.
        """
        if self.cache is not None and self.split is None and self.chunk is None and not self.layer.latents:
            fill(self.cache, layer, key, value)

    def latents_before(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """What the chunks before this one have left of a layer's latents; None where there are none."""
        if self.chunk is None or self.chunk.start == 0:
            return None
        assert isinstance(self.cache, Cache), "a slot holds keys and values"
        held: Any = self.cache.layers[layer]
        return held.keys, held.values

    def keep_latents(self, layer: int, latents: tuple[Tensor, Tensor]) -> None:
        """Put a layer's latents into transformers' cache: of a chunk, behind those before it."""
        assert self.cache is not None
        if self.chunk is None:
            fill(self.cache, layer, *latents)
        else:
            self.cache.update(*latents, layer)

    def exchanged(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention works on, of what the model hands it: where a prompt is split, all tokens of this rank's heads.

        Where it comes in chunks, the keys and values of those before too; a layer has made them of latents already.
        """
        if self.chunk is not None and self.layer.latents:
            return q, k, v
        if self.chunk is not None:
            assert self.cache is not None
            return q, *self.cache.update(k, v, layer)
        if self.split is None:
            return q, k, v
        assert self.cache is not None
        q, k, v = (self.split.to_heads(x) for x in (q, k, v))
        fill(self.cache, layer, k, v)
        return q, k, v

    def returned(self, out: Tensor) -> Tensor:
        """The way back of what attention yields, ``[batch, length, heads, dim]``, or its last row alone."""
        if self.split is None:
            return out
        return all_heads(out) if self.layer.last_row else self.split.to_tokens(out)


def fill(cache: Cache | CacheSlot, layer: int, key: Tensor, value: Tensor) -> None:
    """Leave a prompt's keys and values ``[batch, kv_heads, length, dim]`` in a layer of an empty cache.

    They are kept as they are, unless they are parts of something larger, which would stay in memory with them.
    """
    kept: Any = cache.layers[layer] if layer < len(cache.layers) else None
    if type(kept) in (DynamicLayer, OwnHeads) and kept.get_seq_length() == 0:
        # Such a layer appends by concatenation, which copies keys at an eighth of the speed of a plain copy.
        cache.update(key[:, :, :0], value[:, :, :0], layer)
        kept.keys, kept.values = _alone(key), _alone(value)
    else:
        cache.update(key, value, layer)
        release(cache, layer)


def release(cache: Cache | CacheSlot, layer: int) -> None:
    """Let go of the keys that a layer's window has left behind: the last ones would hold on to those of the whole prompt."""
    # Not every cache has a place for a layer that holds no keys.
    if isinstance(cache, CacheSlot) or layer >= len(cache.layers):
        return
    for name in ("keys", "values"):
        if isinstance(held := getattr(cache.layers[layer], name, None), Tensor):
            setattr(cache.layers[layer], name, _alone(held))


def _alone(tensor: Tensor) -> Tensor:
    """The tensor itself where it is all of its storage, else a copy."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
