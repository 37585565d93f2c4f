"""``tmbench ruler`` and ``tmbench ruler-data``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ruler_tasks.errors import DatasetError, SourceError, WordingError
from tmbench.cli import asking
from tmbench.cli import options as o
from tmbench.cli.attention import NO_ATTENTION, Attention, with_attention
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.planning import check_plan
from tmbench.cli.progress import progress_bar
from tmbench.cli.screen import console, say
from tmbench.errors import UserError
from tmbench.methods.table import DEFAULT_METHODS
from tmbench.results.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.progress import Progress, TaskID

    from ruler_tasks import Example, SamplesAs
    from tmbench.suites.ruler import Ruler

SEED = 42
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task", metavar="TASK", help="A RULER task; repeat for several.", rich_help_panel=o.MEASURED, show_default="all 13"
    ),
]
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


@with_checkpoint()
@with_attention(hidden=("dense_backend", "attn_native", "patterns", "n_init", "n_local"))
def ruler(
    method: o.MethodOption = None,
    length: o.LengthOption = None,
    task: TaskOption = None,
    samples: asking.SamplesOption = 20,
    chunk: o.ChunkOption = None,
    prompt_length: o.UnlistedPromptLengthOption = None,
    ask_later: o.AskLaterOption = False,
    questions: Annotated[
        int,
        typer.Option(min=1, help="How many are asked of each context, where it has more keys.", rich_help_panel=o.SERVED),
    ] = 1,
    seed: o.SeedOption = SEED,
    model: o.ModelOption = "tiny",
    weights: asking.UnlistedWeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    checkpoint: Checkpoint = AS_IT_IS,
    dtype: o.DtypeOption = None,
    batch_size: o.BatchSizeOption = None,
    context_parallel: o.ContextParallelOption = False,
    executor: o.ExecutorOption = None,
    workers: o.WorkersOption = None,
    address: o.AddressOption = None,
    attention: Attention = NO_ATTENTION,
    data: Annotated[
        Path | None, typer.Option(help="A data set that the reference RULER prepared.", rich_help_panel=o.PROMPTS)
    ] = None,
    data_dir: DataDirOption = None,
    wording: WordingOption = None,
    samples_as: SamplesAsOption = "tmbench",
    apply_chat_template: asking.ChatOption = False,
    chat_template_kwargs: asking.ChatKwargsOption = None,
    offline: OfflineOption = False,
    output_dir: o.OutputDirOption = o.RESULTS,
    overwrite: o.OverwriteOption = False,
    shard: o.ShardOption = None,
    save_samples: asking.SaveSamplesOption = False,
    as_json: o.JsonOption = False,
    plan: o.PlanOption = False,
) -> None:
    """Accuracy on the 13 RULER tasks. All methods answer the same samples, and every prediction is kept.

    A length is the whole budget: prompt, special tokens and answer.

    Further options, as in tmbench ttft: --weights, --prompt-length, --n-init, --n-local, --patterns, --dense-backend and
    --attn-native.
    """
    check_plan(plan, as_json)
    methods = list(method or DEFAULT_METHODS)
    chosen = attention.once().specs(methods)
    chunks = o.chunks_of(chunk, prompt_length, attention.native)
    o.check_ask_later(ask_later, attention.native)
    if questions > 1:
        o.refuse({"data": data}, "has one question for each sample, and does not go with --questions")
    if ask_later:
        o.refuse({"data": data}, "has samples that do not say where their questions begin, as --ask-later needs to know")
    tasks = tasks_for(task)
    part = o.shard_of(shard, overwrite)
    if data is not None and not length:
        raise UserError("--data needs --length: the length that its samples were prepared for")
    if data is not None:
        making = {"wording": wording, "data-dir": data_dir, "offline": offline}
        making |= {"apply-chat-template": apply_chat_template, "chat-template-kwargs": chat_template_kwargs}
        making |= {"samples-as": None if samples_as == "tmbench" else samples_as, "seed": seed != SEED}
        o.refuse(making, "does not go with --data, whose samples are asked as they are")

    from tmbench.measure.spec import ModelSource
    from tmbench.models import loading

    if not plan:
        loading.check_has_tokenizer(model, "RULER")
    chat = asking.chat_text(chat_template_kwargs, apply_chat_template)
    asking.ask(
        suite_for(tasks, wording, data_dir, offline, samples_as, chat, data),
        tasks,
        ModelSource(model, weights, device, dtype, context_parallel, **checkpoint.given),
        asking.Where(executor, workers, address),
        chosen,
        attention,
        length,
        output_dir,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        chunks=chunks,
        ask_later=ask_later,
        questions=questions,
        overwrite=overwrite,
        save_samples=save_samples,
        shard=part,
        as_json=as_json,
        plan=plan,
    )


@with_checkpoint(without=("rope_scaling",))
def ruler_data(
    output: Annotated[Path, typer.Option(help="Folder to write to.", rich_help_panel=o.OUTPUT)],
    length: Annotated[list[int] | None, o.length_option("4K for tiny, else 128K")] = None,
    task: TaskOption = None,
    samples: asking.SamplesOption = 500,
    seed: o.SeedOption = SEED,
    model: Annotated[str, typer.Option(help="Whose tokenizer counts: tiny, a Hugging Face id or a folder.")] = "tiny",
    checkpoint: Checkpoint = AS_IT_IS,
    data_dir: DataDirOption = None,
    wording: WordingOption = None,
    samples_as: SamplesAsOption = "tmbench",
    apply_chat_template: asking.ChatOption = False,
    chat_template_kwargs: asking.ChatKwargsOption = None,
    offline: OfflineOption = False,
) -> None:
    """Write RULER samples in the published format, <output>/<length>/data/<task>/validation.jsonl, and evaluate nothing."""
    tasks = tasks_for(task)

    from ruler_tasks import write_dataset
    from tmbench.models import loading
    from tmbench.models.gguf import joined

    chat = asking.chat_text(chat_template_kwargs, apply_chat_template)
    suite = suite_for(tasks, wording, data_dir, offline, samples_as, chat)
    tokenizer = loading.load_tokenizer(
        joined(model, checkpoint.gguf_file), loading.Reading(checkpoint.revision, checkpoint.trust_remote_code)
    )
    asking.say_notes(suite, tokenizer)
    lengths = list(dict.fromkeys(length or asking.lengths_of(model)))
    suite.check(tasks, lengths, samples, seed, tokenizer)
    with progress_bar() as bar:
        shown = bar.add_task("RULER data", total=sum(lengths) * len(tasks) * samples)
        for tokens in lengths:
            for name in tasks:
                bar.update(shown, description=f"{name} at {tokens}")
                examples = suite.examples(name, tokens, range(samples), seed, tokenizer)
                with o.naming("--output", DatasetError):
                    write_dataset(output / str(tokens) / "data", _advance(bar, shown, tokens, examples))
        bar.update(shown, description="RULER data written")
    console().print(f"{counted(len(lengths) * len(tasks), 'file')} under {output}", highlight=False)


def tasks_for(names: list[str] | None) -> list[str]:
    """The tasks of ``--task``, each once, or all; raises UserError for one that there is none of."""
    from ruler_tasks import TASKS

    for name in names or ():
        if name not in TASKS:
            raise UserError(f"--task {name} is unknown: choose from {', '.join(TASKS)}")
    return list(dict.fromkeys(names or TASKS))


def suite_for(
    tasks: list[str],
    wording: str | None,
    data_dir: Path | None,
    offline: bool,
    samples_as: SamplesAs,
    chat: str | None,
    data: Path | None = None,
) -> Ruler:
    """RULER as the options say, its texts loaded before anything is measured; says what stands in for what is not there.

    Raises UserError for a wording or a source that cannot be found or used.
    """
    import logging

    from ruler_tasks import TASKS
    from ruler_tasks.published import sentences_by
    from tmbench.suites.ruler import Ruler

    # The notes are printed here; without a handler of its own the package would print them once more.
    logging.getLogger("ruler_tasks").addHandler(logging.NullHandler())
    made = Ruler(
        wording=wording,
        data_dir=data_dir,
        offline=offline,
        samples_as=samples_as,
        chat_template_kwargs=chat,
        data=data,
    )
    needs = dict.fromkeys(need for task in tasks for need in TASKS[task].needs) if data is None else {}
    with o.naming("--wording", WordingError):
        _ = made.texts
    with o.naming("--data-dir", SourceError):
        for kind in needs:
            getattr(made.sources, kind)()
        notes = made.sources.notes
    for note in notes:
        say(note)
    if samples_as == "reference" and "essays" in needs and (missing := sentences_by()[1]):
        say(missing)
    return made


def _advance(bar: Progress, shown: TaskID, work: int, examples: Iterable[Example]) -> Iterator[Example]:
    for example in examples:
        yield example
        bar.update(shown, advance=work)
