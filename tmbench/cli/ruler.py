"""``tmbench ruler`` and ``tmbench ruler-data``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ruler_tasks.errors import DatasetError, SourceError, WordingError
from tmbench.cli import options as o
from tmbench.cli.screen import console, print_rows, progress_bar, say, say_failures, say_nothing_measured, table
from tmbench.errors import UserError
from tmbench.methods.table import DEFAULT_METHODS
from tmbench.results.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.progress import Progress, TaskID
    from transformers import PreTrainedTokenizerBase

    from ruler_tasks import Example, SamplesAs, Sources, Wording
    from tmbench.measure.ruler import RulerJob
    from tmbench.results.rows import RulerRow
    from tmbench.suites.chat import Chat

TINY_LENGTHS = (4096,)
LENGTHS = (131072,)

TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task", metavar="TASK", help="A RULER task; repeat for several.", rich_help_panel=o.MEASURED, show_default="all 13"
    ),
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Samples per task.", rich_help_panel=o.MEASURED)]
DataDirOption = Annotated[
    Path | None,
    typer.Option(help="Essays, SQuAD and HotpotQA in their published files.", rich_help_panel=o.PROMPTS),
]
WordingOption = Annotated[
    str | None,
    typer.Option(
        help="tmbench, reference (an installed lm-eval), a RULER checkout, or a file.",
        rich_help_panel=o.PROMPTS,
        show_default="tmbench",
    ),
]
SamplesAsOption = Annotated[
    Literal["tmbench", "reference"],
    typer.Option(
        help="How samples are drawn: by tmbench's own rules, or as RULER's published code does, its defects included.",
        rich_help_panel=o.PROMPTS,
    ),
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Download nothing: generated texts stand in.", rich_help_panel=o.PROMPTS)
]
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
# Scores of drawn weights say nothing, and times are not what this command is for: both options work as in tmbench ttft, and
# its help has them.
UnlistedWeightsOption = Annotated[Literal["checkpoint", "random", "structured"], typer.Option("--weights", hidden=True)]
UnlistedDenseBackendOption = Annotated[str | None, typer.Option("--dense-backend", hidden=True)]


def ruler(
    method: o.MethodOption = None,
    length: o.LengthOption = None,
    task: TaskOption = None,
    samples: SamplesOption = 20,
    seed: o.SeedOption = 42,
    model: o.ModelOption = "tiny",
    weights: UnlistedWeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    layers: o.LayersOption = None,
    n_init: o.NInitOption = None,
    n_local: o.NLocalOption = None,
    last_n: o.LastNOption = None,
    patterns: o.PatternsOption = None,
    dense_backend: UnlistedDenseBackendOption = None,
    data: Annotated[
        Path | None, typer.Option(help="A data set that the reference RULER prepared.", rich_help_panel=o.PROMPTS)
    ] = None,
    data_dir: DataDirOption = None,
    wording: WordingOption = None,
    samples_as: SamplesAsOption = "tmbench",
    apply_chat_template: ChatOption = False,
    chat_template_kwargs: ChatKwargsOption = None,
    offline: OfflineOption = False,
    output_dir: o.OutputDirOption = o.RESULTS,
    overwrite: o.OverwriteOption = False,
    save_samples: Annotated[
        bool, typer.Option("--save-samples", help="Keep each prompt with its prediction.", rich_help_panel=o.OUTPUT)
    ] = False,
    as_json: o.JsonOption = False,
) -> None:
    """Accuracy on the 13 RULER tasks. All methods answer the same samples, and every prediction is kept.

    A length is the whole budget: prompt, special tokens and answer.
    """
    methods = list(method or DEFAULT_METHODS)
    settings = o.settings_for(
        methods,
        **o.deep_layers(layers),
        n_init=n_init,
        n_local=n_local,
        last_n=last_n,
        patterns=patterns,
        dense_backend=dense_backend,
    )
    tasks = tasks_for(task)
    if data is not None and not length:
        raise UserError("--data needs --length: the length that its samples were prepared for")
    if data is not None:
        making = {"wording": wording, "data-dir": data_dir, "offline": offline}
        making |= {"apply-chat-template": apply_chat_template, "chat-template-kwargs": chat_template_kwargs}
        making |= {"samples-as": None if samples_as == "tmbench" else samples_as}
        o.refuse(making, "does not go with --data, whose samples are asked as they are")

    from tmbench.measure.ruler import RulerJob
    from tmbench.models import loading
    from tmbench.results import environment

    chat_kwargs = chat_kwargs_of(chat_template_kwargs, apply_chat_template)
    loading.check_has_tokenizer(model, "RULER")
    texts = wording_for(wording)
    sources = sources_for(tasks if data is None else [], data_dir, offline, samples_as)
    loaded = loading.load(model, weights=weights, device=device, dtype=dtype)
    lengths = o.lengths_for(loaded, length, TINY_LENGTHS if model == "tiny" else LENGTHS)
    tokenizer = loaded.need_tokenizer("RULER")
    chat = chat_for(tokenizer, chat_kwargs)
    here = environment.current(loaded.device)
    job = RulerJob(
        loaded=loaded,
        tokenizer=tokenizer,
        plans=o.plans_for(settings, loaded, lengths, output_dir),
        lengths=lengths,
        tasks=tasks,
        samples=samples,
        environment=here,
        root=output_dir,
        wording=texts,
        sources=sources,
        frame=chat.frame,
        chat_template=chat_kwargs is not None,
        chat_template_kwargs=chat.kwargs,
        seed=seed,
        data=data,
        overwrite=overwrite,
        save_samples=save_samples,
        samples_as=samples_as,
    )
    job.check_lengths()
    environment.write_record(output_dir, here)
    rows = _evaluate(job)
    if as_json:
        print_rows(rows)
    else:
        _show(rows)
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(1)


def ruler_data(
    output: Annotated[Path, typer.Option(help="Folder to write to.", rich_help_panel=o.OUTPUT)],
    length: o.LengthOption = None,
    task: TaskOption = None,
    samples: SamplesOption = 500,
    seed: o.SeedOption = 42,
    model: Annotated[str, typer.Option(help="Whose tokenizer counts: tiny, a Hugging Face id or a folder.")] = "tiny",
    data_dir: DataDirOption = None,
    wording: WordingOption = None,
    samples_as: SamplesAsOption = "tmbench",
    apply_chat_template: ChatOption = False,
    chat_template_kwargs: ChatKwargsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Write RULER samples in the published format, <output>/<length>/data/<task>/validation.jsonl, and evaluate nothing."""
    tasks = tasks_for(task)

    import ruler_tasks
    from tmbench.measure.ruler import check_lengths
    from tmbench.models import loading

    chat_kwargs = chat_kwargs_of(chat_template_kwargs, apply_chat_template)
    texts = wording_for(wording)
    sources = sources_for(tasks, data_dir, offline, samples_as)
    tokenizer = loading.load_tokenizer(model)
    frame = chat_for(tokenizer, chat_kwargs).frame
    lengths = list(dict.fromkeys(length or (TINY_LENGTHS if model == "tiny" else LENGTHS)))
    check_lengths(tasks, lengths, tokenizer, texts, sources, frame, samples_as=samples_as, samples=samples, seed=seed)
    with progress_bar() as bar:
        shown = bar.add_task("RULER data", total=sum(lengths) * len(tasks) * samples)
        for tokens in lengths:
            for name in tasks:
                bar.update(shown, description=f"{name} at {tokens}")
                examples = ruler_tasks.examples(
                    name,
                    tokens,
                    range(samples),
                    tokenizer=tokenizer,
                    seed=seed,
                    wording=texts,
                    sources=sources,
                    frame=frame,
                    samples_as=samples_as,
                )
                with o.naming("--output", DatasetError):
                    ruler_tasks.write_dataset(output / str(tokens) / "data", _advance(bar, shown, tokens, examples))
        bar.update(shown, description="RULER data written")
    console().print(f"{counted(len(lengths) * len(tasks), 'file')} under {output}", highlight=False)


def tasks_for(names: list[str] | None) -> list[str]:
    """The tasks of ``--task``, each once, or all; raises UserError for one that there is none of."""
    from ruler_tasks import TASKS

    for name in names or ():
        if name not in TASKS:
            raise UserError(f"--task {name} is unknown: choose from {', '.join(TASKS)}")
    return list(dict.fromkeys(names or TASKS))


def wording_for(text: str | None) -> Wording:
    """The wording of ``--wording``; raises UserError for one that cannot be found or used."""
    from ruler_tasks import load_wording

    with o.naming("--wording", WordingError):
        return load_wording(text)


def chat_kwargs_of(text: str | None, apply: bool) -> dict[str, Any] | None:
    """The variables of ``--chat-template-kwargs``, which implies the template; None where no template is to be applied.

    Raises UserError for text that is no JSON object.
    """
    from tmbench.suites.chat import parse_kwargs

    return parse_kwargs(text) if text is not None else {} if apply else None


def chat_for(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any] | None) -> Chat:
    """What the model's chat template makes of a prompt with these variables, and say what must be known; None for none."""
    from tmbench.suites.chat import Chat, take_apart

    chat = Chat() if kwargs is None else take_apart(tokenizer, kwargs)
    for note in chat.notes:
        say(note)
    return chat


def sources_for(tasks: list[str], data_dir: Path | None, offline: bool, samples_as: SamplesAs = "tmbench") -> Sources:
    """Load what the tasks read before anything is measured, and say what stands in for what could not be had."""
    import logging

    from ruler_tasks import TASKS, Sources
    from ruler_tasks.published import sentences_by

    # The notes are printed here; without a handler of its own the package would print them once more.
    logging.getLogger("ruler_tasks").addHandler(logging.NullHandler())
    with o.naming("--data-dir", SourceError):
        sources = Sources(data_dir, offline=offline)
        for kind in dict.fromkeys(need for task in tasks for need in TASKS[task].needs):
            getattr(sources, kind)()
    for note in sources.notes:
        say(note)
    essays = any("essays" in TASKS[task].needs for task in tasks)
    if samples_as == "reference" and essays and (missing := sentences_by()[1]):
        say(missing)
    return sources


def _advance(bar: Progress, shown: TaskID, work: int, examples: Iterable[Example]) -> Iterator[Example]:
    for example in examples:
        yield example
        bar.update(shown, advance=work)


def _evaluate(job: RulerJob) -> list[RulerRow]:
    from tmbench.measure.ruler import run

    rows = []
    measured = 0
    with progress_bar() as bar:
        shown = bar.add_task("RULER", total=len(job.lengths) * len(job.tasks) * len(job.plans) * job.samples)
        for step in run(job):
            bar.update(shown, description=step.text or None, advance=step.samples)
            measured += step.measured
            if step.row is not None:
                rows.append(step.row)
        bar.update(shown, description="RULER evaluated")
    if not measured:
        say_nothing_measured(len(rows))
    return rows


def _show(rows: list[RulerRow]) -> None:
    methods = list(dict.fromkeys(row.method for row in rows))
    for length in sorted({row.length for row in rows}):
        shown = table(f"RULER at {counted(length, 'token')}", "task", *methods, right=tuple(methods))
        cells = {(row.task, row.method): row for row in rows if row.length == length}
        tasks = list(dict.fromkeys(task for task, _ in cells))
        for task in tasks:
            shown.add_row(task, *(_cell(cells.get((task, method))) for method in methods))
        shown.add_section()
        shown.add_row(f"mean of {len(tasks)}", *(_mean([cells.get((task, method)) for task in tasks]) for method in methods))
        console().print(shown)
    say_failures(rows)


def _cell(row: RulerRow | None) -> str:
    if row is None:
        return ""
    return row.status.replace("_", " ") if row.score is None else f"{row.score:.1f}"


def _mean(rows: list[RulerRow | None]) -> str:
    scores = [row.score for row in rows if row is not None and row.score is not None]
    return f"{sum(scores) / len(scores):.1f}" if len(scores) == len(rows) else ""
