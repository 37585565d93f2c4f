"""The table of methods: each a shallow pattern, a deep pattern, and from which layer on the deep one is used.

A further method is one pattern in ``tmbench_kernels`` and one line in ``METHODS``. Combined modes are lines of the table,
never code of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmbench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from tmbench_kernels import Pattern

PAPERS = {
    "TriangleMix": "He et al. 2025, arXiv 2507.21526",
    "MInference": "Jiang et al. 2024, arXiv 2407.02490",
    "StreamingLLM": "Xiao et al. 2023, arXiv 2309.17453",
}

PUBLISHED_STARTING_LAYERS = {"llama-3.1-8b": 16, "llama-3-8b-instruct-262k": 16, "qwen2.5-7b": 20}
"""First triangle layer of the models that TriangleMix was published on (its speed test), by a part of their name."""


DENSE_BACKENDS = ("flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2", "sdpa")
"""What computes dense attention, in order of preference: the names of ``tmbench_kernels.Dense.backends``."""

STATIC_PATTERNS = ("dense", "triangle")
"""The patterns of ``tmbench_kernels`` that do not choose their keys by the data, by name."""


@dataclass(frozen=True)
class Settings:
    """The parameters of all methods, as given by the user. Those that a method does not read leave it unchanged."""

    starting_layer: int | None = None
    """First deep layer, counted from 0; None takes the published one, or half the model's depth."""
    n_init: int = 8
    n_local: int = 512
    last_n: int = 128
    patterns: Path | None = None
    """A JSON file in MInference's format with each head's budgets; None means (1000, 6096) for every head."""
    dense_backend: str | None = None
    """The one backend to compute dense attention with; None takes the fastest that is installed and serves the model."""

    def __post_init__(self) -> None:
        for option in ("n_init", "n_local", "last_n"):
            if getattr(self, option) < 0:
                raise UserError(f"--{option.replace('_', '-')} must be 0 or more, not {getattr(self, option)}")
        if self.n_init == 0 and self.n_local == 0:
            raise UserError("--n-init and --n-local are both 0, so most queries would see no key: raise one of them")
        if self.dense_backend is not None and self.dense_backend not in DENSE_BACKENDS:
            raise UserError(f"--dense-backend {self.dense_backend} is unknown: choose from {', '.join(DENSE_BACKENDS)}")


@dataclass(frozen=True)
class ModelShape:
    """What a plan must know of a model."""

    name: str
    layers: int
    heads: int

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """The shape of a transformers model or config."""
        config = getattr(model, "config", model)
        text = config.get_text_config()
        return cls(str(getattr(config, "_name_or_path", "")), text.num_hidden_layers, text.num_attention_heads)


PatternFor = Callable[[Settings, ModelShape], "Sequence[Pattern]"]
"""Makes one pattern per layer of a model."""


@dataclass(frozen=True)
class Plan:
    """A method on one model: one pattern per layer, and every parameter that decided it."""

    method: str
    patterns: tuple[Pattern, ...]
    parameters: Mapping[str, int | str] = field(default_factory=dict)
    """The parameters that this method reads, with the values used; the same names as the options.

    One that was left to tmbench, as the backend of dense attention may be, is not among them.
    """
    starting_layer_source: str = ""
    """Where the starting layer comes from: "given", "published", "half the depth", or "" for methods without one."""

    def backends(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """What will run the patterns on such tensors, as rows name it: pattern:backend, joined by "+".

        Raises ValueError with the reasons where a pattern has no backend for them.
        """
        return backends_name(f"{pattern.name}:{pattern.backend(q, k, v).name}" for pattern in set(self.patterns))

    def row_fields(self) -> dict[str, int | str]:
        """The columns that a result row takes from here."""
        return {"method": self.method, **self.parameters, "starting_layer_source": self.starting_layer_source}


@dataclass(frozen=True)
class Method:
    """One line of the table. ``deep`` is None for methods that treat all layers alike."""

    name: str
    summary: str
    papers: tuple[str, ...]
    shallow: PatternFor
    deep: PatternFor | None = None
    reads: tuple[str, ...] = ()
    """The fields of Settings that change this method; ``starting_layer`` is implied by a deep pattern."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """All fields of Settings that change this method."""
        return (("starting_layer",) if self.deep else ()) + self.reads

    def plan(self, shape: ModelShape, settings: Settings) -> Plan:
        """One pattern per layer of a model of this shape; raises UserError for settings that do not fit it."""
        patterns = list(self.shallow(settings, shape))
        parameters: dict[str, int | str] = {}
        source = ""
        if self.deep is not None:
            start, source = starting_layer(shape, settings)
            patterns[start:] = self.deep(settings, shape)[start:]
            parameters["starting_layer"] = start
        for name in self.reads:
            value = budgets_name(settings.patterns) if name == "patterns" else getattr(settings, name)
            if value is not None:
                parameters[name] = value
        return Plan(self.name, tuple(patterns), parameters, source)


def backends_name(backends: Iterable[str]) -> str:
    """How results name what ran: the "pattern:backend" texts, joined by "+"."""
    return "+".join(sorted(set(backends)))


def starting_layer(shape: ModelShape, settings: Settings) -> tuple[int, str]:
    """The first deep layer of a model of this shape, and where that figure comes from."""
    given = settings.starting_layer
    if given is not None:
        if not 0 <= given <= shape.layers:
            raise UserError(
                f"--starting-layer must be between 0 and {shape.layers}, the number of layers of {shape.name}, not {given}"
            )
        return given, "given"
    name = shape.name.lower()
    for known, layer in PUBLISHED_STARTING_LAYERS.items():
        if known in name and layer <= shape.layers:
            return layer, "published"
    return shape.layers // 2, "half the depth"


def budgets_name(path: Path | None) -> str:
    """How results name a budget file: its stem and a hash of its content, or "default"."""
    import hashlib

    if path is None:
        return "default"
    return f"{path.stem}:{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def _dense(settings: Settings, shape: ModelShape) -> Sequence[Pattern]:
    from tmbench_kernels import Dense

    return [Dense(settings.dense_backend or "")] * shape.layers


def _triangle(settings: Settings, shape: ModelShape) -> Sequence[Pattern]:
    from tmbench_kernels import Triangle

    return [Triangle(settings.n_init, settings.n_local, settings.last_n)] * shape.layers


def _a_shape(settings: Settings, shape: ModelShape) -> Sequence[Pattern]:
    from tmbench_kernels import Triangle

    return [Triangle.streaming(settings.n_init, settings.n_local)] * shape.layers


def _vertical_slash(settings: Settings, shape: ModelShape) -> Sequence[Pattern]:
    from tmbench_kernels import VerticalSlash, load_budgets

    if settings.patterns is None:
        return [VerticalSlash()] * shape.layers
    try:
        layers = load_budgets(settings.patterns, layers=shape.layers, heads=shape.heads)
    except (OSError, ValueError) as error:
        raise UserError(f"--patterns: {error}") from error
    return [VerticalSlash(layer) for layer in layers]


WINDOW = ("n_init", "n_local", "last_n")
DENSE = ("dense_backend",)

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("dense", "every query sees all keys before it, in every layer", (), _dense, reads=DENSE),
        Method(
            "tri_mix",
            "TriangleMix: dense shallow layers, triangle attention in the deep ones",
            ("TriangleMix",),
            _dense,
            _triangle,
            (*WINDOW, *DENSE),
        ),
        Method(
            "minference",
            "MInference: vertical columns and slashes chosen per head, in every layer",
            ("MInference",),
            _vertical_slash,
            reads=("patterns",),
        ),
        Method(
            "tri_mix_minference",
            "both: MInference in the shallow layers, triangle attention in the deep ones",
            ("TriangleMix", "MInference"),
            _vertical_slash,
            _triangle,
            (*WINDOW, "patterns"),
        ),
        Method(
            "streaming",
            "the A-shape as a baseline: first keys and a local window, in every layer",
            ("StreamingLLM",),
            _a_shape,
            reads=("n_init", "n_local"),
        ),
    )
}

DEFAULT_METHODS = ("dense", "tri_mix", "minference", "tri_mix_minference")


def get_method(name: str) -> Method:
    """The method of that name; raises UserError with the choices."""
    try:
        return METHODS[name.replace("-", "_")]
    except KeyError:
        raise UserError(f"--method {name} is unknown: choose from {', '.join(METHODS)}") from None
