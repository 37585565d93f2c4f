"""``tmbench tune``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tmbench.cli import options as o
from tmbench.cli.attention import NO_ATTENTION, Attention, with_attention
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.measuring import measure, opened, print_measured
from tmbench.cli.planning import check_plan, show_plan
from tmbench.cli.screen import console, say, say_failures, table
from tmbench.errors import UserError
from tmbench.methods.layers import ACCURACY_BUDGET, AUTO, Budget, Rule, middle_of, probe_rows, propose
from tmbench.methods.plan import ModelShape, default_layers
from tmbench.results.words import counted

if TYPE_CHECKING:
    from tmbench.measure.tune import Choice
    from tmbench.results.rows import ProbeRow
    from tmbench.results.tune_rows import TuneRow

TINY_LENGTHS = (2048,)
LENGTHS = (32768,)
TASKS = ("niah_multikey_2", "vt")
CAP = 10
"""How many times the margin a prompt counts for at most, unless that is said."""
SEARCH, COMPARED = "The search", "Comparison"


@with_checkpoint()
@with_attention(without=("layers", "starting_layer", "dense_backend", "attn_native"))
def tune(
    method: Annotated[
        str,
        typer.Option(
            help="A method with a deep pattern, whose layers are chosen; parameters may follow its name.",
            rich_help_panel=o.MEASURED,
        ),
    ] = "tri_mix",
    length: o.LengthOption = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "--prompt",
            metavar="TASK",
            help="kv, a RULER task, random, or text:FILE for a text of your own; repeat for several.",
            rich_help_panel=o.MEASURED,
            show_default=" ".join(TASKS),
        ),
    ] = None,
    prompt_file: o.PromptFileOption = None,
    margin: Annotated[
        float,
        typer.Option(help="Loss in nats per token of the answer that counts as none.", rich_help_panel=SEARCH),
    ] = 0.05,
    cap: Annotated[
        float | None,
        typer.Option(
            help="A prompt's loss counts for no more than this.", rich_help_panel=SEARCH, show_default=f"{CAP} margins"
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option(help="That the chosen layers lose less than the margin.", rich_help_panel=SEARCH)
    ] = 0.95,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv",
            help="Whose order the layers are tried in: a CSV of tmbench probe, auto, or none for the deepest first.",
            rich_help_panel=SEARCH,
            show_default="auto where there is one",
        ),
    ] = None,
    budget_prefills: Annotated[
        int, typer.Option(min=1, help="Prompts that search and check may read.", rich_help_panel=SEARCH)
    ] = 400,
    budget_minutes: Annotated[
        float | None,
        typer.Option(
            help="How long these may take, of all workers together.", rich_help_panel=SEARCH, show_default="no limit"
        ),
    ] = None,
    random: Annotated[
        int, typer.Option(min=0, help="Random sets of the same size to compare with.", rich_help_panel=COMPARED)
    ] = 4,
    compared: Annotated[
        int,
        typer.Option("--compared-prompts", min=2, help="Prompts that all sets are compared on.", rich_help_panel=COMPARED),
    ] = 32,
    held_out_task: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out-task",
            metavar="TASK",
            help="Compare also on this task, which is not searched on; repeat for several.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    held_out_length: Annotated[
        list[int] | None,
        typer.Option(
            "--held-out-length",
            parser=o.parse_length,
            metavar="TOKENS",
            help="And at this length; repeat for several.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
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
    output: Annotated[
        Path | None,
        typer.Option(help="Write the chosen layers into this CSV file, for --layers.", rich_help_panel=o.OUTPUT),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the search into this PNG file.", rich_help_panel=o.OUTPUT)] = None,
    output_dir: o.OutputDirOption = o.RESULTS,
    as_json: o.JsonOption = False,
    plan: o.PlanOption = False,
) -> None:
    """Which layers can do without the middle of attention, by measuring: as many as lose less than a margin.

    The loss of known answers is measured with sets of layers and held against dense attention's. A check on fresh prompts
    makes sure of the chosen set, with the confidence asked for. The set is then compared with rules and random sets.
    """
    o.check_plot(plot)
    check_plan(plan, as_json)
    if output is not None and output.suffix.lower() != ".csv":
        raise UserError(f"--output {output} must be the name of a CSV file, which --layers takes: let it end in .csv")
    (chosen,) = attention.specs([method])
    if chosen.method.deep is None:
        raise UserError(f"--method {chosen.method.name} has no deep pattern whose layers could be chosen: give tri_mix")

    from tmbench.measure.spec import ModelSource, place, prefill_kind
    from tmbench.measure.tune import Limits, TuneSpec

    limits = Limits(margin, CAP * margin if cap is None else cap, confidence)
    tasks = o.prompts_of(task or (), prompt_file, "--task") or list(TASKS)
    source = ModelSource(model, weights, device, dtype, **checkpoint.given)
    where, loaded = opened(source, executor, workers, address, plan_only=plan)
    wanted = o.lengths_of(tasks[0], loaded, answered=True) or (TINY_LENGTHS if model == "tiny" else LENGTHS)
    lengths = o.lengths_for(loaded, length, wanted)
    for tokens in held_out_length or ():
        loaded.check_length(tokens)
    found = _probe(probe, loaded.shape, output_dir)
    order, order_source, rules = _candidates(found, loaded.shape)
    say(f"layers are tried in the order of {order_source}")
    spec = TuneSpec(
        **where.ask(place),
        root=output_dir,
        seed=seed,
        prefill=where.ask(prefill_kind),
        method=chosen.method.name,
        values=chosen.values,
        tasks=tasks,
        lengths=lengths,
        limits=limits,
        order=order,
        order_source=order_source,
        rules=rules,
        random=random,
        compared=compared,
        budget=budget_prefills,
        minutes=budget_minutes,
        held_tasks=o.prompts_of(held_out_task or (), None, "--held-out-task"),
        held_lengths=list(dict.fromkeys(held_out_length or ())),
    )
    spec.check(loaded)
    if plan:
        show_plan(spec, loaded, workers)
        return
    rows = measure(spec, where, _nothing)
    _keep(rows, output)
    if plot is not None:
        _draw(rows, plot)
    print_measured(spec, rows, _show, as_json=as_json)


def _nothing(rows: int) -> None:
    say(f"nothing was measured: all of it is there already, in {counted(rows, 'row')}")


def _probe(text: str | None, shape: ModelShape, results: Path) -> list[ProbeRow]:
    """The rows that say what each layer needs; none without a probe. Raises UserError for one that is not there."""
    if text == "none":
        return []
    if text is not None:
        return probe_rows(text, shape, results, option="--probe")
    try:
        return probe_rows(AUTO, shape, results, option="--probe")
    except UserError:
        say(f"there is no probe of {shape.name} under {results}, so the deepest layers come first; tmbench probe makes one")
        return []


def _candidates(probe: Sequence[ProbeRow], shape: ModelShape) -> tuple[list[int], str, list[Choice]]:
    """The order of the layers that are tried, where it is from, and the sets of fixed rules to compare with."""
    from tmbench.measure.tune import Choice

    # Of the last layer a prefill computes one position: a pattern saves nothing there.
    worth = [layer for layer in shape.full if layer != shape.layers - 1]
    half = default_layers(shape)
    rules = [Choice(half.source, half.layers)]
    if not probe:
        return list(reversed(worth)), "depth, the deepest first", rules
    middle, first = middle_of(probe), probe[0]
    budget = Budget(ACCURACY_BUDGET)
    named: tuple[Rule, ...] = ("rank", "depth")
    for rule in named:
        assert first.kept_share is not None
        proposal = propose([middle[layer] for layer in shape.full], first.kept_share, budget, rule)
        rules.append(Choice(f"probe, {rule}", tuple(shape.full[place] for place in proposal.layers)))
    order = sorted(worth, key=lambda layer: (middle[layer], -layer))
    return order, f"the probe of {first.task} at {first.length}", rules


def _keep(rows: Sequence[TuneRow], output: Path | None) -> None:
    """Write the chosen set where the user wants it, and say what takes it."""
    from tmbench.results.files import writable, write_whole
    from tmbench.results.tables import csv_text
    from tmbench.results.tune_rows import CHECK, TuneRow

    found = [row for row in rows if row.stage == CHECK and row.chosen]
    if not found:
        if output is not None:
            say(f"{output} was not written: no set of layers was chosen")
        return
    if output is not None:
        with writable(output, "--output"):
            write_whole(output, csv_text(TuneRow, found))
        say(f"--layers {output} takes the chosen layers")


def _draw(rows: Sequence[TuneRow], plot: Path) -> None:
    from tmbench.report.pictures import save
    from tmbench.report.tune import shows
    from tmbench.report.tune_plot import tune_figure
    from tmbench.results.files import writable

    section = _section(rows)
    if shows(section):
        with writable(plot, "--plot"):
            save(tune_figure(section), plot)
        say(f"drew {plot}")


def _section(rows: Sequence[TuneRow]) -> Any:
    from tmbench.report.comparable import comparable
    from tmbench.report.settings import TuneSetting
    from tmbench.report.tune import tune_section

    ((setting, placed),) = comparable(rows, TuneSetting.of)
    return tune_section(setting, placed)


def _show(rows: Sequence[TuneRow]) -> None:
    section = _section(rows)
    for one in section.tables():
        if one.rows:
            right = tuple(column.name for column in one.columns if not column.text)
            shown = table(one.caption.rstrip(":"), *(column.name for column in one.columns), right=right)
            for line in one.rows:
                shown.add_row(*line)
            console().print(shown)
    for words in section.conclusions():
        console().print(words, highlight=False, soft_wrap=True)
    say_failures(rows)
