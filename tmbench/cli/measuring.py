"""What all commands that measure do: run a spec under a progress bar, print the rows that were kept, and say what failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ruler_tasks.errors import RulerError
from tmbench.cli.options import RESULTS, refuse
from tmbench.cli.progress import progress_bar, waiting
from tmbench.cli.screen import print_rows, say, say_failures, say_nothing_measured
from tmbench.errors import UnfinishedError, UserError
from tmbench.models import parallel
from tmbench.results.words import counted

if TYPE_CHECKING:
    from rich.progress import TaskID

    from tmbench.measure.executor import Executor
    from tmbench.measure.spec import ModelSource, RowSpec, Spec, Step
    from tmbench.models.loading import LoadedModel
    from tmbench.results.rows import Row

    R = TypeVar("R")
    AnyRow = TypeVar("AnyRow", bound=Row)


def opened(
    source: ModelSource,
    name: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    *,
    plan_only: bool = False,
) -> tuple[Executor, LoadedModel]:
    """The executor of ``--executor``, which ``measure`` closes, and the model as far as this process has it.

    With ``plan_only`` no weights are loaded anywhere, and nothing can be measured. Raises UserError for options that do not
    go together, for what is not there, and for a model that cannot be loaded.
    """
    from tmbench.measure.executor import InProcess

    if name is None:
        refuse({"workers": workers}, "says how many workers --executor has, which is not given")
    if name != "ray":
        refuse({"address": address}, "is the cluster of --executor ray")
    if parallel.size() > 1:
        return _across_ranks(source, name, plan_only)
    if plan_only:
        loaded = source.load(plan_only=True)
        return InProcess(loaded), loaded
    return _open(InProcess() if name is None else _workers(source, name, workers, address), source)


def _across_ranks(source: ModelSource, name: str | None, plan_only: bool) -> tuple[Executor, LoadedModel]:
    from tmbench.executors.ranks import AcrossRanks

    refuse({"executor": name}, "does not go with torchrun, whose processes share one model")
    refuse({"plan": plan_only}, "does not go with torchrun, as what a run takes on several GPUs is not known before")
    return _open(AcrossRanks(), source)


def _open(executor: Executor, source: ModelSource) -> tuple[Executor, LoadedModel]:
    with waiting(f"loading {source.name}"):
        return executor, executor.open(source)


def _workers(source: ModelSource, name: str, workers: int | None, address: str | None) -> Executor:
    from tmbench.executors.workers import Transport, Workers

    transport: Transport
    if name == "processes":
        from tmbench.executors.processes import Processes

        transport = Processes(source.device, workers)
    else:
        from tmbench.executors.ray_actors import Actors

        transport = Actors(source.device, workers, address)
    say(f"{counted(transport.count, 'worker')} will load {source.name}")
    return Workers(transport, say)


def measure(spec: Spec[R], executor: Executor, nothing: Callable[[int], None] = say_nothing_measured) -> list[R]:
    """Measure what is missing; all that was asked for, as it was kept.

    ``nothing`` says that nothing was measured, given how many rows were there already.

    Raises UserError as ``loop.run``, and UnfinishedError in its place once something was measured.
    """
    from tmbench.measure.loop import run
    from tmbench.measure.spec import RowSpec

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
        with waiting(f"preparing {spec.model.name}"):
            notes = executor.ask(spec.notes)
        for note in notes:
            say(note)
        rows = run(spec, executor, show)
        finish()
    except (UserError, RulerError) as error:
        if not measured:
            raise
        raise UnfinishedError(str(error)) from error
    finally:
        bar.stop()
        executor.close()
    if not measured and (not isinstance(spec, RowSpec) or spec.shard is None):
        nothing(len(rows))
    return rows


def print_measured(
    spec: RowSpec[Any], rows: Sequence[AnyRow], show: Callable[[Sequence[AnyRow]], None], *, as_json: bool
) -> None:
    """Print the rows, as JSON or by ``show``; exit code 1 where one of them has no figures.

    A shard has no rows but those that say why it failed.
    """
    if as_json:
        print_rows(rows)
    elif spec.shard is None:
        show(rows)
    if spec.shard is not None:
        say_failures(rows)
        there = "" if spec.root == RESULTS else f" --output-dir {spec.root}"
        say(
            f"shard {spec.shard} is measured, under {spec.root / spec.shard.folder}; once all {spec.shard.of} are, "
            f"tmbench merge {spec.root}{there} makes the rows"
        )
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(1)
