"""``tmbench list`` and ``tmbench env``."""

from __future__ import annotations

from tmbench.cli import options as o
from tmbench.methods import METHODS, PAPERS, PUBLISHED_STARTING_LAYERS, Settings


def list_() -> None:
    """The methods with their parameters and papers, the tasks, the models, and the backends that run here."""
    from rich.table import Table

    from ruler_tasks import TASKS
    from tmbench.cli.screen import console
    from tmbench_kernels import Dense, Triangle, VerticalSlash

    screen = console()
    methods = Table("method", "what it does", "parameters (default)", "paper", title="Methods")
    defaults = Settings()
    for method in METHODS.values():
        parameters = []
        for name in method.parameters:
            value = getattr(defaults, name)
            parameters.append(f"{name} ({'see --help' if value is None else value})")
        methods.add_row(method.name, method.summary, "\n".join(parameters), "\n".join(PAPERS[p] for p in method.papers))
    screen.print(methods)

    tasks = Table(
        "task", "what is asked", "answer tokens", "scored", title="RULER tasks (Hsieh et al. 2024, arXiv 2404.06654)"
    )
    for task in TASKS.values():
        scored = "part of all references" if task.metric == "all" else "any reference"
        tasks.add_row(task.name, task.summary, str(task.tokens_to_generate), scored)
    screen.print(tasks)

    models = Table("model", "what it is", title="Models")
    models.add_row("tiny", "embedded: 8 layers, up to 16K tokens, trained on tasks of RULER's kinds")
    models.add_row("a Hugging Face id or a folder", "any decoder-only transformers model with the attention interface")
    for known, layer in PUBLISHED_STARTING_LAYERS.items():
        models.add_row(f"... {known}", f"triangle attention starts at layer {layer}, as published")
    screen.print(models)

    backends = Table("pattern", "backend", "runs on", title="Backends")
    for pattern in (Dense, Triangle, VerticalSlash):
        for backend in pattern.backends:
            backends.add_row(pattern.name, backend.name, ", ".join(backend.devices))
    screen.print(backends)


def env(device: o.DeviceOption = None, as_json: o.JsonOption = False) -> None:
    """Device, driver, versions, and which dense attention works here: paste it into a bug report."""
    import json
    from dataclasses import asdict

    import typer
    from rich.table import Table

    from tmbench import environment, models
    from tmbench.cli.screen import console

    place = models.check_device(device or models.default_device())
    here = environment.current(place)
    dense = environment.dense_backends(place)
    if as_json:
        typer.echo(json.dumps({**asdict(here), "dense_backends": dense}, indent=2))
        return
    table = Table(show_header=False, title="Environment")
    for name, value in asdict(here).items():
        if name != "packages":
            table.add_row(name, str(value))
    for package, version in here.packages.items():
        table.add_row(package, version)
    for backend, state in dense.items():
        table.add_row(f"dense attention: {backend}", state)
    console().print(table)
