"""What a method can save at most on a model, by the roofline and before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tmbench.engine import roofline
from tmbench.engine.density import causal_pairs
from tmbench.measure.ttft import expected_flop
from tmbench.methods.layer_kinds import FULL, kind_words, layer_kinds
from tmbench.methods.table import METHODS
from tmbench.models.loading import LoadedModel


@dataclass(frozen=True)
class KindWork:
    """The operations of all layers of one kind, for the first token after one prompt."""

    kind: str
    """In words."""
    layers: tuple[int, ...]
    linear: float
    """Of projections, MLPs and active experts."""
    attention: float


@dataclass(frozen=True)
class Savings:
    """The roofline of one length: under dense attention, and what is left of it."""

    length: int
    kinds: tuple[KindWork, ...]
    outside: float
    """Operations outside of the layers."""
    default: float
    """All operations under ``tri_mix`` in its own layers for this model."""

    @property
    def dense(self) -> float:
        """All operations under dense attention."""
        return self.outside + sum(work.linear + work.attention for work in self.kinds)

    @property
    def most(self) -> float:
        """The share of the operations that would be saved if attention in all full layers cost nothing."""
        return sum(work.attention for work in self.kinds if work.kind == kind_words([FULL])) / self.dense

    @property
    def saved(self) -> float:
        """The share that ``tri_mix`` saves."""
        return 1 - self.default / self.dense


def savings(loaded: LoadedModel, lengths: Sequence[int]) -> list[Savings]:
    """What the roofline says at each of these lengths."""
    model, kinds = loaded.model, layer_kinds(loaded.model.config)
    plan = METHODS["tri_mix"].plan(loaded.shape)
    found = []
    for length in lengths:
        linear = roofline.linear_flop_by_layer(model, length)
        attention = roofline.native_attention_flop_by_layer(model, length)
        geometry = loaded.geometry
        for layer in loaded.shape.full:
            rows = length if layer == len(kinds) - 1 else causal_pairs(length)
            attention[layer] = roofline.attention_flop(geometry.heads * rows, geometry)
        works = []
        for kind in dict.fromkeys(kinds):
            layers = tuple(layer for layer, own in enumerate(kinds) if own == kind)
            sums = [sum(work.get(layer, 0.0) for layer in layers) for work in (linear, attention)]
            works.append(KindWork(kind_words([kind]), layers, *sums))
        found.append(Savings(length, tuple(works), linear.get(None, 0.0), expected_flop(loaded, plan, length)))
    return found
