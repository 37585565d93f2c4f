"""Cells and sections as mappings of names to values, for the writers of CSV and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import singledispatch

from tmbench.report.agreement import AgreeCell, AgreeSection, served_agreements
from tmbench.report.comparable import contents
from tmbench.report.differences import verdict_of
from tmbench.report.effects import Effect
from tmbench.report.intervals import Difference
from tmbench.report.lm_eval import LmEvalCell
from tmbench.report.loss import LossCell, LossDifference, LossSection, served_losses
from tmbench.report.probe import DERIVATIVES, ProbeCell, ProbeSection, SectionGradients
from tmbench.report.report import AnySection
from tmbench.report.ruler import RulerCell, RulerSection, served_scores
from tmbench.report.section import Cell
from tmbench.report.settings import Setting
from tmbench.report.time_intervals import TimeDifference
from tmbench.report.tradeoff import TradeOff, TradeOffCell
from tmbench.report.ttft import TtftCell, TtftSection, served_times
from tmbench.report.tune import TuneCell, TuneSection
from tmbench.results.rows import OK, PREPARED, Row
from tmbench.results.suite_rows import SUITE_ROWS
from tmbench.results.variants import pattern_settings

Record = dict[str, object]
LOSSES = ("prompt", "answer", "first")
SECTIONS = tuple(field.name for field in fields(SectionGradients))
SCORES = "score nulls prompt_tokens_mean seconds_per_sample coverage skipped_share difference difference_low difference_high"
FIGURES: Mapping[str, tuple[str, ...]] = {
    kind: tuple(names.split())
    for kind, names in {
        "ttft": "ttft_median_s ttft_min_s ttft_max_s coverage skipped_share ttft_over_floor logit_error peak_memory_bytes "
        "tokens_per_second",
        "ruler": SCORES,
        **{kind.kind: SCORES for kind in SUITE_ROWS},
        "trade-off": "saved_percent saved_low saved_high difference difference_low difference_high coverage ttft_median_s",
        "lm_eval": "value prompt_tokens_mean seconds_per_sample coverage difference difference_low difference_high "
        "nats_vs_dense nats_vs_dense_low nats_vs_dense_high",
        "agree": "agreement agreement_low agreement_high divergence_median divergence_least identical seconds_per_sample",
        "loss": " ".join(
            (
                "nll_prompt nll_answer nll_first",
                *(f"nll_{part}_vs_dense{end}" for part in LOSSES for end in ("", "_low", "_high")),
            )
        ),
        "tune": "capped_vs_dense capped_low_vs_dense capped_high_vs_dense nll_answer_vs_dense nll_answer nll_answer_dense "
        "capped_share time_vs_dense prefills measured_s",
        "probe": " ".join(
            (
                *(f"{part}_{measure}{sign}" for measure in DERIVATIVES for sign in ("", "_signed") for part in SECTIONS),
                "kept_share lost_share pairs_share probability_mean answered seconds_per_sample",
            )
        ),
    }.items()
}
"""The columns that hold figures; the first of each kind is compared with dense."""


def records(section: AnySection) -> list[Record]:
    """The cells of a section, each with the columns of its row and what follows from it."""
    older = {name: value for name, value in asdict(section.setting).items() if name.startswith("older_")}
    return [_record(cell, older) for cell in section.cells]


def average_records(section: RulerSection) -> list[Record]:
    """The average differences of a section as records like those of its cells, for the long form."""
    first = {cell.label: cell for cell in reversed(section.cells)}
    found = []
    for label, each in section.average_differences.items():
        if isinstance(each, Difference):
            cell = first[label]
            shared: Record = {"kind": cell.row.kind, **_setting(section.setting), "device_name": cell.row.device_name}
            shared |= {
                "label": label,
                "method": cell.row.method,
                "parameters": cell.parameters,
                **pattern_settings(cell.row),
            }
            place = {"task": f"average of {len(section.paired_tasks)}", "status": OK}
            found.append(shared | place | difference_record(each))
    return found


@singledispatch
def summary(section: AnySection) -> Record:
    """What follows from the cells of a section together."""
    return {}


@summary.register
def _(section: TtftSection) -> Record:
    # Break-even lengths in tokens, null where there is none.
    return {"break_even_length": {label: section.break_even(label)[0] for label in section.labels if label != "dense"}}


@summary.register
def _(section: RulerSection) -> Record:
    return {
        "averages": section.averages,
        "average_over": section.common_tasks,
        "average_differences": {name: difference_record(found) for name, found in section.average_differences.items()},
        "differences_over": section.paired_tasks,
        "margin": section.answers.margin,
        "coverages": section.densities,
    }


@summary.register
def _(section: TradeOff) -> Record:
    # The Pareto front, fastest last, and the effects of single parameters.
    return {
        "front": [cell.label for cell in section.cells if cell.front],
        "effects": [_effect(one) for one in section.effects],
    }


@summary.register
def _(section: ProbeSection) -> Record:
    # The layers proposed for triangle attention, and what decided.
    return {"proposed": list(section.proposed), "proposal": section.proposal}


@summary.register
def _(section: TuneSection) -> Record:
    # The layers that the check accepted, and what follows from the trials, in words.
    return {"chosen": section.chosen and section.chosen.layers, "conclusions": section.conclusions()}


@singledispatch
def served_records(section: AnySection) -> list[Record]:
    """What is set against the same method in one piece, one for each figure of what was fed otherwise."""
    return []


@served_records.register
def _(section: TtftSection) -> list[Record]:
    return [
        {"label": one.label, "read": one.read, "length": one.length, "ttft_median_s": one.then.seconds}
        | {"ttft_median_s_in_one_piece": one.whole.seconds, **time_record(one.against), "percent": one.percent}
        for one in served_times(section)
    ]


@served_records.register
def _(section: RulerSection) -> list[Record]:
    return [
        {"label": one.label, "read": one.read, "tasks": one.tasks, "score": one.score, "score_in_one_piece": one.whole}
        | difference_record(one.difference)
        for one in served_scores(section)
    ]


@served_records.register
def _(section: AgreeSection) -> list[Record]:
    return [
        {"label": one.label, "read": one.read, "length": one.length, "agreement": one.then.figure}
        | {"agreement_in_one_piece": one.whole.figure, **difference_record(one.difference)}
        for one in served_agreements(section)
    ]


@served_records.register
def _(section: LossSection) -> list[Record]:
    return [
        {"label": one.label, "read": one.read, "task": one.cell.row.task, "length": one.cell.row.length}
        | _against(one.parts, "in_one_piece")
        for one in served_losses(section)
    ]


def section_record(section: AnySection) -> Record:
    """A section whole: its setting, what follows from its cells, its notes and its cells."""
    return {
        "setting": _setting(section.setting),
        **summary(section),
        "served": served_records(section),
        "notes": section.notes(),
        "rows": records(section),
    }


def difference_record(found: Difference | str) -> Record:
    """A difference as columns: empty but for the reason in ``verdict`` where there is none."""
    known = found if isinstance(found, Difference) else None
    return {
        "difference": known and known.mean,
        "difference_low": known and known.low,
        "difference_high": known and known.high,
        "pairs": known and known.pairs,
        "differing": known and known.differing,
        "samples_needed": known and known.needed,
        "verdict": verdict_of(found),
    }


def time_record(found: TimeDifference | str) -> Record:
    """The interval of a change of a time as columns, in percent: empty but for the reason where there is none."""
    known = found if isinstance(found, TimeDifference) else None
    return {
        "time_low": known and known.low,
        "time_high": known and known.high,
        "time_verdict": known.verdict if known else found,
    }


def _setting(setting: Setting) -> Record:
    return asdict(setting)


def _record(cell: Cell[Row], older: Record) -> Record:
    row = cell.row
    record: Record = {"kind": row.kind, **vars(row), **row.settings}
    if isinstance(cell, RulerCell):
        record["wording_version"] = "" if cell.row.wording == PREPARED else cell.row.wording_hash
    record |= {"data": contents(row), "parameters": cell.parameters, **older, "label": cell.label}
    return record | _derived(cell)


@singledispatch
def _derived(cell: Cell[Row]) -> Record:
    """What follows from a cell, by the names of the columns."""
    raise TypeError(f"{type(cell).__name__} has no columns of its own")


@_derived.register
def _(cell: TtftCell) -> Record:
    return {
        "percent_vs_dense": cell.percent_vs_dense,
        "percent_low": cell.percent_low,
        "percent_high": cell.percent_high,
        "time_verdict": cell.verdict,
        "slower_kernel": cell.slower_kernel,
        "tokens_per_second": cell.tokens_per_second,
    }


@_derived.register
def _(cell: RulerCell) -> Record:
    return {"percent_vs_dense": cell.percent_vs_dense, **difference_record(cell.difference)}


@_derived.register
def _(cell: LmEvalCell) -> Record:
    return {
        "percent_vs_dense": cell.percent_vs_dense,
        **difference_record(cell.difference),
        "nats_vs_dense": cell.nats and cell.nats.mean,
        "nats_vs_dense_low": cell.nats and cell.nats.low,
        "nats_vs_dense_high": cell.nats and cell.nats.high,
    }


@_derived.register
def _(cell: AgreeCell) -> Record:
    return {
        "percent_vs_dense": cell.percent_vs_dense,
        "agreement_low": cell.agreement_low,
        "agreement_high": cell.agreement_high,
        "divergence_least": cell.earliest,
    }


@_derived.register
def _(cell: TradeOffCell) -> Record:
    return {
        "kind": "trade-off",
        # Only the newest prompts and data are joined.
        "older_prompt": 0,
        # What is compared with dense here is what is saved.
        **dict.fromkeys(("percent_vs_dense", "percent_low", "percent_high")),
        "time_verdict": cell.time.verdict,
        **difference_record(cell.difference),
        "saved_percent": cell.saved_percent,
        "saved_low": cell.saved_low,
        "saved_high": cell.saved_high,
        "apart": cell.apart,
        "front": cell.front,
    }


@_derived.register
def _(cell: LossCell) -> Record:
    return _against((cell.prompt, cell.answer, cell.first), "dense")


def _against(parts: Sequence[LossDifference | None], other: str) -> Record:
    """Differences of the losses of a prompt, its answer and its first token, against what ``other`` names."""
    found: Record = {}
    for part, difference in zip(LOSSES, parts, strict=True):
        found[f"nll_{part}_vs_{other}"] = difference and difference.mean
        found[f"nll_{part}_vs_{other}_low"] = difference and difference.low
        found[f"nll_{part}_vs_{other}_high"] = difference and difference.high
    return found


@_derived.register
def _(cell: ProbeCell) -> Record:
    return {}


@_derived.register
def _(cell: TuneCell) -> Record:
    return {"layers_tried": cell.layers}


def _effect(one: Effect) -> Record:
    return {
        "parameter": one.parameter,
        "from": one.before,
        "to": one.after,
        "elsewhere": one.elsewhere,
        "time_percent": one.time_percent,
        **time_record(one.times),
        **difference_record(one.points),
    }
