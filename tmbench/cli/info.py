"""``tmbench list`` and ``tmbench env``."""

from __future__ import annotations

from tmbench.cli import options as o
from tmbench.cli.screen import console, say, table
from tmbench.errors import UserError
from tmbench.methods.installed import get_method, method_names
from tmbench.methods.plan import PUBLISHED_STARTING_LAYERS, ModelShape
from tmbench.methods.table import Method


def list_() -> None:
    """The methods with their parameters and papers, the tasks, the models, and the backends that run here."""
    from ruler_tasks import TASKS
    from tmbench.models.presets import preset_names, read_preset
    from tmbench_kernels import MInferenceHeads, Pattern

    screen = console()
    methods = table("Methods", "method", "what it does", "options it reads, and what may follow its name", "paper")
    found: list[Method] = []
    for name in method_names():
        try:
            found.append(get_method(name))
        except UserError as error:
            say(str(error))
    for method in found:
        parameters = ["--layers"] * bool(method.deep)
        parameters += [
            f"--{name.replace('_', '-')}" if about.option else f"{name}={about.default}"
            for name, about in method.declared.items()
        ]
        methods.add_row(method.name, method.summary, ", ".join(parameters), "; ".join(method.papers))
    screen.print(methods)
    shown = table(
        "Parameters, which follow a method's name, as in xattention:stride=8", "parameter", "default", "what it is"
    )
    for name, about in {name: about for method in found for name, about in method.declared.items()}.items():
        shown.add_row(name, about.shown_default or str(about.default), about.help)
    screen.print(shown)

    tasks = table(
        "RULER tasks (Hsieh et al. 2024, arXiv 2404.06654)",
        "task",
        "what is asked",
        "references",
        "answer tokens",
        right=("answer tokens",),
    )
    for task in TASKS.values():
        score = "share found" if task.metric == "all" else "any found"
        tasks.add_row(task.name, task.summary, score, str(task.tokens_to_generate))
    screen.print(tasks)

    models = table("Models", "model", "what it is")
    models.add_row("tiny", "embedded: 8 layers, up to 16K tokens, trained on tasks of RULER's kinds")
    for name in preset_names():
        preset = read_preset(name)
        models.add_row(
            name, f"preset for --weights random or structured: the config of {preset['_name_or_path']}, nothing downloaded"
        )
    models.add_row("Hugging Face id or folder", "any decoder-only transformers model that uses the attention interface")
    screen.print(models)

    layers = table("First triangle layer, unless --layers or --starting-layer says otherwise", "model", "layer")
    for known, layer in PUBLISHED_STARTING_LAYERS.items():
        layers.add_row(known, f"{layer}, as published")
    layers.add_row("any other", "half its depth")
    screen.print(layers)

    backends = table("Backends", "pattern", "backend", "runs on")
    small = ModelShape("", layers=2, heads=1)
    plans = [method.plan(small) for method in found]
    patterns: list[type[Pattern]] = list(dict.fromkeys(type(pattern) for plan in plans for pattern in plan.patterns))
    patterns.append(MInferenceHeads)
    for pattern in patterns:
        for backend in pattern.backends:
            backends.add_row(pattern.name, backend.name, ", ".join(backend.devices))
    screen.print(backends)


def env(device: o.DeviceOption = None, as_json: o.JsonOption = False) -> None:
    """Device, driver, versions, and what computes attention here: paste it into a bug report."""
    from dataclasses import asdict

    import typer

    from tmbench.engine.backends import attention_backends
    from tmbench.models import loading
    from tmbench.results import environment
    from tmbench.results.json_text import json_text

    place = loading.check_device(device or loading.default_device())
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
