"""Plans: a method on one model, one pattern for each layer, and every parameter that decided it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from tmbench.methods.layer_kinds import FULL, kind_words, layer_kinds
from tmbench.results.parameters_text import Value, parameters_text, parse_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from tmbench_kernels import Pattern

PUBLISHED_STARTING_LAYERS = {"llama-3.1-8b": 16, "llama-3-8b-instruct-262k": 16, "qwen2.5-7b": 20}
"""First triangle layer of the models that TriangleMix was published on (its speed test), by a part of their name."""
HALF = "half the depth"
"""Where the layers of a model come from that nothing is published for."""


@dataclass(frozen=True)
class ModelShape:
    """What a plan must know of a model."""

    name: str
    layers: int
    heads: int
    model_hash: str = ""
    """What the model was made from, where that is known: a probe of other contents proposes nothing for it."""
    kinds: tuple[str, ...] = ()
    """The kind of each layer, as ``tmbench.methods.layer_kinds`` names them; () where all are of full attention."""

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """The shape of a transformers model or config."""
        config = getattr(model, "config", model)
        text = config.get_text_config()
        kinds = layer_kinds(config)
        named = str(getattr(config, "_name_or_path", ""))
        return cls(named, text.num_hidden_layers, text.num_attention_heads, kinds=() if set(kinds) == {FULL} else kinds)

    @property
    def native(self) -> dict[int, str]:
        """The layers that stay the model's own, with their kind in words."""
        return {layer: kind_words([kind]) for layer, kind in enumerate(self.kinds) if kind != FULL}

    @property
    def full(self) -> tuple[int, ...]:
        """The layers that a method acts on: those of full attention."""
        native = self.native
        return tuple(layer for layer in range(self.layers) if layer not in native)


class DeepLayers(NamedTuple):
    """The layers of a model that have a method's deep pattern, and where the choice comes from."""

    layers: tuple[int, ...]
    source: str
    """In words: "given", "published", "half the depth", "random", "probe of ...", "tune of ..."."""
    probed: int | None = None
    """How many tokens the prompts had by which they were chosen, where they were."""


@dataclass(frozen=True)
class Plan:
    """A method on one model: one pattern per layer, and every parameter that decided it."""

    method: str
    patterns: tuple[Pattern | None, ...]
    """None for a layer that stays the model's own."""
    parameters: Mapping[str, Value] = field(default_factory=dict)
    """The parameters that this method reads, with the values used, and ``layers``, the deep ones, as a text.

    One that was left to tmbench, as the backend of dense attention may be, is not among them.
    """
    layers_source: str = ""
    """Where the deep layers come from, as ``DeepLayers`` has it; "" for methods without."""

    @property
    def by_layer(self) -> dict[int, Pattern]:
        """The patterns of the layers that have one, by the model's numbers of them."""
        return {layer: pattern for layer, pattern in enumerate(self.patterns) if pattern is not None}

    @property
    def settings(self) -> Mapping[str, Value]:
        """The parameters as a row of this plan has them: what is told of one counts for the other."""
        return parse_parameters(parameters_text(self.parameters))

    def backends(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """What will run the patterns on such tensors, as rows name it: pattern:backend, joined by "+".

        Raises ValueError with the reasons where a pattern has no backend for them.
        """
        return backends_name(f"{pattern.name}:{pattern.backend(q, k, v).name}" for pattern in set(self.by_layer.values()))

    def row_fields(self) -> dict[str, str]:
        """The columns that a result row takes from here."""
        about = {"parameters": parameters_text(self.parameters), "layers_source": self.layers_source}
        return {"method": self.method, **about}


def backends_name(backends: Iterable[str]) -> str:
    """How results name what ran: the "pattern:backend" texts, joined by "+"."""
    return "+".join(sorted(set(filter(None, backends))))


def default_layers(shape: ModelShape) -> DeepLayers:
    """The deep layers of a model for which none are asked for: from the published one on, or the deeper half.

    Half the depth is half of the layers of full attention.
    """
    name, full = shape.name.lower(), shape.full
    for known, layer in PUBLISHED_STARTING_LAYERS.items():
        if known in name and layer <= shape.layers:
            return DeepLayers(tuple(each for each in full if each >= layer), "published")
    return DeepLayers(full[len(full) // 2 :], HALF)
