"""``--plan``: what a command would measure, what of that is there, and how long the rest will take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmbench.cli.screen import console, table
from tmbench.errors import UserError
from tmbench.methods.table import METHODS
from tmbench.results.words import HOUR, batched, counted, duration, figure

if TYPE_CHECKING:
    from tmbench.measure.outlook import Line
    from tmbench.measure.spec import RowSpec
    from tmbench.models.loading import LoadedModel

BASES = 2
"""How many of the places that an estimate is from are shown."""


def check_plan(plan: bool, as_json: bool) -> None:
    """Raise UserError for a plan that is asked for as rows."""
    if plan and as_json:
        raise UserError(
            "--plan or --dry-run prints a table of what would be measured, and --json rows: leave one of them out"
        )


def show_plan(spec: RowSpec[Any], loaded: LoadedModel, workers: int | None = None) -> None:
    """Print the plan of a spec; ``loaded`` needs no weights. ``workers`` is how many --executor has, where that is told."""
    from tmbench.measure.outlook import outlook
    from tmbench.measure.ttft import expected_flop

    found, dense = outlook(spec, loaded), METHODS["dense"].plan(loaded.shape)
    on = f"shard {spec.shard} of " * (spec.shard is not None)
    right = ("tokens", "operations", "to measure", "measured before", "seconds each", "time")
    shown = table(
        f"The plan of {on}a run of {loaded.name} on {spec.environment.device}",
        "tokens", "method", "parameters", "operations", "to measure", "measured before", "seconds each", "time", "from",
        right=right,
    )  # fmt: skip
    for line in found.lines:
        share = expected_flop(loaded, line.plan, line.length) / expected_flop(loaded, dense, line.length)
        shown.add_row(f"{batched(line.batch_size)}{line.length}", *_cells(line, f"{share:.1%}"))
    console().print(shown)
    if any(line.left for line in found.lines):
        place, unit = ("GPU", "GPU-hours") if loaded.device.type == "cuda" else ("CPU", "CPU-hours")
        told = f"In all {duration(found.seconds)} on one {place}, {figure(found.seconds / HOUR)} {unit}"
        if workers:
            many = counted(workers, "worker")
            # Those of one machine share its cores, with as much done in all as by one.
            told += f", {duration(found.seconds / workers)} on {many}" if place == "GPU" else f", which {many} would share"
        console().print(f"{told}; loading the model and making prompts come on top.", highlight=False)
    else:
        console().print("Nothing is to be measured: all was measured before.", highlight=False)
    for note in found.notes:
        console().print(note, highlight=False)


def _cells(line: Line, share: str) -> list[str]:
    parameters = ", ".join(f"{name} {value}" for name, value in line.plan.parameters.items())
    there = _counted(line.there, line.unit) if line.there else ""
    if not line.left:
        return [line.plan.method, parameters, share, "", there, "", "", ""]
    bases = "; ".join(line.bases[:BASES]) + f"; and {len(line.bases) - BASES} more" * (len(line.bases) > BASES)
    each = figure(line.seconds / line.left)
    return [line.plan.method, parameters, share, _counted(line.left, line.unit), there, each, duration(line.seconds), bases]


def _counted(number: int, unit: str) -> str:
    return counted(number, unit, "passes" if unit == "pass" else "")
