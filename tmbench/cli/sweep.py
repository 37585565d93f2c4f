"""``tmbench sweep``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tmbench.cli import asking
from tmbench.cli import options as o
from tmbench.cli import ruler as r
from tmbench.cli.attention import NO_ATTENTION, PANEL, Attention, with_attention
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.measuring import measure, opened, print_measured
from tmbench.cli.planning import check_plan, show_plan
from tmbench.cli.screen import console, say, say_failures, say_nothing_measured, table
from tmbench.errors import UserError
from tmbench.methods.plan import HALF, DeepLayers

if TYPE_CHECKING:
    from tmbench.measure.sweep import SweepSpec
    from tmbench.models.loading import LoadedModel

TINY_LENGTHS = (4096,)
LENGTHS = (32768,)


@with_checkpoint()
@with_attention(without=("patterns", "dense_backend", "attn_native"), repeated=True)
def sweep(
    method: Annotated[
        str, typer.Option(help="A method with a triangle; parameters may follow its name.", rich_help_panel=o.MEASURED)
    ] = "tri_mix",
    attention: Attention = NO_ATTENTION,
    same_cost: Annotated[
        bool,
        typer.Option(
            "--same-cost",
            rich_help_panel=PANEL,
            help="Measure each also without last queries, its window wider so that it computes as many pairs.",
        ),
    ] = False,
    length: o.LengthOption = None,
    task: r.TaskOption = None,
    samples: asking.SamplesOption = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats.", rich_help_panel=o.MEASURED)] = 3,
    seed: o.SeedOption = 42,
    model: o.ModelOption = "tiny",
    weights: o.WeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    checkpoint: Checkpoint = AS_IT_IS,
    dtype: o.DtypeOption = None,
    executor: o.ExecutorOption = None,
    workers: o.WorkersOption = None,
    address: o.AddressOption = None,
    compiled: o.CompileOption = None,
    batch_size: o.BatchSizeOption = None,
    data_dir: r.DataDirOption = None,
    wording: r.WordingOption = None,
    samples_as: r.SamplesAsOption = "tmbench",
    apply_chat_template: asking.ChatOption = False,
    chat_template_kwargs: asking.ChatKwargsOption = None,
    offline: r.OfflineOption = False,
    output_dir: o.OutputDirOption = o.RESULTS,
    shard: o.ShardOption = None,
    as_json: o.JsonOption = False,
    plan: o.PlanOption = False,
) -> None:
    """Ablations: every combination of the given values of a method's triangle, timed and asked, with dense beside them.

    Rows go where tmbench ttft and tmbench ruler put theirs, and what is there already is not measured again. The report
    shows accuracy kept against time saved, and what each single change does.
    """
    check_plan(plan, as_json)
    part = o.shard_of(shard)

    from tmbench.measure.accuracy import AccuracySpec
    from tmbench.measure.spec import ModelSource, place, prefill_kind
    from tmbench.measure.sweep import SweepSpec, swept_method, swept_plans, variants
    from tmbench.measure.ttft import TtftSpec
    from tmbench.models import loading

    several = variants(swept_method(method), attention.parameters)
    tasks = r.tasks_for(task)
    loading.check_has_tokenizer(model, "RULER")
    chat = asking.chat_text(chat_template_kwargs, apply_chat_template)
    suite = r.suite_for(tasks, wording, data_dir, offline, samples_as, chat)
    source = ModelSource(model, weights, device, dtype, **checkpoint.given)
    where, loaded = opened(source, executor, workers, address, plan_only=plan)
    lengths = o.lengths_for(loaded, length, TINY_LENGTHS if model == "tiny" else LENGTHS, longest_first=where.elsewhere)
    asking.say_notes(suite, loaded.need_tokenizer("RULER"))
    common: dict[str, Any] = {
        **where.ask(place),
        "root": output_dir,
        "seed": seed,
        "shard": part,
        "prefill": where.ask(partial(prefill_kind, compiled=compiled)),
    }
    half = common | {"plans": (), "lengths": ()}
    deep: list[DeepLayers | None] = [*attention.deep_layers(loaded, lengths, output_dir)]
    chosen = [replace(one, layers=layers) for layers in deep or [None] for one in several]
    spec = SweepSpec(
        **common,
        plans={tokens: swept_plans(chosen, loaded.shape, tokens, controls=same_cost) for tokens in lengths},
        ttft=TtftSpec(**half, repeats=repeats),
        accuracy=AccuracySpec(**half, suite=suite, tasks=tasks, samples=samples, batch_size=batch_size),
    )
    spec.check(loaded)
    if any(len(plans) < 3 for plans in spec.plans.values()):
        raise UserError("a sweep needs at least two variants: give --layers, --n-init, --n-local or --last-n several times")
    if spec.plans[lengths[0]][1].layers_source == HALF:
        say(f"no starting layer is published for {loaded.name}, so triangle attention starts at half its depth")
    if plan:
        show_plan(spec, loaded, workers)
        return
    rows = measure(spec, where, _nothing)
    if part is not None:
        say("a shard only asks, as times are interleaved: merge all shards, then run this without --shard")
    if part is not None or as_json:
        print_measured(spec, rows, say_failures, as_json=as_json)
        return
    _show(spec, loaded)
    say_failures(rows)
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(1)


def _nothing(rows: int) -> None:
    say_nothing_measured(rows, "tmbench ttft and tmbench ruler measure again with --overwrite")


def _show(spec: SweepSpec, loaded: LoadedModel) -> None:
    """What of the report is about this sweep."""
    from tmbench.report.report import build
    from tmbench.suites.ruler import Ruler

    here, suite = spec.environment, spec.accuracy.suite
    assert isinstance(suite, Ruler)
    about = {**loaded.row_fields(), "device": here.device, "threads": here.threads, "seed": spec.seed}
    about |= {"prefill": spec.ttft.prefill, "wording": suite.texts.name}
    about |= suite.chat_columns(loaded.need_tokenizer("RULER"))
    found = [
        section
        for section in build(spec.root).trade_offs
        if section.setting.length in spec.plans
        and all(getattr(section.setting, name) == value for name, value in about.items())
    ]
    for section in found:
        shown = table(f"Against dense at {section.setting.length} tokens", "method", "time saved", "points", "in words")
        for cell in section.cells:
            front = ", on the Pareto front" * cell.front
            shown.add_row(cell.label, cell.saved, cell.points, f"{cell.difference.words}{front}")
        console().print(shown)
        shown = table("What one change does", "from, to", "elsewhere", "time", "points", "in words")
        for one in section.effects:
            change = f"{one.parameter}: {one.before} to {one.after}"
            shown.add_row(change, one.elsewhere, one.time, one.points_text, one.points.words)
        console().print(shown)
    if not found:
        say("no variant was both timed and asked beside dense: nothing to show")
