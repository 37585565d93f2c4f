"""What the commands that ask a suite's tasks share: their options, the run, and the table of scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from tmbench.cli import options as o
from tmbench.cli.attention import Attention, plans_for
from tmbench.cli.measuring import measure, opened, print_measured
from tmbench.cli.planning import show_plan
from tmbench.cli.screen import console, say, say_failures, table
from tmbench.results.variants import labels
from tmbench.results.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tmbench.engine.chunks import Chunks
    from tmbench.measure.spec import ModelSource
    from tmbench.methods.spec import MethodSpec
    from tmbench.results.rows import RulerRow
    from tmbench.results.shards import Shard
    from tmbench.suites.examples import ExampleSuite

TINY_LENGTHS = (4096,)
LENGTHS = (131072,)

SamplesOption = Annotated[int, typer.Option(min=1, help="Samples per task.", rich_help_panel=o.MEASURED)]
ChatOption = Annotated[
    bool,
    typer.Option("--apply-chat-template", help="Ask as a user's message in the model's format.", rich_help_panel=o.PROMPTS),
]
ChatKwargsOption = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Variables of the chat template, which is then applied.",
        rich_help_panel=o.PROMPTS,
        show_default="thinking off",
    ),
]
# Scores of synthetic weights say nothing, and times are not what this command is for: --weights and --dense-backend work as
# in tmbench ttft, and its help has them.
UnlistedWeightsOption = Annotated[Literal["checkpoint", "random", "structured"], typer.Option("--weights", hidden=True)]

SaveSamplesOption = Annotated[
    bool, typer.Option("--save-samples", help="Keep each prompt with its prediction.", rich_help_panel=o.OUTPUT)
]


class Where(NamedTuple):
    """The options that say who measures."""

    executor: str | None
    workers: int | None
    address: str | None


def lengths_of(model: str) -> tuple[int, ...]:
    """At which lengths a model is asked, unless ``--length`` says otherwise."""
    return TINY_LENGTHS if model == "tiny" else LENGTHS


def chat_text(kwargs: str | None, apply: bool) -> str | None:
    """The variables of ``--chat-template-kwargs``, which implies the template; None where no template is to be applied.

    Raises UserError for text that is no JSON object.
    """
    from tmbench.suites.chat import parse_kwargs

    if kwargs is not None:
        parse_kwargs(kwargs)
    return kwargs if kwargs is not None else "{}" if apply else None


def say_notes(suite: ExampleSuite, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell what must be known of the model's chat template; raises UserError for one that cannot be used."""
    for note in suite.chat(tokenizer).notes:
        say(note)


def ask(
    suite: ExampleSuite,
    tasks: Sequence[str],
    source: ModelSource,
    where: Where,
    chosen: Sequence[MethodSpec],
    attention: Attention,
    length: list[int] | None,
    output_dir: Path,
    *,
    samples: int,
    batch_size: int | None,
    seed: int,
    overwrite: bool,
    save_samples: bool,
    shard: Shard | None,
    chunks: Chunks | None,
    ask_later: bool = False,
    questions: int = 1,
    as_json: bool,
    plan: bool,
) -> None:
    """Ask every method a suite's tasks and print the scores, or with ``plan`` what there would be to do.

    ``chosen`` are the methods, as ``attention`` has them. Raises UserError for what cannot be measured so.
    """
    from tmbench.measure.accuracy import AccuracySpec
    from tmbench.measure.spec import place, prefill_kind

    run, loaded = opened(source, *where, plan_only=plan)
    lengths = o.lengths_for(loaded, length, lengths_of(source.name), longest_first=run.elsewhere)
    if plan and loaded.tokenizer is None:
        say(f"{loaded.name} has no tokenizer, so prompts are taken to fill their length, and it cannot be run")
    else:
        say_notes(suite, loaded.need_tokenizer(suite.title))
    spec = AccuracySpec(
        **run.ask(place),
        root=output_dir,
        suite=suite,
        plans=plans_for(chosen, attention, run, loaded, lengths, output_dir),
        lengths=lengths,
        tasks=tasks,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        prefill=run.ask(partial(prefill_kind, chunks=chunks, ask_later=ask_later)),
        chunks=chunks,
        ask_later=ask_later,
        questions=questions,
        overwrite=overwrite,
        save_samples=save_samples,
        shard=shard,
    )
    if plan:
        show_plan(spec, loaded, where.workers)
        return
    rows = measure(spec, run)
    _say_fewer(rows, questions)
    print_measured(spec, rows, _show, as_json=as_json)


def _say_fewer(rows: Sequence[RulerRow], questions: int) -> None:
    """Which tasks had fewer questions for each context than the user wished for."""
    most: dict[tuple[int, str], int] = {}
    for row in rows:
        most[row.length, row.task] = max(row.question, most.get((row.length, row.task), 1))
    fewer: dict[tuple[int, int], list[str]] = {}
    for (length, task), many in most.items():
        if many < questions:
            fewer.setdefault((length, many), []).append(task)
    for (length, many), tasks in fewer.items():
        say(f"--questions {questions}: {', '.join(tasks)} at {length} had {counted(many, 'question')} for each context")


def _show(rows: Sequence[RulerRow]) -> None:
    called = labels(rows)
    methods = list(dict.fromkeys(called))
    for length in sorted({row.length for row in rows}):
        shown = table(f"{rows[0].title} at {counted(length, 'token')}{rows[0].fed}", "task", *methods, right=tuple(methods))
        cells = {(_asked(row), name): row for row, name in zip(rows, called, strict=True) if row.length == length}
        tasks = list(dict.fromkeys(task for task, _ in cells))
        for task in tasks:
            shown.add_row(task, *(_cell(cells.get((task, method))) for method in methods))
        shown.add_section()
        shown.add_row(f"mean of {len(tasks)}", *(_mean([cells.get((task, method)) for task in tasks]) for method in methods))
        console().print(shown)
    say_failures(rows)


def _asked(row: RulerRow) -> str:
    return row.task if row.question == 1 else f"{row.task}, question {row.question}"


def _cell(row: RulerRow | None) -> str:
    if row is None:
        return ""
    return row.status.replace("_", " ") if row.score is None else f"{row.score:.1f}"


def _mean(rows: list[RulerRow | None]) -> str:
    scores = [row.score for row in rows if row is not None and row.score is not None]
    return f"{sum(scores) / len(scores):.1f}" if len(scores) == len(rows) else ""
