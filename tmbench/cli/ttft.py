"""``tmbench ttft``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from tmbench.cli import options as o
from tmbench.cli.attention import NO_ATTENTION, Attention, plans_for, with_attention
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.measuring import measure, opened, print_measured
from tmbench.cli.planning import check_plan, show_plan
from tmbench.cli.screen import console, say, say_failures, table
from tmbench.errors import UserError
from tmbench.methods.table import DEFAULT_METHODS
from tmbench.results.variants import dense_of, identity, labels
from tmbench.results.words import batched, counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tmbench.results.rows import TtftRow

TINY_LENGTHS = (2048, 4096, 8192, 16384)
LENGTHS = (32768, 65536, 131072)
MOST_PROMPTS = 1024
"""Of a batch: far more than any device holds of a length worth timing, and few enough to be made."""
QUESTION_TOKENS = 64
"""Of a question that is asked later."""
NOTICEABLE = 1.0
"""Seconds of compilation from which on they are told."""


@with_checkpoint()
@with_attention()
def ttft(
    method: o.MethodOption = None,
    length: o.LengthOption = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=MOST_PROMPTS,
            help="How many different prompts of a length are read together; repeat for several.",
            rich_help_panel=o.MEASURED,
            show_default="1",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats.", rich_help_panel=o.MEASURED)] = 3,
    warmup: Annotated[int, typer.Option(min=1, help="Untimed passes before.", rich_help_panel=o.MEASURED)] = 1,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="kv (key-value retrieval), a RULER task, random, or text:FILE for a text of your own.",
            rich_help_panel=o.MEASURED,
            show_default="kv, or random for a model without a tokenizer",
        ),
    ] = None,
    prompt_file: o.PromptFileOption = None,
    chunk: o.ChunkOption = None,
    prompt_length: o.PromptLengthOption = None,
    ask_later: o.AskLaterOption = False,
    question_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --ask-later, how many of a prompt's last tokens are the question, which alone is timed.",
            rich_help_panel=o.SERVED,
            show_default=str(QUESTION_TOKENS),
        ),
    ] = None,
    beside_one_piece: Annotated[
        bool,
        typer.Option(
            "--beside-one-piece", help="Time every method in one piece too, in the same rounds.", rich_help_panel=o.SERVED
        ),
    ] = False,
    seed: o.SeedOption = 42,
    model: o.ModelOption = "tiny",
    weights: o.WeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    checkpoint: Checkpoint = AS_IT_IS,
    dtype: o.DtypeOption = None,
    executor: Annotated[str | None, typer.Option(hidden=True)] = None,
    context_parallel: o.ContextParallelOption = False,
    compiled: o.CompileOption = None,
    attention: Attention = NO_ATTENTION,
    output_dir: o.OutputDirOption = o.RESULTS,
    overwrite: o.OverwriteOption = False,
    as_json: o.JsonOption = False,
    plan: o.PlanOption = False,
) -> None:
    """Time from token ids on the device to the first new token on the host, with the cache filled for decoding.

    Of a batch it is the time to every prompt's first token. With --ask-later it is that of a second turn: from a question's
    token ids to its first new token, over the kept cache of what the method read before. Each length is warmed up, then all
    methods are interleaved. Rows that are there already are not measured again.
    """
    check_plan(plan, as_json)
    if executor is not None:
        raise UserError(
            "--executor does not go with ttft, whose methods are interleaved on one device with nothing beside them: "
            "leave it out, and to use several GPUs start tmbench ttft once for each length"
        )
    methods = list(method or DEFAULT_METHODS)
    chosen = attention.once().specs(methods)
    chunks = o.chunks_of(chunk, prompt_length, attention.native)
    o.check_ask_later(ask_later, attention.native)
    if not ask_later:
        o.refuse({"question-tokens": question_tokens}, "is about questions that are asked later and needs --ask-later")
    if chunks is None and not ask_later:
        o.refuse(
            {"beside-one-piece": beside_one_piece}, "holds other prompts against one piece and needs --chunk or --ask-later"
        )

    from tmbench.measure.spec import ModelSource, place, prefill_kind
    from tmbench.measure.ttft import TtftSpec

    asked = next(iter(o.prompts_of([prompt] if prompt is not None else [], prompt_file)), None)
    source = ModelSource(model, weights, device, dtype, context_parallel, **checkpoint.given)
    where, loaded = opened(source, plan_only=plan)
    wanted = o.lengths_of(asked, loaded) or (TINY_LENGTHS if model == "tiny" else LENGTHS)
    lengths = o.lengths_for(loaded, length, wanted)
    spec = TtftSpec(
        **where.ask(place),
        root=output_dir,
        plans=plans_for(chosen, attention, where, loaded, lengths, output_dir),
        lengths=lengths,
        batch_sizes=tuple(dict.fromkeys(batch_size or [1])),
        prompt=asked or ("kv" if loaded.tokenizer is not None else "random"),
        repeats=repeats,
        warmup=warmup,
        seed=seed,
        overwrite=overwrite,
        prefill=where.ask(partial(prefill_kind, compiled=compiled, chunks=chunks, ask_later=ask_later)),
        chunks=chunks,
        ask_later=ask_later,
        question_tokens=(question_tokens or QUESTION_TOKENS) * ask_later,
        beside_one_piece=beside_one_piece,
    )
    if plan:
        show_plan(spec, loaded)
        return
    order = [identity(one) for one in spec.plans]
    rows = sorted(measure(spec, where), key=lambda row: (row.length, row.batch_size, row.fed, order.index(identity(row))))
    print_measured(spec, rows, _show, as_json=as_json)


def _show(rows: Sequence[TtftRow]) -> None:
    from tmbench.report.slower_kernels import slower_than_dense
    from tmbench.report.time_intervals import interleaved
    from tmbench.report.ttft import NOT_INTERLEAVED, SLOWER_KERNEL
    from tmbench.report.words import SKIPPED

    called = dict(zip(map(identity, rows), labels(rows), strict=True))
    figures = ("seconds", "vs dense", "density", "TTFT / roofline", "logit error")
    for length, batch_size, fed in sorted({(row.length, row.batch_size, row.fed) for row in rows}):
        here = [row for row in rows if (row.length, row.batch_size, row.fed) == (length, batch_size, fed)]
        timed = [row for row in here if row.ttft_median_s is not None]
        dense = dense_of(timed)
        some_skip = any(row.skipped_share is not None for row in timed)
        names = figures + (SKIPPED,) * some_skip + ("tokens/s",) * (batch_size > 1)
        slower = {id(row): slower_than_dense(row.backends, dense.backends if dense else "") for row in timed}
        columns = names + (SLOWER_KERNEL,) * any(slower.values())
        about = f"Time to first token of {batched(batch_size)}{counted(length, 'token')}{fed}"
        shown = table(about, "method", *columns, right=names)
        for row in here:
            # A row without a time has no figures to stand beside.
            told = _figures(row, dense, skipped=some_skip)
            shown.add_row(called[identity(row)], *told, *filter(None, [slower.get(id(row))]))
        console().print(shown)
        apart = [called[identity(row)] for row in timed if dense and not interleaved(row, dense)]
        if apart:
            say(f"{NOT_INTERLEAVED}: {', '.join(apart)}; --overwrite measures them together")
    say_failures(rows)
    longest = max((row.compile_s or 0.0 for row in rows), default=0.0)
    if longest >= NOTICEABLE:
        say(f"not counted: the first warm-up took up to {longest:.1f} s longer, to compile and to load kernels")


def _figures(row: TtftRow, dense: TtftRow | None, *, skipped: bool) -> list[str]:
    if row.ttft_median_s is None:
        return [row.status.replace("_", " ")]
    compared = dense is not None and row is not dense
    return [
        f"{row.ttft_median_s:.3f}",
        _against(row, dense) if dense is not None and compared else "",
        f"{row.coverage:.3f}",
        f"{row.ttft_over_floor:.2f}",
        "" if row.logit_error is None or not compared else f"{row.logit_error:.1e}",
        *["" if row.skipped_share is None else f"{row.skipped_share:.3f}"] * skipped,
        *[f"{row.tokens_per_second:,.0f}"] * (row.batch_size > 1),
    ]


def _against(row: TtftRow, dense: TtftRow) -> str:
    """The time against dense's in the same rounds; rows of other runs say no more than that they are."""
    from tmbench.report.time_intervals import APART, NO_DIFFERENCE, TimeDifference, compare_rows

    found = compare_rows(row, dense)
    if isinstance(found, TimeDifference):
        ends = f"{found.low:+.0f} to {found.high:+.0f}"
        return f"{NO_DIFFERENCE} ({ends} %)" if found.verdict == NO_DIFFERENCE else f"{found.percent:+.0f} % ({ends})"
    assert row.ttft_median_s is not None
    assert dense.ttft_median_s is not None
    return found if found == APART else f"{row.ttft_median_s / dense.ttft_median_s - 1:+.0%}, {found}".replace("%,", " %,")
