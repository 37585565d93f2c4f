"""Keys and values of several sequences that decode together: for each sequence a slot, which its prefill fills."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor


class KvCache:
    """A static cache: its tensors stay where they are until it is resized, as a CUDA graph needs it.

    Each layer's are ``[slots, kv_heads, capacity, dim]``, made when a first prompt's keys come.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        """Tokens that each slot has room for."""
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def bytes_per_slot(self) -> int:
        """What one more slot takes; 0 before a prompt was read."""
        return sum(tensor[0].nbytes for layer in self.layers for tensor in layer)

    def resize(self, slots: int) -> None:
        """Have so many slots, of which the first keep what they hold; never more than one layer is held twice."""
        kept = min(slots, self.slots)
        for place, layer in enumerate(self.layers):
            wider = [tensor.new_zeros(slots, *tensor.shape[1:]) for tensor in layer]
            for new, old in zip(wider, layer, strict=True):
                new[:kept] = old[:kept]
            self.layers[place] = (wider[0], wider[1])
        self.slots = slots

    def put(self, slot: int, layer: int, key: Tensor, value: Tensor, at: int = 0) -> None:
        """Copy a prompt's keys and values of one layer, ``[1, kv_heads, tokens, dim]``; layers come in their order.

        ``at`` is how many tokens are there already, of a prompt that comes in chunks. What the slot held before is gone.
        """
        if layer == len(self.layers):
            # What lies behind a sequence's keys is read and weighted with nothing, which only numbers survive.
            new = [x.new_zeros(self.slots, x.shape[1], self.capacity, x.shape[3]) for x in (key, value)]
            self.layers.append((new[0], new[1]))
        for kept, given in zip(self.layers[layer], (key, value), strict=True):
            kept[slot, :, at : at + given.shape[2]] = given[0]
            if not at:
                # A text that was here before may have left what is no number.
                kept[slot, :, given.shape[2] :] = 0


class CacheSlot:
    """One sequence's part of a cache, as a prefill fills it: transformers' ``Cache``, as far as that needs one."""

    layers: tuple[()] = ()
    """None to be filled in place."""

    def __init__(self, cache: KvCache, number: int) -> None:
        self._cache = cache
        self.number = number
        self._there: Counter[int] = Counter()
        """How many tokens each layer has."""

    def begin(self) -> None:
        """Let go of the prompt before: the next one is filled in its place."""
        self._there.clear()

    def begin_as(self, other: CacheSlot, tokens: int) -> None:
        """Hold the first so many tokens that another slot of the cache holds, or this one itself; others go behind them."""
        for number, layer in enumerate(self._cache.layers):
            self._there[number] = tokens
            for kept in layer:
                if other.number != self.number:
                    kept[self.number, :, :tokens] = kept[other.number, :, :tokens]
                kept[self.number, :, tokens:] = 0

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values behind those that it has, and return all, as transformers' caches do."""
        at = self._there[layer]
        self._cache.put(self.number, layer, key, value, at)
        self._there[layer] += key.shape[2]
        if not at:
            return key, value
        keys, values = (kept[self.number, None, :, : self._there[layer]] for kept in self._cache.layers[layer])
        return keys, values
