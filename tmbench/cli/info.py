"""``tmbench list`` and ``tmbench env``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer

from tmbench.cli import options as o
from tmbench.cli.blocks import Blocks
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.screen import console, say, table
from tmbench.errors import UserError
from tmbench.methods.installed import get_method, method_names
from tmbench.methods.plan import PUBLISHED_STARTING_LAYERS, ModelShape, default_layers
from tmbench.methods.table import Method
from tmbench.results.words import counted, length_name
from tmbench_kernels.parameters import Parameter

ListedModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", show_default=False,
        help="Print the kinds of this model's layers instead, and what a method can save on it at most.",
    ),
]  # fmt: skip
EnvJsonOption = Annotated[bool, typer.Option("--json", help="Print it as JSON.", rich_help_panel=o.OUTPUT)]
LENGTHS = (32768, 65536, 131072)
"""At which savings are printed, unless --length says otherwise."""


@with_checkpoint()
def list_(model: ListedModelOption = None, length: o.LengthOption = None, checkpoint: Checkpoint = AS_IT_IS) -> None:
    """The methods with their parameters and papers, the tasks, the models, and the backends that run here.

    With --model the kinds of its layers, and what a method can save on it at most.
    """
    if model is not None:
        _list_model(model, length, checkpoint)
        return
    if length:
        raise UserError("--length says at which lengths --model is looked at: give --model too, or leave it out")
    how = {name.replace("_", "-"): value for name, value in checkpoint.given.items()}
    o.refuse(how, "says how --model is loaded, which is not given")
    found: list[Method] = []
    for name in method_names():
        try:
            found.append(get_method(name))
        except UserError as error:
            say(str(error))
    for shown in (
        _methods(found), _parameters(found), _ruler_tasks(), _drawn_tasks(), _models(), _first_layers(), _backends(found)
    ):  # fmt: skip
        console().print(shown)


def _methods(found: Sequence[Method]) -> Blocks:
    shown = table("Methods", "method", "what it does", "options it reads, and what may follow its name", "paper")
    for method in found:
        parameters = ["--layers"] * bool(method.deep)
        parameters += [
            f"--{name.replace('_', '-')}" if about.option else name if about.default is None else f"{name}={about.default}"
            for name, about in method.declared.items()
        ]
        shown.add_row(method.name, method.summary, ", ".join(parameters), "; ".join(method.papers))
    return shown


def _parameters(found: Sequence[Method]) -> Blocks:
    shown = table(
        "Parameters, which follow a method's name, as in xattention:stride=8", "parameter", "default", "what it is"
    )
    # Two patterns may call parameters of their own alike: each has a line then, with the first method that reads it.
    read_by: dict[tuple[str, Parameter], str] = {}
    for method in found:
        for declared in method.declared.items():
            read_by.setdefault(declared, method.name)
    namesakes = Counter(name for name, _ in read_by)
    for (name, about), reader in read_by.items():
        of = f" of {reader}" if namesakes[name] > 1 else ""
        shown.add_row(name + of, about.shown_default or str(about.default), about.help)
    return shown


def _ruler_tasks() -> Blocks:
    from ruler_tasks import TASKS

    title = "RULER tasks (Hsieh et al. 2024, arXiv 2404.06654)"
    shown = table(title, "task", "what is asked", "references", "answer tokens", right=("answer tokens",))
    for task in TASKS.values():
        score = "share found" if task.metric == "all" else "any found"
        shown.add_row(task.name, task.summary, score, str(task.tokens_to_generate))
    return shown


def _drawn_tasks() -> Blocks:
    from tmbench.suites.table import DRAWN

    title = "Tasks of tmbench suite, which downloads nothing"
    shown = table(title, "suite", "task", "what is asked", "answer tokens", right=("answer tokens",))
    for suite in DRAWN.values():
        for name in suite.tasks:
            shown.add_row(suite.name, name, suite.recipes[name].summary, str(suite.recipes[name].new_tokens))
    return shown


def _models() -> Blocks:
    from tmbench.models.presets import preset_names, read_preset
    from tmbench.models.structured import FAMILIES

    shown = table("Models", "model", "what it is")
    shown.add_row("tiny", "embedded: 8 layers, up to 16K tokens, trained on tasks of RULER's kinds")
    for name in preset_names():
        preset = read_preset(name)
        synthetic = "random or structured" if preset["model_type"] in FAMILIES else "random"
        published = preset.get("_published_layers")
        part = f"the first {preset['num_hidden_layers']} of {published} layers of " if published else ""
        shown.add_row(
            name,
            f"preset for --weights {synthetic}: the config of {part}{preset['_name_or_path']}, nothing downloaded",
        )
    shown.add_row("Hugging Face id or folder", "any decoder-only transformers model that uses the attention interface")
    return shown


def _first_layers() -> Blocks:
    shown = table("First triangle layer, unless --layers or --starting-layer says otherwise", "model", "layer")
    for known, layer in PUBLISHED_STARTING_LAYERS.items():
        shown.add_row(known, f"{layer}, as published")
    shown.add_row("any other", "half the depth: the deeper half of its layers of full attention")
    return shown


def _backends(found: Sequence[Method]) -> Blocks:
    from tmbench_kernels import MInferenceHeads, Pattern
    from tmbench_kernels.kernel_kinds import KINDS

    shown = table("Backends", "pattern", "backend", "kind of kernel", "runs on")
    small = ModelShape("", layers=2, heads=1)
    plans = [method.plan(small) for method in found]
    patterns: list[type[Pattern]] = list(
        dict.fromkeys(type(pattern) for plan in plans for pattern in plan.by_layer.values())
    )
    patterns.append(MInferenceHeads)
    for pattern in patterns:
        for backend in pattern.backends:
            kind = KINDS[backend.name].name if backend.name in KINDS else "of another package"
            shown.add_row(pattern.name, backend.name, kind, ", ".join(backend.devices))
    return shown


def _list_model(name: str, given: list[int] | None, checkpoint: Checkpoint) -> None:
    from tmbench.measure.savings import savings
    from tmbench.methods.layers import layers_text
    from tmbench.models.attention_modules import attention_modules, limiting_windows, windows
    from tmbench.models.geometry import max_positions
    from tmbench.models.loading import load

    # Weights change nothing here, and need not be there.
    loaded = load(name, weights="random", plan_only=True, **checkpoint.given)
    attention_modules(loaded.model)
    # Where every layer has a window no method reads beyond it, and dense attention sees fewer pairs.
    longest = min(max_positions(loaded.model.config) or max(LENGTHS), *limiting_windows(loaded.model).values(), max(LENGTHS))
    for length in given or ():
        loaded.check_length(length)
    lengths = sorted(set(given or [length for length in LENGTHS if length <= longest] or [longest]))
    found, count = savings(loaded, lengths), loaded.shape.layers
    spans = sorted(set(windows(loaded.model).values()))
    title = f"Layers of {loaded.name}: operations for the first token, in T, as linear layers + attention"
    columns = ("kind", "number", "layers", *map(length_name, lengths))
    kinds = table(title, *columns, right=columns[3:])
    for place, kind in enumerate(found[0].kinds):
        figures = [f"{one.kinds[place].linear / 1e12:.3g} + {one.kinds[place].attention / 1e12:.3g}" for one in found]
        kinds.add_row(kind.kind, str(len(kind.layers)), layers_text(kind.layers, count), *figures)
    console().print(kinds)
    if spans:
        say(f"windows of {', '.join(map(str, spans))} tokens")
    full = loaded.shape.full
    deep = default_layers(loaded.shape).layers
    columns = ("length", "all operations, T", f"saved by tri_mix in layers {layers_text(deep, count)}", "saved at most")
    saved = table("What a method can save", *columns, right=columns)
    for one in found:
        saved.add_row(length_name(one.length), f"{one.dense / 1e12:.3g}", f"{one.saved:.1%}", f"{one.most:.1%}")
    console().print(saved)
    say(
        f"A method acts on {counted(len(full), 'layer')} of {count}; at most means that attention in all of them costs "
        "nothing. Times follow operations only where all run equally fast."
    )


def env(device: o.DeviceOption = None, as_json: EnvJsonOption = False) -> None:
    """Device, driver, versions, and what computes attention here: paste it into a bug report."""
    from dataclasses import asdict

    from tmbench.engine.backends import attention_backends
    from tmbench.models import devices
    from tmbench.results import environment
    from tmbench.results.json_text import json_text

    place = devices.check_device(device or devices.default_device())
    here = environment.current(place)
    backends = attention_backends(place)
    if as_json:
        typer.echo(json_text({**asdict(here), "backends": backends}))
        return
    shown = table("Environment", "what", "here")
    for name, value in asdict(here).items():
        if name != "packages":
            shown.add_row(name.replace("_", " "), str(value))
    for package, version in here.packages.items():
        shown.add_row(package, version)
    for pattern, states in backends.items():
        for backend, state in states.items():
            shown.add_row(f"{pattern}: {backend}", state)
    console().print(shown)
