"""The table of methods: each a shallow pattern, a deep pattern, and from which layer on the deep one is used.

A further method is one pattern in ``tmbench_kernels`` and one entry here. Combined modes are entries of the table, made from
the methods that they combine, never code of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmbench.errors import UserError, shortened
from tmbench.methods.layers import layers_text, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from tmbench_kernels import Pattern

PAPERS = {
    "TriangleMix": "He et al. 2025, arXiv 2507.21526",
    "MInference": "Jiang et al. 2024, arXiv 2407.02490",
    "FlexPrefill": "Lai et al. 2025, arXiv 2502.20766",
    "XAttention": "Xu et al. 2025, arXiv 2503.16428",
    "FlashPrefill": "Fan et al. 2026, arXiv 2603.06199",
    "StreamingLLM": "Xiao et al. 2023, arXiv 2309.17453",
}

PUBLISHED_STARTING_LAYERS = {"llama-3.1-8b": 16, "llama-3-8b-instruct-262k": 16, "qwen2.5-7b": 20}
"""First triangle layer of the models that TriangleMix was published on (its speed test), by a part of their name."""


DENSE_BACKENDS = ("flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2", "sdpa")
"""What computes dense attention, in order of preference: the names of ``tmbench_kernels.Dense.backends``."""

KEY_BLOCK = 128
"""Tokens of a block of keys, of which the block-sparse patterns of ``tmbench_kernels`` choose some."""

LARGEST_COUNT = 2**31 - 1
"""More tokens than any prompt has: kernels count them in 32 bits."""

INLINE: Mapping[str, type[int] | type[float]] = {
    "gamma": float,
    "tau": float,
    "min_budget": int,
    "stride": int,
    "threshold": float,
    "first_chunk": int,
    "alpha": float,
}
"""The parameters that one method alone has, with and without a triangle: no options, they follow the method's name."""

STATIC_PATTERNS = ("dense", "triangle")
"""The patterns of ``tmbench_kernels`` that do not choose their keys by the data, by name."""


@dataclass(frozen=True)
class Settings:
    """The parameters of all methods, as given by the user. Those that a method does not read leave it unchanged.

    Raises UserError with one sentence that names the option or the parameter.
    """

    starting_layer: int | None = None
    """First deep layer, counted from 0; None takes the published one, or half the model's depth."""
    layers: str | None = None
    """The deep layers in place of all from a first one on: a list such as "5,7,10,15-35", "random:4" for four drawn by lot,
    a file of probe results, or "auto" for the newest probe of the model in ``results``."""
    results: Path = Path("results")
    """Where ``layers`` "auto" looks. It decides nothing else."""
    n_init: int = 8
    n_local: int = 512
    last_n: int = 128
    patterns: Path | None = None
    """A JSON file in MInference's format with each head's kind and budget; None means (1000, 6096) for every head."""
    dense_backend: str | None = None
    """The one backend to compute dense attention with; None takes the fastest that is installed and serves the model."""
    gamma: float = 0.95
    """FlexPrefill: the share of attention that the columns, and the diagonals, of a head are to hold."""
    tau: float = 0.1
    """FlexPrefill: up to which distance between two estimates a head's queries choose blocks for themselves."""
    min_budget: int = 1024
    """FlexPrefill: the fewest tokens of columns, and of diagonals."""
    stride: int = 16
    """XAttention: tokens between the antidiagonals that estimate a block."""
    threshold: float = 0.9
    """XAttention: the share of its estimated attention that a query block's key blocks are to hold."""
    first_chunk: int = 0
    """XAttention: first tokens whose queries follow the published code's rule for its first chunk; 0 for none."""
    alpha: float = 0.1
    """FlashPrefill: how much of the heaviest key block's weight a block must have."""

    def __post_init__(self) -> None:
        if self.starting_layer is not None and self.layers is not None:
            raise UserError(
                f"--starting-layer {self.starting_layer} and --layers {self.layers} both say where triangle attention is: "
                "give one of them"
            )
        if self.layers is not None and self.layers.strip().isdecimal():
            raise UserError(
                f"--layers {self.layers} may mean one layer or all from there on: write "
                f"{self.layers}-{self.layers} for one, or --starting-layer {self.layers}"
            )
        for option in ("n_init", "n_local", "last_n"):
            if getattr(self, option) < 0:
                raise UserError(f"--{option.replace('_', '-')} must be 0 or more, not {getattr(self, option)}")
        for count in ("n_init", "n_local", "last_n", "min_budget", "first_chunk"):
            if getattr(self, count) > LARGEST_COUNT:
                name = count if count in INLINE else f"--{count.replace('_', '-')}"
                raise UserError(f"{name} is more tokens than any prompt has: give {LARGEST_COUNT} or less")
        if self.n_init == 0 and self.n_local == 0:
            raise UserError("--n-init and --n-local are both 0, so most queries would see no key: raise one of them")
        if self.dense_backend is not None and self.dense_backend not in DENSE_BACKENDS:
            raise UserError(f"--dense-backend {self.dense_backend} is unknown: choose from {', '.join(DENSE_BACKENDS)}")
        for share in ("gamma", "threshold"):
            if not 0 < getattr(self, share) <= 1:
                raise UserError(f"{share} must be above 0 and at most 1, not {getattr(self, share)}")
        for part in ("tau", "alpha"):
            if not 0 <= getattr(self, part) <= 1:
                raise UserError(f"{part} must be between 0 and 1, not {getattr(self, part)}")
        if self.min_budget < 1:
            raise UserError(f"min_budget must be 1 or more, not {self.min_budget}")
        if self.stride < 1 or KEY_BLOCK % self.stride:
            raise UserError(f"stride must divide {KEY_BLOCK}, so that blocks hold whole strides, but it is {self.stride}")
        if self.first_chunk < 0 or self.first_chunk % KEY_BLOCK:
            raise UserError(f"first_chunk must be 0 or a multiple of {KEY_BLOCK}, not {self.first_chunk}")


@dataclass(frozen=True)
class ModelShape:
    """What a plan must know of a model."""

    name: str
    layers: int
    heads: int
    model_hash: str = ""
    """What the model was made from, where that is known: a probe of other contents proposes nothing for it."""

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
    parameters: Mapping[str, int | float | str] = field(default_factory=dict)
    """The parameters that this method reads, with the values used; the same names as the options.

    One that was left to tmbench, as the backend of dense attention may be, is not among them.
    """
    starting_layer_source: str = ""
    """Where the deep layers come from: "given", "published", "half the depth", "random", "probe of ...", or "" for methods
    without."""

    def backends(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        """What will run the patterns on such tensors, as rows name it: pattern:backend, joined by "+".

        Raises ValueError with the reasons where a pattern has no backend for them.
        """
        return backends_name(f"{pattern.name}:{pattern.backend(q, k, v).name}" for pattern in set(self.patterns))

    def row_fields(self) -> dict[str, int | float | str]:
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
    """The fields of Settings that change this method; ``starting_layer`` and ``layers`` are implied by a deep pattern."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """All fields of Settings that change this method."""
        return (("starting_layer", "layers") if self.deep else ()) + self.reads

    @property
    def inline(self) -> tuple[str, ...]:
        """Those of its parameters that follow its name."""
        return tuple(name for name in self.parameters if name in INLINE)

    def plan(self, shape: ModelShape, settings: Settings) -> Plan:
        """One pattern per layer of a model of this shape; raises UserError for settings that do not fit it."""
        patterns = list(self.shallow(settings, shape))
        parameters: dict[str, int | float | str] = {}
        source = ""
        if self.deep is not None:
            layers, source = deep_layers(shape, settings)
            deep = self.deep(settings, shape)
            for layer in layers:
                patterns[layer] = deep[layer]
            start = shape.layers - len(layers)
            # The same layers are the same measurement, however they were given.
            if layers == tuple(range(start, shape.layers)):
                parameters["starting_layer"] = start
            else:
                parameters["layers"] = layers_text(layers)
        for name in self.reads:
            value = budgets_name(settings.patterns) if name == "patterns" else getattr(settings, name)
            if value is not None:
                parameters[name] = value
        return Plan(self.name, tuple(patterns), parameters, source)


def backends_name(backends: Iterable[str]) -> str:
    """How results name what ran: the "pattern:backend" texts, joined by "+"."""
    return "+".join(sorted(set(filter(None, backends))))


def deep_layers(shape: ModelShape, settings: Settings) -> tuple[tuple[int, ...], str]:
    """The layers of a model of this shape that have the deep pattern, and where that choice comes from."""
    if settings.layers is not None:
        return resolve(settings.layers, shape.name, shape.layers, settings.results, shape.model_hash)
    start, source = starting_layer(shape, settings)
    return tuple(range(start, shape.layers)), source


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


def _minference(settings: Settings, shape: ModelShape) -> Sequence[Pattern]:
    from tmbench_kernels import VerticalSlash, load_patterns

    if settings.patterns is None:
        return [VerticalSlash()] * shape.layers
    try:
        return load_patterns(settings.patterns, layers=shape.layers, heads=shape.heads)
    except (OSError, ValueError) as error:
        raise UserError(f"--patterns: {error}") from error


def _flex_prefill(settings: Settings, shape: ModelShape) -> Sequence[Pattern]:
    from tmbench_kernels import FlexPrefill

    return [FlexPrefill(settings.gamma, settings.tau, settings.min_budget)] * shape.layers


def _xattention(settings: Settings, shape: ModelShape) -> Sequence[Pattern]:
    from tmbench_kernels import XAttention

    return [XAttention(settings.stride, settings.threshold, settings.first_chunk)] * shape.layers


def _flash_prefill(settings: Settings, shape: ModelShape) -> Sequence[Pattern]:
    from tmbench_kernels import FlashPrefill

    return [FlashPrefill(settings.alpha)] * shape.layers


WINDOW = ("n_init", "n_local", "last_n")
DENSE = ("dense_backend",)

DYNAMIC_METHODS = (
    Method(
        "minference",
        "MInference: vertical columns and slashes chosen per head, or the kind that --patterns gives it, in every layer",
        ("MInference",),
        _minference,
        reads=("patterns",),
    ),
    Method(
        "flexprefill",
        "FlexPrefill: blocks of columns and diagonals that hold a share of each head's attention, in every layer",
        ("FlexPrefill",),
        _flex_prefill,
        reads=("gamma", "tau", "min_budget"),
    ),
    Method(
        "xattention",
        "XAttention: the fewest key blocks that hold a share of the attention, by antidiagonals, in every layer",
        ("XAttention",),
        _xattention,
        reads=("stride", "threshold", "first_chunk"),
    ),
    Method(
        "flashprefill",
        "FlashPrefill: key blocks that weigh nearly as much as the heaviest one, in every layer",
        ("FlashPrefill",),
        _flash_prefill,
        reads=("alpha",),
    ),
)
"""Methods that choose keys by the data in every layer; each is in the table once more with triangle attention below it."""


def _above_triangle(method: Method) -> Method:
    """The method in the shallow layers, triangle attention in the deep ones."""
    return Method(
        f"tri_mix_{method.name}",
        f"both: {method.summary.partition(':')[0]} in the shallow layers, triangle attention in the deep ones",
        ("TriangleMix", *method.papers),
        method.shallow,
        _triangle,
        (*WINDOW, *method.reads),
    )


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
        *(each for method in DYNAMIC_METHODS for each in (method, _above_triangle(method))),
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
        raise UserError(f"--method {shortened(name)} is unknown: choose from {', '.join(METHODS)}") from None


def parse_method(text: str) -> tuple[Method, dict[str, int | float]]:
    """A method and the parameters that follow its name: "xattention:stride=8,threshold=0.8".

    Raises UserError for an unknown method, for a parameter that it does not read behind its name, and for what is no number.
    """
    name, _, given = text.partition(":")
    method = get_method(name)
    values: dict[str, int | float] = {}
    for part in filter(None, given.split(",")):
        parameter, _, value = (piece.strip() for piece in part.partition("="))
        parameter = parameter.replace("-", "_")
        if parameter not in method.inline:
            known = f"what may follow it is {', '.join(method.inline)}" if method.inline else "nothing may follow it"
            raise UserError(f"--method {shortened(text)}: {method.name} has no parameter {shortened(parameter)!r}, {known}")
        kind = INLINE[parameter]
        try:
            values[parameter] = kind(value)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise UserError(f"--method {shortened(text)}: {parameter} must be {wanted}, not {shortened(value)!r}") from None
    return method, values
