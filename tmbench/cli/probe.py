"""``tmbench probe``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tmbench.cli import options as o
from tmbench.cli.attention import NO_ATTENTION, Attention, plans_for, with_attention
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.measuring import measure, opened, print_measured
from tmbench.cli.planning import check_plan, show_plan
from tmbench.cli.screen import console, say, say_failures, table
from tmbench.methods.layers import ACCURACY_BUDGET, Budget, Rule, layers_text, propose
from tmbench.methods.table import DEFAULT_METHODS
from tmbench.results.variants import labels
from tmbench.results.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tmbench.measure.probe import ProbeSpec
    from tmbench.results.rows import LossRow, ProbeRow

TINY_LENGTHS = (4096,)
LENGTHS = (32768,)
TASKS = ("vt",)
SAMPLES = 4
PROPOSAL = "Proposal of layers"
WINDOW_OF = "tri_mix"
"""The method whose first keys, window and last queries a probe's sections are."""

ProbeMethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method", metavar="METHOD", help="With --loss, a method; repeat for several.", rich_help_panel=o.MEASURED,
        show_default=" ".join(DEFAULT_METHODS),
    ),
]  # fmt: skip


@with_checkpoint()
@with_attention(without=("dense_backend", "attn_native"))
def probe(
    loss: Annotated[
        bool,
        typer.Option("--loss", help="Measure each method's loss in and after prompts instead.", rich_help_panel=o.MEASURED),
    ] = False,
    method: ProbeMethodOption = None,
    length: o.LengthOption = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "--prompt",
            metavar="TASK",
            help="kv (key-value retrieval), a RULER task, random, or text:FILE for a text of your own; repeat for the mean "
            "over several.",
            rich_help_panel=o.MEASURED,
            show_default=" ".join(TASKS),
        ),
    ] = None,
    prompt_file: o.PromptFileOption = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts per task.", rich_help_panel=o.MEASURED)] = SAMPLES,
    chunk: o.ChunkOption = None,
    prompt_length: o.UnlistedPromptLengthOption = None,
    ask_later: o.AskLaterOption = False,
    seed: o.SeedOption = 42,
    model: o.ModelOption = "tiny",
    weights: o.WeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    checkpoint: Checkpoint = AS_IT_IS,
    dtype: o.DtypeOption = None,
    executor: o.ExecutorOption = None,
    workers: o.WorkersOption = None,
    address: o.AddressOption = None,
    attention: Attention = NO_ATTENTION,
    derivative: Annotated[
        Literal["logits", "probabilities"] | None,
        typer.Option(
            help="What a proposal and a plot go by: the derivative before or after the softmax.",
            rich_help_panel=PROPOSAL,
            show_default="logits",
        ),
    ] = None,
    rule: Annotated[
        Literal["rank", "depth"] | None,
        typer.Option(
            help="Triangle layers by rank, wherever they are, or all from a depth on.",
            rich_help_panel=PROPOSAL,
            show_default="rank",
        ),
    ] = None,
    accuracy_budget: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="How much of the middle sections' gradient may be lost.",
            rich_help_panel=PROPOSAL,
            show_default=f"{ACCURACY_BUDGET:g}",
        ),
    ] = None,
    time_budget: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="How much of dense attention's pairs may be computed instead.", rich_help_panel=PROPOSAL
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the layers' gradients into this PNG file.", rich_help_panel=o.OUTPUT)
    ] = None,
    output_dir: o.OutputDirOption = o.RESULTS,
    overwrite: o.OverwriteOption = False,
    shard: o.ShardOption = None,
    as_json: o.JsonOption = False,
    plan: o.PlanOption = False,
) -> None:
    """Which layers need the middle of the attention matrix: gradients by section, and a proposal for --layers.

    The prompts' answers are known; what is differentiated is the logit of the answer's first token.

    A further option, as in tmbench ttft: --prompt-length.
    """
    if loss:
        proposal: dict[str, Any] = {"derivative": derivative, "rule": rule, "plot": plot}
        proposal |= {"accuracy-budget": accuracy_budget, "time-budget": time_budget}
        o.refuse(proposal, "has no meaning with --loss")
    else:
        other = {"patterns": attention.parameters.get("patterns")}
        other |= {attention.choice.removeprefix("--"): attention.choice or None}
        o.refuse(
            {"method": method, "chunk": chunk, "ask-later": ask_later, **other},
            "needs --loss, as a probe is of dense attention",
        )
    chunks = o.chunks_of(chunk, prompt_length)
    o.check_plot(plot)
    check_plan(plan, as_json)
    part = o.shard_of(shard, overwrite)
    if part is not None:
        o.refuse({"plot": plot}, "needs the samples of all shards, and this is one of them")
    methods = list(method or DEFAULT_METHODS)
    budget = Budget(ACCURACY_BUDGET if (accuracy_budget, time_budget) == (None, None) else accuracy_budget, time_budget)
    chosen = attention.once().specs(methods if loss else [WINDOW_OF])

    from tmbench.measure.loss import LossSpec
    from tmbench.measure.probe import ProbeSpec
    from tmbench.measure.spec import ModelSource, place, prefill_kind
    from tmbench_kernels import Triangle

    tasks = o.prompts_of(task or (), prompt_file, "--task") or list(TASKS)
    source = ModelSource(model, weights, device, dtype, **checkpoint.given)
    where, loaded = opened(source, executor, workers, address, plan_only=plan)
    wanted = o.lengths_of(tasks[0], loaded, answered=True) or (TINY_LENGTHS if model == "tiny" else LENGTHS)
    lengths = o.lengths_for(loaded, length, wanted, longest_first=where.elsewhere)
    common: dict[str, Any] = {
        **where.ask(place),
        "lengths": lengths,
        "tasks": tasks,
        "samples": samples,
        "root": output_dir,
        "seed": seed,
        "overwrite": overwrite,
        "shard": part,
    }
    if loss:
        common |= {"prefill": where.ask(partial(prefill_kind, chunks=chunks, ask_later=ask_later))}
        common |= {"chunks": chunks, "ask_later": ask_later}
        losses = LossSpec(**common, plans=plans_for(chosen, attention, where, loaded, lengths, output_dir))
        if plan:
            show_plan(losses, loaded, workers)
            return
        print_measured(losses, measure(losses, where), _show_losses, as_json=as_json)
        return
    choice: dict[str, Any] = {"derivative": derivative or "logits", "rule": rule or "rank"}
    spec = ProbeSpec(**common, budget=budget, window=Triangle(**chosen[0].values), **choice)
    if plan:
        show_plan(spec, loaded, workers)
        return
    rows = measure(spec, where)
    if plot is not None:
        _draw(spec, plot, rows)
    print_measured(spec, rows, partial(_show_lengths, spec), as_json=as_json)


def _draw(spec: ProbeSpec, plot: Path, rows: Sequence[ProbeRow]) -> None:
    """A picture for each length that was probed."""
    from tmbench.report.pictures import save
    from tmbench.report.probe_plot import probe_figure
    from tmbench.results.files import writable

    for length in spec.lengths:
        here = [row for row in rows if row.length == length]
        if here[0].status == "ok":
            path = plot if len(spec.lengths) == 1 else plot.with_stem(f"{plot.stem}-{length}")
            with writable(path, "--plot"):
                save(probe_figure(here, spec.derivative), path)
            say(f"drew {path}")


def _show_lengths(spec: ProbeSpec, rows: Sequence[ProbeRow]) -> None:
    for length in spec.lengths:
        _show([row for row in rows if row.length == length], spec)


def _show(rows: list[ProbeRow], spec: ProbeSpec) -> None:
    """The layers of one length, and what each rule proposes under the budget."""

    first = rows[0]
    title = f"Mean gradient by section, {first.task} at {first.length} tokens, {counted(first.samples, 'sample')} a task"
    if first.status != "ok":
        say(f"{title}: {first.status.replace('_', ' ')}, {first.error}")
        return
    layers = [row for row in rows if row.head is None]
    shown = table(
        title, "layer", *(figures := ("streaming", "middle", "last", "share of middle")), "triangle", right=figures
    )
    numbers = [row.layer for row in layers if row.layer is not None]
    middle = [float(getattr(row, f"middle_{spec.derivative}")) for row in layers]
    whole = sum(middle)
    for row, own in zip(layers, middle, strict=True):
        values = (getattr(row, f"{section}_{spec.derivative}") for section in ("streaming", "middle", "last"))
        texts = ["" if value is None else f"{value:.3g}" for value in values]
        # Of the last layer one row alone matters, none of it in the middle: it may be the only one of full attention.
        share = f"{own / whole:.1%}" if whole else ""
        shown.add_row(str(row.layer), *texts, share, "yes" if row.triangle else "")
    console().print(shown)
    title = f"Triangle layers under a{'n' * (spec.budget.time is None)} {spec.budget}"
    costs = ("middle lost", "pairs computed")
    shown = table(title, "rule", "--layers", *costs, "stored", right=costs)
    rules: tuple[Rule, ...] = ("rank", "depth")
    for rule in rules:
        assert first.kept_share is not None
        found = propose(middle, first.kept_share, spec.budget, rule)
        stored = "yes, for --layers auto" if rule == spec.rule else ""
        chosen = layers_text((numbers[place] for place in found.layers), max(numbers) + 1)
        shown.add_row(rule, chosen, f"{found.lost:.1%}", f"{found.pairs:.1%}", stored)
    console().print(shown)
    assert first.answered is not None
    assert first.probability_mean is not None
    say(
        f"the model's likeliest next token is the true one in {first.answered:.0%} of the prompts (mean probability "
        f"{first.probability_mean:.2g}): what it does not know, a probe cannot tell how it finds"
    )


def _show_losses(rows: Sequence[LossRow]) -> None:
    figures = ("in the prompt", "vs dense", "after it", "vs dense ", "first token", "vs dense  ")
    called = labels(rows)
    for length, task in dict.fromkeys((row.length, row.task) for row in rows):
        here = [(row, name) for row, name in zip(rows, called, strict=True) if (row.length, row.task) == (length, task)]
        first, _ = here[0]
        title = f"Negative log-likelihood, nats a token: {task} at {length} tokens, {counted(first.samples, 'sample')}"
        shown = table(title + first.fed, "method", *figures, right=figures)
        for row, name in here:
            if row.nll_prompt is None:
                shown.add_row(name, row.status.replace("_", " "))
                continue
            texts = []
            for figure in ("nll_prompt", "nll_answer", "nll_first"):
                apart = getattr(row, f"{figure}_vs_dense")
                texts += [f"{getattr(row, figure):.4f}", "" if apart is None else f"{apart:+.4f}"]
            shown.add_row(name, *texts)
        console().print(shown)
    say_failures(rows)
