"""One prompt over several ranks by Ulysses: Jacobs et al. 2023, arXiv 2309.14509, section 3.

A rank has a stretch of the prompt's tokens through embeddings, norms, projections and MLPs, and a part of the heads over all
tokens in attention: one all-to-all before it, and one behind. A pattern therefore meets whole prompts, as on one GPU. Keys
and values stay split by heads, and decoding goes on so: every rank reads the new token, attends with its own heads, and
gathers what the others make of theirs.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Cache, DynamicLayer

from tmbench.engine.first_token import synchronize
from tmbench.models import parallel
from tmbench.models.geometry import Geometry


class TokenSplit:
    """One prompt's tokens over the ranks, in order, and what passes between these."""

    def __init__(self, length: int) -> None:
        """Split ``length`` tokens evenly: some ranks have one more. Raises ValueError for fewer tokens than ranks."""
        self.ranks = parallel.size()
        if length < self.ranks:
            raise ValueError(f"{length} tokens cannot be split over {self.ranks} GPUs")
        each, more = divmod(length, self.ranks)
        self.sizes = [each + (rank < more) for rank in range(self.ranks)]
        self.length = length
        self.own = self.sizes[parallel.rank()]
        self._start = sum(self.sizes[: parallel.rank()])
        self._marks: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def call(self, ids: Tensor) -> dict[str, Tensor]:
        """What the model is called with on this rank for ids ``[batch, length]``."""
        stretch = slice(self._start, self._start + self.own)
        return {"input_ids": ids[:, stretch], "position_ids": torch.arange(self.length, device=ids.device)[None, stretch]}

    def to_heads(self, x: Tensor) -> Tensor:
        """All tokens of this rank's heads, of the own tokens of all: ``[batch, heads, own, dim]`` to
        ``[batch, heads / ranks, length, dim]``."""
        batch, heads, _, dim = x.shape
        part = heads // self.ranks
        # Tokens come first, so that what arrives is in their order without a copy.
        sent = x.reshape(batch, self.ranks, part, self.own, dim).permute(1, 3, 0, 2, 4).reshape(-1, batch, part, dim)
        found = x.new_empty(self.length, batch, part, dim)
        # Of one token it may still be a part of what the layer has projected.
        self._exchange(found, sent.contiguous(), self.sizes, [self.own] * self.ranks)
        return found.permute(1, 2, 0, 3)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back: ``[batch, length, heads / ranks, dim]`` to ``[batch, own, heads, dim]``, contiguous."""
        batch, _, part, dim = x.shape
        found = x.new_empty(self.ranks * self.own, batch, part, dim)
        self._exchange(found, x.transpose(0, 1).contiguous(), [self.own] * self.ranks, self.sizes)
        by_rank = found.view(self.ranks, self.own, batch, part, dim)
        return by_rank.permute(2, 1, 0, 3, 4).reshape(batch, self.own, self.ranks * part, dim)

    def from_last(self, logits: Tensor) -> Tensor:
        """The logits of the prompt's last token, which the last rank has."""
        found = logits.contiguous()
        dist.broadcast(found, self.ranks - 1)
        return found

    @property
    def seconds(self) -> float:
        """How long attention has waited for tensors of other ranks, their delays included: on a GPU by its own clock."""
        if self._marks:
            synchronize(torch.device("cuda"))
            self._seconds += sum(1e-3 * start.elapsed_time(end) for start, end in self._marks)
            self._marks.clear()
        return self._seconds

    def _exchange(self, found: Tensor, sent: Tensor, found_sizes: list[int], sent_sizes: list[int]) -> None:
        if sent.device.type == "cuda":
            event: Any = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            dist.all_to_all_single(found, sent, found_sizes, sent_sizes)
            end.record()
            self._marks.append((start, end))
            return
        begin = time.perf_counter()
        dist.all_to_all_single(found, sent, found_sizes, sent_sizes)
        self._seconds += time.perf_counter() - begin


class OwnHeads(DynamicLayer):  # type: ignore[misc]
    """One layer's cache with this rank's part of the key heads: of a new token's it keeps those."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads or all, tokens, dim]``; returns this rank's of all tokens."""
        own = own_heads(key_states, self.heads), own_heads(value_states, self.heads)
        found: tuple[Tensor, Tensor] = super().update(*own, *args, **kwargs)
        return found


def cache_of_own_heads(model: Any) -> Cache:
    """An empty cache for this rank's heads."""
    shape = Geometry.of(model)
    return Cache(layers=[OwnHeads(shape.kv_heads // parallel.size()) for _ in range(shape.layers)])


def own_heads(x: Tensor, heads: int) -> Tensor:
    """This rank's heads of ``[batch, heads of all or its own, tokens, dim]``."""
    return x if x.shape[1] == heads else x.narrow(1, parallel.rank() * heads, heads)


def all_heads(x: Tensor) -> Tensor:
    """One token's heads of all ranks: ``[batch, 1, heads / ranks, dim]`` to ``[batch, 1, heads, dim]``."""
    ranks, (batch, _, part, dim) = parallel.size(), x.shape
    found = x.new_empty(ranks * batch, 1, part, dim)
    dist.all_gather_into_tensor(found, x.contiguous())
    return found.view(ranks, batch, 1, part, dim).permute(1, 2, 0, 3, 4).reshape(batch, 1, ranks * part, dim)
