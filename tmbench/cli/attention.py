"""The options that say how attention is computed, as ``tmbench_kernels.shared`` declares them, and plans made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tmbench.cli.groups import grouped
from tmbench.cli.screen import say
from tmbench.errors import UserError
from tmbench.methods.layers import chosen_layers, whole_number
from tmbench.methods.plan import HALF, DeepLayers, Plan
from tmbench.methods.spec import MethodSpec, specs
from tmbench.methods.table import ATTN_NATIVE
from tmbench.results.words import counted
from tmbench_kernels.parameters import Parameter
from tmbench_kernels.shared import OPTIONS

if TYPE_CHECKING:
    from tmbench.measure.executor import Executor
    from tmbench.models.loading import LoadedModel

PANEL = "Attention"
LAYERS, STARTING_LAYER = "layers", "starting_layer"
LAYERS_HELP = (
    "Layers with triangle attention, from 0: 16- (all from there on, as --starting-layer 16), 16 (it alone), 5,7,10-15, "
    "none, random:4, a CSV of tmbench probe or tune, or auto for the newest probe."
)
FAR = 2
"""A choice by prompts more than so many times as long, or as short, need not fit."""


@dataclass(frozen=True)
class Attention:
    """What the options say."""

    layers: tuple[str, ...] = ()
    starting_layer: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The others that were given, by name."""
    native: bool = False
    """Whether transformers' own attention is measured too."""

    @property
    def choice(self) -> str:
        """The option that says where deep patterns are; "" where none was given."""
        return "--layers" if self.layers else "--starting-layer" if self.starting_layer else ""

    def once(self) -> Attention:
        """The same; raises UserError where one of the two that say where deep patterns are was given more than once."""
        for name in (LAYERS, STARTING_LAYER):
            given = getattr(self, name)
            if len(given) > 1:
                raise UserError(f"--{name.replace('_', '-')} is given {len(given)} times: give it once")
        return self

    def specs(self, methods: Sequence[str]) -> list[MethodSpec]:
        """These methods with the options that they read; raises UserError for an option that none of them reads."""
        return specs(methods, self.parameters, layers=self.choice)

    def deep_layers(self, loaded: LoadedModel, lengths: Sequence[int], results: Path) -> list[DeepLayers]:
        """The choices of deep layers that were given, for this model, each once; what they mean is said aloud.

        Raises UserError for one that does not fit the model, and where both options were given.
        """
        if self.layers and self.starting_layer:
            chosen_layers(loaded.shape, self.layers[0], self.starting_layer[0])
        found: dict[DeepLayers, None] = {}
        for text in self.layers:
            chosen = chosen_layers(loaded.shape, text, root=results)
            assert chosen is not None
            if whole_number(text.strip()) is not None:
                say(f"--layers {text.strip()} is layer {text.strip()} alone; {text.strip()}- is all from there on")
            if chosen.probed is not None:
                _say_source(chosen, loaded, lengths)
            found[chosen] = None
        for text in self.starting_layer:
            chosen = chosen_layers(loaded.shape, starting_layer=text)
            assert chosen is not None
            found[chosen] = None
        return list(found)


NO_ATTENTION = Attention()


def _say_source(chosen: DeepLayers, loaded: LoadedModel, lengths: Sequence[int]) -> None:
    from tmbench.methods.layers import layers_text

    say(f"triangle attention in layers {layers_text(chosen.layers, loaded.shape.layers)}, by the {chosen.source}")
    assert chosen.probed is not None
    noun = chosen.source.partition(" ")[0]  # "probe" or "tune", and each is a verb too
    far = [length for length in lengths if not chosen.probed / FAR <= length <= chosen.probed * FAR]
    if far:
        say(
            f"that {noun} is of {chosen.probed} tokens, and this run of {', '.join(map(str, far))}: other layers may matter "
            f"there, so {noun} at that length too"
        )


def with_attention(
    *, without: tuple[str, ...] = (), hidden: tuple[str, ...] = (), repeated: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options in place of its parameter of the type ``Attention``, which it is called with.

    Args:
        without: options that the command does not have.
        hidden: options that its help does not list.
        repeated: whether each may be given several times; their values are then tuples.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [option for option in _options(hidden, repeated) if option.name not in without]
        return grouped(command, Attention, options, _said)

    return decorate


def _said(values: Mapping[str, Any]) -> Attention:
    """What values of the options say, by name."""
    where = {name: tuple(values.get(name) or ()) for name in (LAYERS, STARTING_LAYER)}
    others = {*where, ATTN_NATIVE}
    parameters = {name: value for name, value in values.items() if name not in others and value not in (None, [], ())}
    return Attention(**where, parameters=parameters, native=bool(values.get(ATTN_NATIVE)))


def _options(hidden: tuple[str, ...], repeated: bool) -> list[inspect.Parameter]:
    """The options as parameters of a command, in the order of its help."""
    several = " Repeat for several." * repeated
    where = typer.Option(
        "--layers", metavar="LAYERS", help=LAYERS_HELP + several, rich_help_panel=PANEL,
        show_default="from the published one on, else from half the depth",
    )  # fmt: skip
    start = typer.Option("--starting-layer", metavar="LAYER", help="16 is --layers 16-.", hidden=True)
    found = [_option(LAYERS, list[str] | None, where), _option(STARTING_LAYER, list[str] | None, start)]
    for name, declared in OPTIONS.items():
        kind = _kind(declared)
        about = typer.Option(
            f"--{name.replace('_', '-')}", help=declared.help + several, rich_help_panel=PANEL, hidden=name in hidden,
            show_default=declared.shown_default or str(declared.default),
            metavar="NAME" if declared.choices else None,
        )  # fmt: skip
        found.append(_option(name, list[kind] | None if repeated else kind | None, about))  # type: ignore[valid-type]
    native = typer.Option(
        "--attn-native", rich_help_panel=PANEL, hidden=ATTN_NATIVE in hidden,
        help="Measure transformers' own attention too, sdpa or eager as the model loads, in rows named attn_native.",
    )  # fmt: skip
    return [*found, _option(ATTN_NATIVE, bool, native, default=False)]


def _option(name: str, kind: Any, about: Any, default: Any = None) -> inspect.Parameter:
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, place, default=default, annotation=Annotated[kind, about])


def _kind(declared: Parameter) -> Any:
    """The type by which the command line reads an option; what is read by a function of its own is a file."""
    return Path if declared.read is not None else type(declared.default)


def plans_for(chosen: Sequence[MethodSpec], attention: Attention, where: Executor, loaded: LoadedModel,
              lengths: Sequence[int], results: Path) -> list[Plan]:  # fmt: skip
    """One plan per method and setting for this model, each checked against the model once, before anything is measured.

    ``where`` has its weights, and ``results`` is where ``--layers auto`` looks for a probe.
    """
    from tmbench.models.attention_modules import attention_modules

    attention_modules(loaded.model)
    for name in dict.fromkeys(str(spec.values.get("dense_backend", "")) for spec in chosen):
        if name:
            where.ask(partial(_check_dense_backend, name, lengths))
    deep = next(iter(attention.once().deep_layers(loaded, lengths, results)), None)
    plans = [replace(spec, layers=deep if spec.method.deep else None).plan(loaded.shape) for spec in chosen]
    if attention.native:
        from tmbench.methods.attn_native import BASELINE

        where.ask(_check_native)
        plans.append(BASELINE.plan(loaded.shape))
    for name in dict.fromkeys(plan.method for plan in plans if plan.layers_source == HALF):
        full = loaded.shape.full
        which = f", of its {counted(len(full), 'layer')} of full attention" if loaded.shape.native else ""
        say(
            f"{name}: no starting layer is published for {loaded.name}, so triangle attention starts at half "
            f"its depth{which}, layer {full[len(full) // 2]}; --layers chooses others, tmbench probe proposes some"
        )
    return plans


def _check_native(loaded: LoadedModel) -> None:
    """Raise UserError where --attn-native cannot show how the model was loaded."""
    from tmbench.engine.own_attention import AsLoaded
    from tmbench.models.attention_modules import attention_modules

    for module in attention_modules(loaded.model):
        AsLoaded.of(module)


def _check_dense_backend(name: str, lengths: Sequence[int], loaded: LoadedModel) -> None:
    """Raise UserError where this backend is not installed or cannot serve the model, with those that can."""
    from tmbench_kernels import Dense

    for length in lengths:
        obstacles = {backend.name: backend.obstacle(Dense(), *loaded.qkv(length)) for backend in Dense.backends}
        if obstacles[name]:
            usable = ", ".join(other for other, obstacle in obstacles.items() if not obstacle)
            raise UserError(
                f"--dense-backend {name} {obstacles[name]}: as things are, {loaded.name} at {length} tokens can use {usable}"
            )
