"""What all commands that measure do: run a spec under a progress bar, print the rows that were kept, and say what failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import typer

from tmbench.cli.screen import print_rows, progress_bar, say_nothing_measured

if TYPE_CHECKING:
    from rich.progress import TaskID

    from tmbench.measure.spec import Spec, Step
    from tmbench.models.loading import LoadedModel
    from tmbench.results.rows import Row

    R = TypeVar("R")
    AnyRow = TypeVar("AnyRow", bound=Row)


def measure(spec: Spec[R], loaded: LoadedModel, nothing: Callable[[int], None] = say_nothing_measured) -> list[R]:
    """Measure in this process what is missing; all that was asked for, as it was kept.

    ``nothing`` says that nothing was measured, given how many rows were there already.
    """
    from tmbench.measure.executor import InProcess
    from tmbench.measure.loop import run

    bar = progress_bar()
    begun: list[tuple[TaskID, str]] = []
    measured = 0

    def show(step: Step[R]) -> None:
        nonlocal measured
        measured += step.measured
        if step.part is not None:
            finish()
            bar.start()
            begun.append((bar.add_task(step.part.title, total=step.part.total), step.part.finished))
        bar.update(begun[-1][0], description=step.text or None, advance=step.work)

    def finish() -> None:
        for task, text in begun[-1:]:
            bar.update(task, description=text)

    try:
        rows = run(spec, InProcess(loaded), show)
        finish()
    finally:
        bar.stop()
    if not measured:
        nothing(len(rows))
    return rows


def print_measured(rows: Sequence[AnyRow], show: Callable[[Sequence[AnyRow]], None], *, as_json: bool) -> None:
    """Print the rows, as JSON or by ``show``; exit code 1 where one of them has no figures."""
    if as_json:
        print_rows(rows)
    else:
        show(rows)
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(1)
