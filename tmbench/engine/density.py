"""Density: the share of the causal (query, key) pairs that a prefill's attention really computed, counted beside it.

A pair of which only the first of the two products is computed counts half: see ``tmbench_kernels.skip_softmax``.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace

from torch import Tensor

from tmbench.engine.first_token import synchronize
from tmbench.models import parallel
from tmbench_kernels import Pattern


def causal_pairs(length: int, before: int = 0) -> int:
    """(query, key) pairs of one head under full causal attention, of queries with so many keys ``before`` them all."""
    return length * (length + 1) // 2 + length * before


@dataclass
class PairCounter:
    """An observer for ``Applied``: counts the pairs that each layer's pattern keeps on the tensors that it is given.

    A static pattern's pairs follow from the shapes. A dynamic one selects once more for it, which takes no more memory than
    its attention does but costs time: put it beside a pass that is not timed, or take off ``seconds``.
    """

    pairs: Counter[int] = field(default_factory=Counter)
    """By layer, summed over batch and heads, those of all ranks."""
    causal: int = 0
    """What dense attention would have computed in the same calls."""
    tiles: int = 0
    """Of patterns that skip tiles while they compute: how many tiles there were, those of all ranks."""
    skipped: int = 0
    """How many of them were skipped."""
    seconds: float = 0.0
    """How long counting took."""

    def __call__(self, layer: int, pattern: Pattern, q: Tensor, k: Tensor, scale: float | None) -> None:
        synchronize(q.device)
        start = time.perf_counter()
        computed, heads = pattern.computed(q, k, scale=scale), q.shape[1] * parallel.size()
        self.pairs[layer] += parallel.summed(computed.pairs)
        if computed.tiles:
            self.tiles += parallel.summed(computed.tiles)
            self.skipped += parallel.summed(computed.skipped)
        self.causal += q.shape[0] * heads * causal_pairs(q.shape[2], k.shape[2] - q.shape[2])
        self.seconds += time.perf_counter() - start

    def copy(self) -> PairCounter:
        """One that goes on from here, by itself and from no time."""
        return replace(self, pairs=Counter(self.pairs), seconds=0.0)

    @property
    def density(self) -> float | None:
        """The share of the causal pairs, over all layers and heads: 1 for dense, None before any prefill."""
        return self.pairs.total() / self.causal if self.causal else None

    @property
    def skipped_share(self) -> float | None:
        """The share of tiles that were skipped, over all layers and heads that skip some; None where none does."""
        return self.skipped / self.tiles if self.tiles else None
