"""The table of methods: each a shallow pattern, and for some a deep pattern that other layers have.

A further method is one pattern in ``tmbench_kernels``, whose dataclass declares its parameters, and one line here. Combined
modes are made from the methods that they combine, never code of their own. Other packages bring methods of their own: see
``register``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tmbench.errors import UserError, shortened
from tmbench.methods.layers import layers_text
from tmbench.methods.plan import DeepLayers, ModelShape, Plan, default_layers
from tmbench.results.parameters_text import Value
from tmbench_kernels.parameters import Declared, Parameter, ParameterError, declared

if TYPE_CHECKING:
    from tmbench_kernels import Pattern

TRIANGLE_MIX = "He et al. 2025, arXiv 2507.21526"
STATIC_PATTERNS = ("dense", "triangle")
"""The patterns of ``tmbench_kernels`` that do not choose their keys by the data, by name."""
NATIVE = ("window", "chunks")
"""What rows call the attention of layers that stay the model's own, where a kernel computes it."""
ATTN_NATIVE = "attn_native"
"""What rows call transformers' own attention in the place of a method: see ``tmbench.methods.attn_native``."""
LAYERS = "layers"
"""The parameter of every method with a deep pattern."""
NAME = re.compile(r"[a-z][a-z0-9_]*")
"""The names that a method may have: files are called by them."""


@dataclass(frozen=True)
class Part:
    """What computes some of a method's layers."""

    declaration: str | type[Declared]
    """A frozen dataclass of declared parameters, such as a pattern: itself, or its name in ``tmbench_kernels``, which is
    then imported when the method is first used."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values of parameters that the method leaves no choice of."""

    @cached_property
    def kind(self) -> type[Declared]:
        """The dataclass."""
        if not isinstance(self.declaration, str):
            return self.declaration
        import tmbench_kernels

        found: type[Declared] = getattr(tmbench_kernels, self.declaration)
        return found

    @property
    def declared(self) -> dict[str, Parameter]:
        """The parameters that may be given, by name."""
        return {name: about for name, about in declared(self.kind).items() if name not in self.fixed}

    def make(self, values: Mapping[str, Any]) -> Declared:
        """The dataclass with those of these values that it declares; raises ValueError for what it cannot be made of."""
        return self.kind(**self.fixed, **{name: values[name] for name in self.declared if name in values})


@dataclass(frozen=True)
class Method:
    """One line of the table. ``deep`` is None for methods that treat all layers alike."""

    name: str
    summary: str
    papers: tuple[str, ...]
    shallow: Part
    deep: Part | None = None

    @property
    def _parts(self) -> tuple[Part, ...]:
        return (self.shallow,) if self.deep is None else (self.deep, self.shallow)

    @property
    def declared(self) -> dict[str, Parameter]:
        """The parameters that this method reads, by name, those of the deep pattern first; ``layers`` is none of them."""
        return {name: about for part in self._parts for name, about in part.declared.items()}

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all that change this method, ``layers`` among them where it has a deep pattern."""
        return ((LAYERS,) if self.deep else ()) + tuple(self.declared)

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The values of what was given for this method's parameters, texts or Python values.

        Raises UserError, naming the parameter, for one that the method does not read and for a value out of range.
        """
        known = self.declared
        for name in given:
            if name not in known:
                raise UserError(f"{self.name} has no parameter {shortened(name)!r}: it has {', '.join(known) or 'none'}")
        try:
            values = {name: known[name].value(name, value) for name, value in given.items()}
            for part in self._parts:
                if useless := part.make(values).useless():
                    raise UserError(useless.format_map({name: label(name, known) for name in part.declared}))
        except ParameterError as error:
            raise UserError(f"{label(error.name, known)}{error.problem}") from error
        return values

    def named(self, values: Mapping[str, Any]) -> dict[str, Value]:
        """The parameters of these values as results hold them, defaults among them, ``layers`` not."""
        found: dict[str, Value] = {}
        for part in self._parts:
            made = part.make(values)
            found |= {name: about.named(getattr(made, name)) for name, about in part.declared.items()}
        return {name: value for name, value in found.items() if value != ""}

    def plan(self, shape: ModelShape, parameters: Mapping[str, Any] | None = None, layers: DeepLayers | None = None) -> Plan:
        """One pattern per layer of full attention of a model of this shape. No result file is read.

        Args:
            shape: the model's.
            parameters: as ``read`` takes them.
            layers: the deep layers; None takes the published ones, or the second half.

        Raises:
            UserError: parameters that the method does not read, that are out of range, or that do not fit the model.
        """
        values = self.read(parameters or {})
        patterns = self._per_layer(self.shallow, values, shape)
        named: dict[str, Value] = {}
        source = ""
        if self.deep is not None:
            chosen = layers or default_layers(shape)
            deep = self._per_layer(self.deep, values, shape)
            for layer in chosen.layers:
                patterns[layer] = deep[layer]
            # The same layers are the same measurement, however they were given.
            named[LAYERS] = layers_text(chosen.layers, shape.layers)
            source = chosen.source
        named |= self.named(values)
        full = set(shape.full)
        applied = tuple(pattern if layer in full else None for layer, pattern in enumerate(patterns))
        return Plan(self.name, applied, named, source)

    def _per_layer(self, part: Part, values: Mapping[str, Any], shape: ModelShape) -> list[Pattern]:
        try:
            return list(part.make(values).per_layer(shape.layers, shape.heads))
        except ValueError as error:
            # What does not fit a model is a value that stands for more than one number, and was given.
            names = [label(name, part.declared) for name in part.declared if name in values]
            raise UserError(f"{', '.join(names) or self.name}: {error}") from error


def label(name: str, known: Mapping[str, Parameter]) -> str:
    """A parameter as messages name it: "--n-init" where it is an option, "gamma" where it follows a method's name."""
    return f"--{name.replace('_', '-')}" if known[name].option else name


DYNAMIC_METHODS = (
    Method(
        "minference",
        "MInference: vertical columns and slashes chosen per head, or the kind that --patterns gives it, in every layer",
        ("Jiang et al. 2024, arXiv 2407.02490",),
        Part("MInference"),
    ),
    Method(
        "flexprefill",
        "FlexPrefill: blocks of columns and diagonals that hold a share of each head's attention, in every layer",
        ("Lai et al. 2025, arXiv 2502.20766",),
        Part("FlexPrefill"),
    ),
    Method(
        "xattention",
        "XAttention: the fewest key blocks that hold a share of the attention, by antidiagonals, in every layer",
        ("Xu et al. 2025, arXiv 2503.16428",),
        Part("XAttention"),
    ),
    Method(
        "flashprefill",
        "FlashPrefill: key blocks that weigh nearly as much as the heaviest one, in every layer",
        ("Fan et al. 2026, arXiv 2603.06199",),
        Part("FlashPrefill"),
    ),
    Method(
        "pbs",
        "PBS-Attn: blocks of keys that are sorted by importance inside of segments, in every layer",
        ("Wang et al. 2025, arXiv 2510.21270",),
        Part("PBS"),
    ),
    Method(
        "skip_softmax",
        "skip-softmax (BLASST): tiles far below the running maximum skip softmax and values, in every layer",
        ("Yuan et al. 2025, arXiv 2512.12087",),
        Part("SkipSoftmax"),
    ),
    Method(
        "oracle_blocks",
        "an oracle: the key blocks that truly hold most attention, which bounds all choices of blocks and is never timed",
        ("after Wang et al. 2026, arXiv 2606.07703",),
        Part("OracleBlocks"),
    ),
)
"""Methods that choose keys by the data in every layer; each is in the table once more with triangle attention below it."""


def above_triangle(method: Method) -> Method:
    """The method in the shallow layers, triangle attention in the deep ones."""
    return replace(
        method,
        name=f"tri_mix_{method.name}",
        summary=f"both: {method.summary.partition(':')[0]} in the shallow layers, triangle attention in the deep ones",
        papers=(TRIANGLE_MIX, *method.papers),
        deep=Part("Triangle"),
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("dense", "every query sees all keys before it, in every layer", (), Part("Dense")),
        Method(
            "tri_mix",
            "TriangleMix: dense shallow layers, triangle attention in the deep ones",
            (TRIANGLE_MIX,),
            Part("Dense"),
            Part("Triangle"),
        ),
        *(each for method in DYNAMIC_METHODS for each in (method, above_triangle(method))),
        Method(
            "streaming",
            "the A-shape as a baseline: first keys and a local window, in every layer",
            ("Xiao et al. 2023, arXiv 2309.17453",),
            Part("Triangle", fixed={"last_n": 0}),
        ),
    )
}
"""The methods by name: those of tmbench, and those that were registered."""

DEFAULT_METHODS = ("dense", "tri_mix", "minference", "tri_mix_minference")


def register(method: Method) -> None:
    """Add a method to the table.

    A package that declares it under the entry-point group ``tmbench.methods``, by its name, needs not call this: see
    ``tmbench.methods.installed``.

    Raises ValueError for what is no method, a name that no file can have, one that is taken, and ``layers`` as a parameter.
    """
    if not isinstance(method, Method):
        raise ValueError(f"a method is a tmbench.methods.table.Method, not {shortened(repr(method))}")  # noqa: TRY004
    if NAME.fullmatch(method.name) is None:
        raise ValueError(f"the name of a method has small letters, digits and _, unlike {shortened(method.name)!r}")
    if METHODS.get(method.name, method) != method:
        raise ValueError(f"there is a method {method.name} already")
    if LAYERS in method.declared:
        raise ValueError(f"{method.name} declares a parameter {LAYERS}, which says where a deep pattern is")
    METHODS[method.name] = method
