"""``tmbench lm-eval``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tmbench.cli import options as o
from tmbench.cli.asking import ChatOption
from tmbench.cli.attention import NO_ATTENTION, Attention, plans_for, with_attention
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.measuring import measure, opened, print_measured
from tmbench.cli.screen import console, say, say_failures, table
from tmbench.errors import UserError, shortened
from tmbench.methods.table import DEFAULT_METHODS
from tmbench.results.variants import labels
from tmbench.results.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tmbench.results.lm_eval_rows import LmEvalRow

ANY_LENGTH = 2048
"""Of a model that nothing limits, as the harness has it."""


@with_checkpoint()
@with_attention(hidden=("dense_backend", "attn_native"))
def lm_eval(
    method: o.MethodOption = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Tasks, groups or tags of lm-eval; repeat, or separate by commas.",
            rich_help_panel=o.MEASURED, show_default=False,
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Documents of each task, or below 1 the part of them.", rich_help_panel=o.MEASURED,
            show_default="all",
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length", parser=o.parse_length, metavar="TOKENS", rich_help_panel=o.MEASURED,
            help="The most tokens of a prompt and its answer; what is longer loses its beginning. Repeat for several.",
            show_default="what the model has positions for",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0, help="Examples in front of each question.", rich_help_panel=o.PROMPTS, show_default="as the task has it"
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="A folder with tasks of your own, in YAML files.", rich_help_panel=o.PROMPTS),
    ] = None,
    apply_chat_template: ChatOption = False,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--no-fewshot-as-multiturn", help="Give examples as turns of a conversation.",
            rich_help_panel=o.PROMPTS, show_default="with --apply-chat-template",
        ),
    ] = None,
    system_instruction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Put before each prompt.", rich_help_panel=o.PROMPTS)
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=VALUE,...", help="In place of the task's own options of generation.", rich_help_panel=o.PROMPTS,
            show_default="as the task has it",
        ),
    ] = None,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="Allow tasks that run what the model writes.", rich_help_panel=o.PROMPTS
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the choice of examples.", rich_help_panel=o.MEASURED)
    ] = 1234,
    chunk: o.ChunkOption = None,
    prompt_length: o.PromptLengthOption = None,
    model: o.ModelOption = "tiny",
    weights: o.WeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    checkpoint: Checkpoint = AS_IT_IS,
    dtype: o.DtypeOption = None,
    batch_size: o.BatchSizeOption = None,
    executor: o.ExecutorOption = None,
    workers: o.WorkersOption = None,
    address: o.AddressOption = None,
    attention: Attention = NO_ATTENTION,
    output_dir: o.OutputDirOption = o.RESULTS,
    overwrite: o.OverwriteOption = False,
    as_json: o.JsonOption = False,
) -> None:  # fmt: skip
    """Tasks of EleutherAI's lm-evaluation-harness under every method, scored by the harness itself.

    All methods answer the same requests. Needs the extra reference: pip install 'tmbench\\[reference]'.

    Further options, as in tmbench ttft: --dense-backend and --attn-native.
    """
    names = [name for text in tasks or () for name in text.split(",") if name]
    if not names:
        raise UserError("--tasks names no task: give one, such as --tasks longbench2")
    _check_limit(limit)
    if fewshot_as_multiturn and not apply_chat_template:
        raise UserError("--fewshot-as-multiturn needs turns: add --apply-chat-template")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no folder: give one that holds the YAML files of tasks")
    chosen = attention.once().specs(list(method or DEFAULT_METHODS))
    chunks = o.chunks_of(chunk, prompt_length, attention.native)

    from tmbench.measure.harness import WHAT, LmEvalSpec
    from tmbench.measure.spec import ModelSource, place, prefill_kind
    from tmbench.models import loading
    from tmbench.suites.harness import Harness, check_installed

    check_installed()
    loading.check_has_tokenizer(model, WHAT)
    run, loaded = opened(ModelSource(model, weights, device, dtype, **checkpoint.given), executor, workers, address)
    longest = [loaded.longest] if loaded.longest else []
    lengths = o.lengths_for(loaded, length or longest, (ANY_LENGTH,), longest_first=run.elsewhere)
    spec = LmEvalSpec(
        **run.ask(place),
        root=output_dir,
        harness=Harness(
            include_path=None if include_path is None else str(include_path),
            num_fewshot=num_fewshot,
            limit=limit or "",
            apply_chat_template=apply_chat_template,
            # As lm-eval's own command line has it.
            fewshot_as_multiturn=apply_chat_template if fewshot_as_multiturn is None else fewshot_as_multiturn,
            system_instruction=system_instruction,
            gen_kwargs=gen_kwargs,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            seed=seed,
        ),
        tasks=list(dict.fromkeys(names)),
        plans=plans_for(chosen, attention, run, loaded, lengths, output_dir),
        lengths=lengths,
        batch_size=batch_size,
        seed=seed,
        prefill=run.ask(partial(prefill_kind, chunks=chunks)),
        chunks=chunks,
        overwrite=overwrite,
    )
    print_measured(spec, measure(spec, run), _show, as_json=as_json)


def _check_limit(text: str | None) -> None:
    try:
        number = float(text or 1)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf") or (number > 1 and number != int(number)):
        raise UserError(
            f"--limit {shortened(text or '')} is no number of documents: give for instance 100, or 0.1 for a tenth"
        )


def _show(rows: Sequence[LmEvalRow]) -> None:
    called = labels(rows)
    methods = list(dict.fromkeys(called))
    for length in sorted({row.length for row in rows}):
        title = f"lm-eval {rows[0].harness}, up to {counted(length, 'token')}{rows[0].fed}"
        shown = table(title, "task", "metric", "documents", *methods, right=("documents", *methods))
        here = [(row, name) for row, name in zip(rows, called, strict=True) if row.length == length]
        cells = {(row.task, row.measure, name): row for row, name in here}
        for task, metric in dict.fromkeys((task, metric) for task, metric, _ in cells):
            own = [cells.get((task, metric, name)) for name in methods]
            count = next(row.samples for row in own if row is not None)
            shown.add_row(task, metric, str(count), *(_cell(row) for row in own))
        console().print(shown)
    say_failures(rows)
    for row in {(row.task, row.length): row for row in rows if row.truncated}.values():
        many = f"{row.truncated} of {counted(row.requests, 'request')}"
        say(f"{row.task}: {many} lost their beginning at --length {row.length}")


def _cell(row: LmEvalRow | None) -> str:
    if row is None:
        return ""
    return row.shown or row.status.replace("_", " ")
