"""The options that commands share, and what their texts mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ruler_tasks.errors import RulerError
from tmbench.cli.screen import say
from tmbench.errors import UserError, shortened
from tmbench.methods.layers import whole_number
from tmbench.methods.table import (
    DEFAULT_METHODS,
    DENSE_BACKENDS,
    LARGEST_COUNT,
    METHODS,
    Plan,
    Settings,
    get_method,
    parse_method,
)
from tmbench.models.presets import preset_names

if TYPE_CHECKING:
    from tmbench.models.loading import LoadedModel

RESULTS = Path("results")
UNITS = {"k": 2**10, "m": 2**20}


def parse_length(text: str) -> int:
    """Tokens from a text such as 32768, 32K or 1M (K is 1024)."""
    number, unit = text.strip().lower(), 1
    if number[-1:] in UNITS:
        number, unit = number[:-1], UNITS[number[-1:]]
    try:
        length = float(number) * unit
    except ValueError:
        length = 0
    if not math.isfinite(length) or length < 1 or length != int(length):
        raise typer.BadParameter(f"{shortened(text)!r} is no number of tokens: give for instance 32768 or 32K")
    if length > LARGEST_COUNT:
        raise typer.BadParameter(f"{shortened(text)!r} is more tokens than any prompt has: give for instance 32768 or 32K")
    return int(length)


MEASURED, ATTENTION, MACHINE, OUTPUT, PROMPTS = (
    "What is measured",
    "Attention",
    "Model and machine",
    "Output",
    "Prompts",
)

MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method", metavar="METHOD",
        help=f"A method; repeat for several. One of {', '.join(METHODS)}. Parameters may follow, as in xattention:stride=8.",
        rich_help_panel=MEASURED,
        show_default=" ".join(DEFAULT_METHODS),
    ),
]  # fmt: skip
LengthOption = Annotated[
    list[int] | None,
    typer.Option(
        "--length", parser=parse_length, metavar="TOKENS", help="Tokens, such as 32768 or 32K; repeat for several.",
        rich_help_panel=MEASURED, show_default="what fits the model",
    ),
]  # fmt: skip
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the prompts.", rich_help_panel=MEASURED)]
ModelOption = Annotated[
    str,
    typer.Option(
        help=f"tiny (embedded), a Hugging Face id, a checkpoint folder, or with drawn weights {', '.join(preset_names())}.",
        rich_help_panel=MACHINE,
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="A torch device.", rich_help_panel=MACHINE, show_default="cuda if there is one")
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="The model's type.", rich_help_panel=MACHINE, show_default="bfloat16 on a GPU, else float32"),
]
WeightsOption = Annotated[
    Literal["checkpoint", "random", "structured"],
    typer.Option(
        help="Drawn weights need only the config: random, for which dynamic methods cost more, or structured, whose "
        "attention has bands, slashes, sinks and columns as trained heads have.",
        rich_help_panel=MACHINE,
    ),
]
LayersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layers", "--starting-layer", metavar="LAYERS",
        help="Layers with triangle attention, from 0: 16 (all from there on), 16-31, 5,7,10,15-35, none, random:4, a CSV of "
        "tmbench probe, or auto for its newest result.",
        rich_help_panel=ATTENTION, show_default="from the published one on, else from half the depth",
    ),
]  # fmt: skip
NInitOption = Annotated[
    int | None, typer.Option(help="First keys that all queries see.", rich_help_panel=ATTENTION, show_default="8")
]
NLocalOption = Annotated[
    int | None, typer.Option(help="Local window, the query included.", rich_help_panel=ATTENTION, show_default="512")
]
LastNOption = Annotated[
    int | None, typer.Option(help="Last queries, which see all keys.", rich_help_panel=ATTENTION, show_default="128")
]
PatternsOption = Annotated[
    Path | None,
    typer.Option(
        help="MInference-format JSON of each head's type and budget.",
        rich_help_panel=ATTENTION,
        show_default="1000, 6096 each",
    ),
]
DenseBackendOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help=f"What computes dense attention: {', '.join(DENSE_BACKENDS)}.", rich_help_panel=ATTENTION,
        show_default="the first of these that is installed and serves the model",
    ),
]  # fmt: skip
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile", help="Compile the decoder layers.", rich_help_panel=MACHINE,
        show_default="on a GPU with a C compiler",
    ),
]  # fmt: skip
OutputDirOption = Annotated[Path, typer.Option(help="Folder of the result files.", rich_help_panel=OUTPUT)]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Measure again what is there already.", rich_help_panel=OUTPUT)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.", rich_help_panel=OUTPUT)]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be measured, and stop.", rich_help_panel=OUTPUT)
]


@contextmanager
def naming(option: str, kind: type[RulerError]) -> Iterator[None]:
    """Have such an error of ``ruler_tasks``, which knows no command line, name the option that it is about."""
    try:
        yield
    except kind as error:
        raise UserError(f"{option}: {error}") from error


def refuse(given: Mapping[str, Any], why: str) -> None:
    """Raise UserError for the first of these options, by name, that was given: whose value is neither None nor False."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise UserError(f"--{name} {why}: leave it out")


def check_plot(path: Path | None) -> None:
    """Raise UserError for a ``--plot`` that is no PNG file's name."""
    if path is not None and path.suffix.lower() != ".png":
        raise UserError(f"--plot {path} must be the name of a PNG file: let it end in .png")


def deep_layers(given: list[str] | None) -> dict[str, Any]:
    """What ``--layers`` and ``--starting-layer``, two names of one option, say, as fields of Settings.

    Raises UserError where more than one of them was given.
    """
    if not given:
        return {}
    if len(given) > 1:
        raise UserError(f"--layers and --starting-layer are one option, given {len(given)} times: give it once")
    text = given[0].strip()
    first = text.removeprefix("-")
    if not first.isdecimal():
        return {"layers": text}
    layer = whole_number(first)
    if layer is None:
        raise UserError(f"--layers {shortened(text)} is more than any model has: give layers of the model")
    return {"starting_layer": layer if first == text else -layer}


def settings_for(methods: list[str], **options: Any) -> dict[str, Settings]:
    """Each method's parameters, by its name: from what follows the name, and from options named as fields of Settings.

    An option that was not given is None. Raises UserError for an option that none of the chosen methods reads, and for a
    method that is chosen twice with different parameters.
    """
    given = {name: value for name, value in options.items() if value is not None}
    chosen = [parse_method(text) for text in methods]
    read = {parameter for method, _ in chosen for parameter in method.parameters}
    for name in given:
        if name not in read:
            names = ", ".join(method.name for method, _ in chosen)
            raise UserError(f"--{name.replace('_', '-')} changes none of {names}: leave it out")
    settings: dict[str, Settings] = {}
    for (method, own), text in zip(chosen, methods, strict=True):
        try:
            wanted = Settings(**{**given, **own})
        except UserError as error:
            raise UserError(f"--method {shortened(text)}: {error}" if own else str(error)) from None
        if settings.setdefault(method.name, wanted) != wanted:
            raise UserError(f"--method {method.name} is given twice with different parameters: measure one after the other")
    return settings


def plans_for(
    settings: Mapping[str, Settings], loaded: LoadedModel, lengths: list[int], results: Path = RESULTS
) -> list[Plan]:
    """One plan per method for this model, each checked against the model once, before anything is measured.

    ``results`` is where ``--layers auto`` looks for a probe.
    """
    from tmbench.models.attention_modules import attention_modules

    attention_modules(loaded.model)
    for name in dict.fromkeys(own.dense_backend for own in settings.values()):
        if name is not None:
            _check_dense_backend(name, loaded, lengths)
    plans = [get_method(name).plan(loaded.shape, replace(own, results=results)) for name, own in settings.items()]
    for plan in plans:
        if plan.starting_layer_source.startswith("probe"):
            chosen = plan.parameters.get("layers", f"from {plan.parameters.get('starting_layer')} on")
            say(f"{plan.method}: triangle attention in layers {chosen}, by the {plan.starting_layer_source}")
        if plan.starting_layer_source == "half the depth":
            say(
                f"{plan.method}: no starting layer is published for {loaded.name}, so triangle attention starts at half "
                f"its depth, layer {plan.parameters['starting_layer']}; --layers chooses others, tmbench probe proposes some"
            )
    return plans


def _check_dense_backend(name: str, loaded: LoadedModel, lengths: list[int]) -> None:
    """Raise UserError where this backend is not installed or cannot serve the model, with those that can."""
    from tmbench_kernels import Dense

    for length in lengths:
        obstacles = {backend.name: backend.obstacle(Dense(), *loaded.qkv(length)) for backend in Dense.backends}
        if obstacles[name]:
            usable = ", ".join(other for other, obstacle in obstacles.items() if not obstacle)
            raise UserError(
                f"--dense-backend {name} {obstacles[name]}: as things are, {loaded.name} at {length} tokens can use {usable}"
            )


def lengths_for(loaded: LoadedModel, given: list[int] | None, wanted: tuple[int, ...]) -> list[int]:
    """The given lengths, each once; without any, those of the wanted ones that fit the model, or the longest that does.

    Raises UserError for a given length that the model cannot read.
    """
    for note in loaded.notes:
        say(note)
    limit = loaded.longest
    fitting = [length for length in wanted if limit is None or length <= limit]
    lengths = list(dict.fromkeys(given or fitting or [limit or wanted[0]]))
    for length in lengths:
        loaded.check_length(length)
    return lengths
