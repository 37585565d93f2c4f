"""``tmbench sweep``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tmbench.cli import options as o
from tmbench.cli import ruler as r
from tmbench.cli.screen import console, progress_bar, say, say_failures, say_nothing_measured, table
from tmbench.errors import UserError
from tmbench.results.words import counted

if TYPE_CHECKING:
    from tmbench.measure.sweep import SweepJob
    from tmbench.results.rows import Row

TINY_LENGTHS = (4096,)
LENGTHS = (32768,)


def sweep(
    method: Annotated[
        str, typer.Option(help="A method with a triangle; parameters may follow its name.", rich_help_panel=o.MEASURED)
    ] = "tri_mix",
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            "--starting-layer",
            metavar="LAYERS",
            help="Layers with triangle attention, as tmbench ttft takes them; random:4 draws four. Repeat for several.",
            rich_help_panel=o.ATTENTION,
            show_default="from the published one on, else from half the depth",
        ),
    ] = None,
    n_init: Annotated[
        list[int] | None,
        typer.Option(help="First keys that all see; repeat for several.", rich_help_panel=o.ATTENTION, show_default="8"),
    ] = None,
    n_local: Annotated[
        list[int] | None,
        typer.Option(help="Local window; repeat for several.", rich_help_panel=o.ATTENTION, show_default="512"),
    ] = None,
    last_n: Annotated[
        list[int] | None,
        typer.Option(
            help="Last queries, which see all keys; repeat for several.", rich_help_panel=o.ATTENTION, show_default="128"
        ),
    ] = None,
    same_cost: Annotated[
        bool,
        typer.Option(
            "--same-cost",
            rich_help_panel=o.ATTENTION,
            help="Measure each also without last queries, its window wider so that it computes as many pairs.",
        ),
    ] = False,
    length: o.LengthOption = None,
    task: r.TaskOption = None,
    samples: r.SamplesOption = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats.", rich_help_panel=o.MEASURED)] = 3,
    seed: o.SeedOption = 42,
    model: o.ModelOption = "tiny",
    weights: o.WeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    compiled: o.CompileOption = None,
    data_dir: r.DataDirOption = None,
    wording: r.WordingOption = None,
    samples_as: r.SamplesAsOption = "tmbench",
    apply_chat_template: r.ChatOption = False,
    chat_template_kwargs: r.ChatKwargsOption = None,
    offline: r.OfflineOption = False,
    output_dir: o.OutputDirOption = o.RESULTS,
    dry_run: o.DryRunOption = False,
) -> None:
    """Ablations: every combination of the given values of a method's triangle, timed and asked, with dense beside them.

    Rows go where tmbench ttft and tmbench ruler put theirs, and what is there already is not measured again. The report
    shows accuracy kept against time saved, and what each single change does.
    """
    from tmbench.engine.prefill import kind_wanted
    from tmbench.measure.ruler import RulerJob
    from tmbench.measure.sweep import SweepJob, swept_method, variants
    from tmbench.measure.ttft import TtftJob
    from tmbench.models import loading
    from tmbench.results import environment

    chosen, own = swept_method(method)
    where = [o.deep_layers([text]) | {"results": output_dir} for text in layers or ()]
    settings = variants(where, n_init or (), n_local or (), last_n or (), own)
    tasks = r.tasks_for(task)
    chat_kwargs = r.chat_kwargs_of(chat_template_kwargs, apply_chat_template)
    loading.check_has_tokenizer(model, "RULER")
    texts = r.wording_for(wording)
    sources = r.sources_for(tasks, data_dir, offline, samples_as)
    loaded = loading.load(model, weights=weights, device=device, dtype=dtype, plan_only=dry_run)
    lengths = o.lengths_for(loaded, length, TINY_LENGTHS if model == "tiny" else LENGTHS)
    tokenizer = loaded.need_tokenizer("RULER")
    chat = r.chat_for(tokenizer, chat_kwargs)
    here = environment.current(loaded.device)
    prefill = kind_wanted(loaded.model, loaded.device, compiled, planned=dry_run)
    job = SweepJob(
        method=chosen,
        settings=settings,
        ttft=TtftJob(loaded, (), lengths, here, output_dir, repeats=repeats, seed=seed, prefill=prefill),
        ruler=RulerJob(
            loaded=loaded,
            tokenizer=tokenizer,
            plans=(),
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
            samples_as=samples_as,
        ),
        lengths=lengths,
        controls=same_cost,
    )
    job.ruler.check_lengths()
    for tokens in lengths:
        if len(job.plans(tokens)) < 3:
            raise UserError(
                "a sweep needs at least two variants: give --layers, --n-init, --n-local or --last-n several times"
            )
    deep = job.plans(lengths[0])[1]
    if deep.starting_layer_source == "half the depth":
        say(f"no starting layer is published for {loaded.name}, so triangle attention starts at half its depth")
    if dry_run:
        _show_plan(job)
        return
    environment.write_record(output_dir, here)
    failed = _measure(job)
    _show(job)
    say_failures(failed)
    if failed:
        raise typer.Exit(1)


def _measure(job: SweepJob) -> list[Row]:
    """Measure what is missing, length by length, times first; the rows that were made and have no figures."""
    from tmbench.measure import ruler, ttft
    from tmbench.results.row_sets import finish
    from tmbench.results.rows import TtftRow

    finish(job.ttft.root, TtftRow, job.ttft.environment.device)
    rows: list[Row] = []
    measured = asked = 0
    with progress_bar() as bar:
        for length in job.lengths:
            timing, asking = job.timing(length), job.asking(length)
            shown = bar.add_task(f"times at {length}", total=timing.work() if timing else 0)
            for step in ttft.run(timing) if timing else ():
                bar.update(shown, description=step.text or None, advance=step.work)
                rows += [step.row] if step.row is not None else []
                measured += 1
            bar.update(shown, description=f"timed at {length}")
            shown = bar.add_task(f"RULER at {length}", total=len(asking.tasks) * len(asking.plans) * asking.samples)
            for answer in ruler.run(asking):
                bar.update(shown, description=answer.text or None, advance=answer.samples)
                rows += [answer.row] if answer.row is not None else []
                measured += answer.measured
            bar.update(shown, description=f"asked at {length}")
            asked += len(asking.plans) * (1 + len(asking.tasks))
    if not measured:
        say_nothing_measured(asked, "tmbench ttft and tmbench ruler measure again with --overwrite")
    return [row for row in rows if row.status != "ok"]


def _show_plan(job: SweepJob) -> None:
    for length in job.lengths:
        timing = job.timing(length)
        pending = [] if timing is None else timing.plans
        dense = job.plans(length)[0]
        shown = table(f"A sweep at {length} tokens", "method", "parameters", "operations", "time", right=("operations",))
        for plan in job.plans(length):
            part = job.ttft.expected_flop(plan, length) / job.ttft.expected_flop(dense, length)
            parameters = ", ".join(f"{name} {value}" for name, value in plan.parameters.items())
            shown.add_row(plan.method, parameters, f"{part:.1%}", "to measure" if plan in pending else "measured before")
        console().print(shown)
        asked = f"{counted(len(job.ruler.tasks), 'task')} of {counted(job.ruler.samples, 'sample')} each"
        console().print(f"and {asked}; samples that were answered before are not asked again", highlight=False)


def _show(job: SweepJob) -> None:
    """What of the report is about this sweep."""
    from tmbench.report.groups import interval_text
    from tmbench.report.rendering import build
    from tmbench.report.tradeoff import saved_text

    loaded, here = job.ttft.loaded, job.ttft.environment
    about = {**loaded.row_fields(), "device": here.device, "threads": here.threads, "seed": job.ttft.seed}
    about |= {"prefill": job.ttft.prefill, "wording": job.ruler.wording.name}
    about |= {"chat_template": job.ruler.chat_template, "chat_template_kwargs": job.ruler.chat_template_kwargs}
    found = [
        group
        for group in build(job.ttft.root).trade_offs
        if group.setting["length"] in job.lengths and all(group.setting[name] == value for name, value in about.items())
    ]
    for group in found:
        shown = table(f"Against dense at {group.setting['length']} tokens", "method", "time saved", "points", "in words")
        for row in group.rows:
            points = interval_text(row["difference"], row["difference_low"], row["difference_high"])
            front = ", on the front" * row["front"]
            shown.add_row(row["label"], saved_text(row), points, f"{row['verdict']}{front}")
        console().print(shown)
        shown = table("What one change does", "from, to", "elsewhere", "time", "points", "in words")
        for one in group.effects:
            points = interval_text(one.points.mean, one.points.low, one.points.high)
            change = f"{one.parameter}: {one.before} to {one.after}"
            shown.add_row(change, one.elsewhere, one.time, points, one.points.verdict)
        console().print(shown)
    if not found:
        say("no variant was both timed and asked beside dense: nothing to show")
