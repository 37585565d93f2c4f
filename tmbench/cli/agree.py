"""``tmbench agree``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from tmbench.cli import options as o
from tmbench.cli.attention import NO_ATTENTION, Attention, plans_for, with_attention
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.measuring import measure, opened, print_measured
from tmbench.cli.planning import check_plan, show_plan
from tmbench.cli.screen import console, say_failures, table
from tmbench.errors import UserError
from tmbench.methods.spec import parse_method
from tmbench.methods.table import DEFAULT_METHODS
from tmbench.results.variants import DENSE, dense_of, labels
from tmbench.results.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tmbench.results.rows import AgreeRow

TINY_LENGTHS = (4096,)
LENGTHS = (32768,)


@with_checkpoint()
@with_attention()
def agree(
    method: o.MethodOption = None,
    length: o.LengthOption = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.", rich_help_panel=o.MEASURED)] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Prompts.", rich_help_panel=o.MEASURED)] = 20,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="kv, a RULER task, random, or text:FILE for a text of your own.",
            rich_help_panel=o.MEASURED,
            show_default="kv",
        ),
    ] = None,
    prompt_file: o.PromptFileOption = None,
    chunk: o.ChunkOption = None,
    prompt_length: o.PromptLengthOption = None,
    ask_later: o.AskLaterOption = False,
    seed: o.SeedOption = 42,
    model: o.ModelOption = "tiny",
    weights: o.WeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    checkpoint: Checkpoint = AS_IT_IS,
    dtype: o.DtypeOption = None,
    batch_size: o.BatchSizeOption = None,
    context_parallel: o.ContextParallelOption = False,
    executor: o.ExecutorOption = None,
    workers: o.WorkersOption = None,
    address: o.AddressOption = None,
    attention: Attention = NO_ATTENTION,
    output_dir: o.OutputDirOption = o.RESULTS,
    overwrite: o.OverwriteOption = False,
    shard: o.ShardOption = None,
    as_json: o.JsonOption = False,
    plan: o.PlanOption = False,
) -> None:
    """How long greedy decoding stays with dense's, and how often the next token is dense's along a long answer.

    A length is the prompt's; the answer comes on top. Dense is always measured: it writes the answers.
    """
    check_plan(plan, as_json)
    methods = list(method or DEFAULT_METHODS)
    if all(parse_method(text)[0].name != DENSE for text in methods):
        methods.insert(0, DENSE)
    chosen = attention.once().specs(methods)
    chunks = o.chunks_of(chunk, prompt_length, attention.native)
    o.check_ask_later(ask_later, attention.native)
    if len(chosen) == 1 and not attention.native:
        raise UserError("--method dense alone has nothing to agree with: add another --method, such as tri_mix")
    part = o.shard_of(shard, overwrite)

    from tmbench.measure.agree import AgreeSpec
    from tmbench.measure.spec import ModelSource, place, prefill_kind

    (asked,) = o.prompts_of([prompt] if prompt is not None else [], prompt_file) or ["kv"]
    source = ModelSource(model, weights, device, dtype, context_parallel, **checkpoint.given)
    where, loaded = opened(source, executor, workers, address, plan_only=plan)
    wanted = o.lengths_of(asked, loaded) or (TINY_LENGTHS if model == "tiny" else LENGTHS)
    lengths = o.lengths_for(loaded, length, wanted, longest_first=where.elsewhere)
    plans = plans_for(chosen, attention, where, loaded, lengths, output_dir)
    dense = dense_of(plans)
    spec = AgreeSpec(
        **where.ask(place),
        root=output_dir,
        plans=sorted(plans, key=lambda plan: plan is not dense),
        lengths=lengths,
        prompt=asked,
        samples=samples,
        new_tokens=new_tokens,
        batch_size=batch_size,
        seed=seed,
        prefill=where.ask(partial(prefill_kind, chunks=chunks, ask_later=ask_later)),
        chunks=chunks,
        ask_later=ask_later,
        overwrite=overwrite,
        shard=part,
    )
    if plan:
        show_plan(spec, loaded, workers)
        return
    print_measured(spec, measure(spec, where), _show, as_json=as_json)


def _show(rows: Sequence[AgreeRow]) -> None:
    figures = ("same token", "first difference, median", "never differs")
    for length in sorted({row.length for row in rows}):
        shown = table(
            f"Token agreement with dense after {counted(length, 'token')}{rows[0].fed}",
            "method",
            *figures,
            "samples",
            right=figures,
        )
        here = [(row, label) for row, label in zip(rows, labels(rows), strict=True) if row.length == length]
        dense = dense_of([row for row, _ in here])
        for row, label in here:
            if row is not dense:
                shown.add_row(label, *_cells(row), str(row.samples))
        console().print(shown)
    say_failures(rows)


def _cells(row: AgreeRow) -> list[str]:
    if row.agreement is None:
        return [row.status.replace("_", " "), "", ""]
    return [f"{row.agreement:.1%}", f"{row.divergence_median:g} of {row.new_tokens}", f"{row.identical:.0%}"]
