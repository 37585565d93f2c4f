"""Rows that may be held against each other, one device, model and setting: their tables, and what must be said of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from ruler_tasks import TASKS
from tmbench.methods.table import METHODS, STATIC_PATTERNS
from tmbench.report.break_even import break_even
from tmbench.report.intervals import MARGIN, Difference, differences, intervals, unseen_samples
from tmbench.report.samples_as import drawing_notes, drawn_words
from tmbench.report.time_intervals import NO_DIFFERENCE, UNKNOWN_REPEATS, TimeDifference, compare_rows, in_turns
from tmbench.results.choices import Choices
from tmbench.results.parameters_text import parse_parameters
from tmbench.results.rows import FAILED, OK, OUT_OF_MEMORY, Row, RulerRow
from tmbench.results.sample_scores import Samples, mixture_notes
from tmbench.results.words import counted, length_name

MODEL = ("device", "model", "revision", "weights", "dtype", "model_hash")
SETTING = {
    "ttft": (*MODEL, "prompt", "prefill", "threads", "seed", "older_prompt"),
    "agree": (*MODEL, "prompt", "new_tokens", "threads", "seed", "older_prompt"),
    "ruler": (
        *MODEL,
        "length",
        "wording",
        "wording_version",
        "samples_as",
        "chat_template",
        "chat_template_kwargs",
        "threads",
        "seed",
        "older_data",
    ),
}
FIGURES = {
    kind: names.split()
    for kind, names in {
        "ttft": "ttft_median_s ttft_min_s ttft_max_s coverage ttft_over_floor logit_error peak_memory_bytes",
        "ruler": "score nulls prompt_tokens_mean seconds_per_sample coverage difference difference_low difference_high",
        "trade-off": "saved_percent saved_low saved_high difference difference_low difference_high coverage ttft_median_s",
        "agree": "agreement agreement_low agreement_high divergence_median divergence_least identical seconds_per_sample",
    }.items()
}
"""The columns that hold figures; the first of each kind is compared with dense."""
STATUS_WORDS = {OUT_OF_MEMORY: "out of memory", FAILED: "failed"}
STOOD_IN_FOR = {"qa_1": "SQuAD", "qa_2": "HotpotQA"}
NOTHING, FEW_REPEATS, FEW_SAMPLES = "-", 3, 20
NOT_IN_TURNS = "Not measured in turns with dense, so the machine may have changed in between"
MANY_METHODS = 7
"""Beyond so many methods a table or a plot of scores has a line for each of them, and a column for each task."""
NOT_COMPARED = "not compared: "
Record = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Rows that may be held against each other: they agree in ``setting`` and differ in method, and in length or task."""

    setting: Mapping[str, Any]
    rows: Sequence[Record]
    """The columns of the result files, and ``kind``, ``label``, ``parameters``, ``percent_vs_dense``; dense first. Those
    of a time also ``percent_low``, ``percent_high`` and ``time_verdict``: see ``tmbench.report.time_intervals``."""

    @property
    def labels(self) -> list[str]:
        """The methods, with the parameters that tell variants of one method apart."""
        return list(dict.fromkeys(row["label"] for row in self.rows))

    def measured(self, label: str | None = None) -> list[Record]:
        """The rows that came out well: of one label, shortest length or first task first, or of all."""
        well = [row for row in self.rows if row["status"] == OK and row[FIGURES[row["kind"]][0]] is not None]
        return [row for row in well if label in (None, row["label"])]

    @property
    def subject(self) -> str:
        """The model, in words."""
        about = self.setting
        revision = f" at {about['revision'][:8]}" if about["revision"] else ""
        contents = f" (files {about['model_hash'][:8]})" if about["model_hash"] else ""
        return f"{about['model']}{revision}{contents}, {about['weights']} weights, {about['dtype']}"

    @property
    def machine(self) -> str:
        """The CPU threads in words, where the device is a CPU."""
        return f"{counted(self.setting['threads'], 'CPU thread')}, " if self.setting["threads"] else ""

    def notes(self) -> list[str]:
        """What a reader must know before using the figures: sentences, only those that apply."""
        edited = sum(row["dirty"] for row in self.rows)
        rows = f"{edited} of {counted(len(self.rows), 'row')} {'comes' if edited == 1 else 'come'}"
        notes = [f"{rows} from an edited checkout: {'its' if edited == 1 else 'their'} commit does not say what ran."]
        return notes[: bool(edited)] + [
            f"{row['label']} failed at {row.get('task', length_name(row['length']))}: {row['error'] or 'reason unknown'}."
            for row in self.rows
            if row["status"] == FAILED
        ]


class TtftGroup(Group):
    """Times to first token of one model on one prompt."""

    @property
    def title(self) -> str:
        about = self.setting
        setting = f"prompt {about['prompt']}, {about['prefill']} prefill, {self.machine}seed {about['seed']}"
        return f"Time to first token: {self.subject}, {setting}{_older_prompt(about)}"

    def break_even(self, label: str) -> tuple[int | None, str]:
        """The shortest length from which on the method is faster than dense wherever they were timed in turns, in tokens
        and in words: see ``tmbench.report.break_even``."""
        return break_even({row["length"]: row["time_verdict"] for row in self.measured(label) if row["time_verdict"]})

    def summary(self) -> Record:
        """What follows from the rows together, for JSON: break-even lengths in tokens, null where there is none."""
        return {"break_even_length": {name: self.break_even(name)[0] for name in self.labels if name != "dense"}}

    def tables(self, fidelity: Callable[[TtftGroup, str], str]) -> dict[str, pd.DataFrame]:
        """Captions and tables of texts; ``fidelity`` says what the method of a label kept."""
        cells = [{"method": row["label"], "length": row["length"], "cell": _cell(row, significant)} for row in self.rows]
        times = pd.DataFrame(cells).pivot(index="method", columns="length", values="cell").reindex(self.labels)
        times.columns = pd.Index([length_name(int(length)) for length in times.columns])
        times["fidelity"] = ["the reference" if name == "dense" else fidelity(self, name) for name in self.labels]
        first = {row["label"]: row for row in reversed(self.rows) if row["method"] != "dense"}
        break_evens = [
            {"method": name, "faster than dense": self.break_even(name)[1], "parameters": _parameters(first[name], True)}
            for name in self.labels
            if name in first
        ]
        against = [
            {
                "method": row["label"],
                "length": length_name(row["length"]),
                "median": percent_text(row["percent_vs_dense"]),
                "95 % interval": f"{percent_text(row['percent_low'])} to {percent_text(row['percent_high'])}",
                "in words": row["time_verdict"],
            }
            for row in self.measured()
            if row["percent_low"] is not None
        ]
        details = [
            {
                "method": row["label"],
                "length": length_name(row["length"]),
                "min s": _text(row["ttft_min_s"], significant),
                "max s": _text(row["ttft_max_s"], significant),
                "repeats": row["repeats"],
                "coverage": _text(row["coverage"], ".1%"),
                "TTFT / floor": _text(row["ttft_over_floor"], ".3g"),
                "logit error": _text(row["logit_error"], ".2g"),
                "same first token": {True: "yes", False: "no"}.get(row["same_token_as_dense"], NOTHING),
                "backends": row["backends"],
            }
            for row in self.measured()
        ]
        peaks = [row["peak_memory_bytes"] for row in self.measured()]
        if any(peaks):
            for line, peak in zip(details, peaks, strict=True):
                line["peak GiB"] = _text(peak and peak / 2**30, ".1f")
        return {
            "Median seconds; in brackets the time against dense, the median over the rounds of turns, so less is faster:": (
                times.reset_index()
            ),
            "Break-even, the shortest prompt from which on a method is faster than dense at every length measured:": (
                pd.DataFrame(break_evens)
            ),
            "Time against dense in the same rounds of turns, and what it says:": pd.DataFrame(against),
            "Details:": pd.DataFrame(details),
        }

    def notes(self) -> list[str]:
        dense = {row["length"]: row for row in self.measured("dense")}
        rows = self.measured()
        apart = [row for row in rows if row["length"] in dense and not in_turns(row, dense[row["length"]])]
        few = [row for row in rows if row["repeats"] < FEW_REPEATS]
        random, structured = (self.setting["weights"] == drawn for drawn in ("random", "structured"))
        chosen = [row for row in rows if _chooses_by_the_data(row)]
        unknown = [row for row in rows if row["time_verdict"] == UNKNOWN_REPEATS]
        notes = {
            "The weights are random: methods that choose keys by the data cost more than on trained weights, and what they "
            "keep means nothing. These figures do not transfer to a trained model.": random and chosen,
            "The weights are random: the times of these methods do not depend on them, but what the methods keep does, so "
            "logit errors and first tokens say nothing about a trained model.": random and not chosen,
            "The weights are structured: drawn so that attention has local bands, slashes, sinks and columns. A method that "
            "chooses keys by the data costs what it would on trained weights only if its coverage would be the same; logit "
            "errors and first tokens say nothing about a trained model.": structured,
            "Dense has no time here, so there is nothing to compare with.": not dense,
            f"{NOT_IN_TURNS}: {_places(apart, rows)}.": apart,
            f"Fewer than {FEW_REPEATS} repeats, so the spread is hardly known: {_places(few, rows)}.": few,
            f"The single repeats are not in the rows, so what is faster is not known: {_places(unknown, rows)}.": unknown,
        }
        return [note for note, applies in notes.items() if applies] + super().notes()


def _chooses_by_the_data(row: Record) -> bool:
    """Whether a pattern that ran chooses its keys by the data."""
    return not {name.partition(":")[0] for name in str(row["backends"]).split("+")} <= {"", *STATIC_PATTERNS}


@dataclass(frozen=True)
class RulerGroup(Group):
    """RULER scores of one model at one length, under one wording and on one set of data.

    Its rows have ``difference``, ``difference_low``, ``difference_high`` (points against dense), ``pairs``, ``differing``,
    ``samples_needed`` and ``verdict`` too: see ``tmbench.report.intervals``.
    """

    samples: Mapping[tuple[str, str], Samples] = field(default_factory=dict)
    """What each (label, task) answered, sample by sample."""
    margin: float = MARGIN
    """The loss in points that nobody minds."""

    def __post_init__(self) -> None:
        others = [row for row in self.rows if row["label"] != "dense"]
        found = self._compared([self._pairs(row["label"], "dense", [row["task"]]) for row in others])
        for row in self.rows:
            row |= difference_fields("")
        for row, each in zip(others, found, strict=True):
            row |= difference_fields(each)

    def compare(self, label: str, reference: str, tasks: Sequence[str]) -> Difference | str:
        """The paired difference of two labels over tasks, in points; where a task cannot be compared, why."""
        (found,) = self._compared([self._pairs(label, reference, tasks)])
        return found

    def _compared(self, pairs: Sequence[list[list[float]] | str]) -> list[Difference | str]:
        """The differences of pairs over equally many tasks, all at once: that is many times faster than one by one."""
        known = iter(differences([each for each in pairs if not isinstance(each, str)], self.margin))
        return [each if isinstance(each, str) else next(known) for each in pairs]

    def _pairs(self, label: str, reference: str, tasks: Sequence[str]) -> list[list[float]] | str:
        """For each task the paired differences of two labels; where a task cannot be compared, why."""
        strata = []
        for task in tasks:
            answers = [self.samples.get((name, task)) or Samples(missing="not measured") for name in (label, reference)]
            for name, answer in zip((label, reference), answers, strict=True):
                if answer.missing:
                    return f"{name} on {task}: {answer.missing}"
            own, other = answers
            pairs = [index for index in own.scores if index in other.scores]
            if not pairs or not all(own.same(other, index) for index in pairs):
                return f"{label} and {reference} on {task}: they did not answer the same samples"
            strata.append([100 * (own.scores[index] - other.scores[index]) for index in pairs])
        return strata or "no task in common"

    @cached_property
    def paired_tasks(self) -> list[str]:
        """The tasks of the averages for which every sample of every method is known."""
        return [task for task in self.common_tasks if all(not self.samples[name, task].missing for name in self.labels)]

    @cached_property
    def average_differences(self) -> dict[str, Difference | str]:
        """Each label's paired difference to dense, averaged over ``paired_tasks``; where there is none, why."""
        others = [name for name in self.labels if name != "dense"]
        found = self._compared([self._pairs(name, "dense", self.paired_tasks) for name in others])
        return dict(zip(others, found, strict=True))

    def average_rows(self) -> list[Record]:
        """The average differences as records like ``rows``, for the long form."""
        found = {name: each for name, each in self.average_differences.items() if isinstance(each, Difference)}
        first = {row["label"]: row for row in reversed(self.rows)}
        names = parameter_names(self.rows)
        shared = ("kind", *MODEL, *SETTING["ruler"], "device_name", "label", "method", "parameters", *names)
        place = {"task": f"average of {len(self.paired_tasks)}", "status": OK}
        return [
            {key: first[name].get(key) for key in shared} | place | difference_fields(each) for name, each in found.items()
        ]

    @property
    def title(self) -> str:
        about = self.setting
        wording = f"wording {about['wording']} {about['wording_version']}".rstrip()
        setting = f"{wording}, {drawn_words(about)}{template_words(about)}, {self.machine}seed {about['seed']}"
        older = f", older data {about['older_data']}" if about["older_data"] else ""
        return f"RULER at {length_name(about['length'])}: {self.subject}, {setting}{older}"

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Scores (0 to 100) by task and label, in RULER's order; NaN where there is none."""
        table = pd.DataFrame(list(self.rows)).pivot(index="task", columns="label", values="score").astype(float)
        return table.reindex(index=[task for task in TASKS if task in table.index], columns=self.labels)

    @cached_property
    def common_tasks(self) -> list[str]:
        """The tasks that every label has a score for."""
        return list(self.scores.dropna().index)

    @cached_property
    def averages(self) -> dict[str, float]:
        """Each label's mean score over ``common_tasks``; empty where there are none."""
        return {str(label): float(mean) for label, mean in self.scores.dropna().mean().dropna().items()}

    @cached_property
    def coverages(self) -> dict[str, float]:
        """The part of the causal pairs that each label computed, averaged over its tasks; only where it was counted."""
        counted = {
            name: [row["coverage"] for row in self.measured(name) if row["coverage"] is not None] for name in self.labels
        }
        return {name: sum(parts) / len(parts) for name, parts in counted.items() if parts}

    def summary(self) -> Record:
        """What follows from the rows together, for JSON: averages, differences, the tasks that they are over, coverages."""
        differences = {name: difference_fields(found) for name, found in self.average_differences.items()}
        return {
            "averages": self.averages,
            "average_over": self.common_tasks,
            "average_differences": differences,
            "differences_over": self.paired_tasks,
            "margin": self.margin,
            "coverages": self.coverages,
        }

    def tables(self, fidelity: Callable[[TtftGroup, str], str]) -> dict[str, pd.DataFrame]:
        """Captions and tables of texts: scores by task and method with their averages, and the differences to dense."""
        texts = {(row["task"], row["label"]): _cell(row, lambda score: f"{round(score, 2):g}") for row in self.rows}
        counts = {task: sorted({row["samples"] for row in self.rows if row["task"] == task}) for task in self.scores.index}
        lines = [
            {"task": task, "samples": " / ".join(map(str, count)), **{name: texts.get((task, name)) for name in self.labels}}
            for task, count in counts.items()
        ]
        means = self.averages
        average = {name: f"{mean:.1f}" for name, mean in means.items()}
        average |= {n: f"{m:.1f} ({m - means['dense']:+.1f})" for n, m in means.items() if n != "dense" and "dense" in means}
        lines.append({"task": f"average of {len(self.common_tasks)}", "samples": "", **average})
        if coverages := self.coverages:
            lines.append({"task": "coverage", "samples": "", **{name: f"{part:.1%}" for name, part in coverages.items()}})
        scores = pd.DataFrame(lines)
        if len(self.labels) > MANY_METHODS:
            scores = scores.set_index("task")[[*self.labels, "samples"]].rename_axis(columns="method")
            scores = scores.T.reset_index().rename_axis(columns=None)
        return {"Scores from 0 to 100; in brackets points against dense:": scores, **self._difference_tables()}

    def _difference_tables(self) -> dict[str, pd.DataFrame]:
        """The differences to dense over the same samples: a line for each average, and one for each task that differs."""
        averages = [
            {"method": name, **_difference_line(difference_fields(found), 2)}
            for name, found in self.average_differences.items()
            if isinstance(found, Difference)
        ]
        differing = sorted((row for row in self.rows if row["differing"]), key=lambda row: list(TASKS).index(row["task"]))
        tasks = [{"task": row["task"], "method": row["label"], **_difference_line(row, 1)} for row in differing]
        over = f"average of {counted(len(self.paired_tasks), 'task')}"
        return {
            f"Points against dense over the same samples, {over}, and what they say for a margin of {self.margin:g}:": (
                pd.DataFrame(averages)
            ),
            "Points against dense by task. A method without a line here has the same score as dense in every sample of the "
            f"task; it takes {unseen_samples(self.margin)} such samples to exclude a loss of {self.margin:g}:": (
                pd.DataFrame(tasks)
            ),
        }

    def notes(self) -> list[str]:
        common, wording = self.common_tasks, self.setting["wording"]
        missing = ", ".join(task for task in TASKS if task not in common)
        stand_ins: dict[str, dict[str, None]] = {}
        for row in self.rows:
            if row["source"].startswith("generated"):
                stand_ins.setdefault(STOOD_IN_FOR.get(row["task"], "essays"), {})[row["task"]] = None
        least = min(row["samples"] for row in self.rows)
        few = counted(least, "sample")
        verdicts = [row["verdict"] for row in self.measured()]
        unpaired = [words.removeprefix(NOT_COMPARED) for words in verdicts if words.startswith(NOT_COMPARED)]
        missed = counted(len(unpaired), "score")
        notes = {
            f"The weights are {self.setting['weights']}: these scores say nothing about a trained model.": (
                self.setting["weights"] != "checkpoint"
            ),
            f"The average is over the {counted(len(common), 'task')} that every method has; missing somewhere: {missing}.": (
                missing
            ),
            **{
                f"Generated text stood in for {text}: scores of {', '.join(tasks)} do not compare with published ones.": True
                for text, tasks in stand_ins.items()
            },
            "The prompts were prepared elsewhere, so their wording is not known here.": wording == "prepared",
            "The wording is not the published one: published scores compare only under `--wording reference`.": (
                wording != "prepared" and not wording.startswith("reference")
            ),
            f"Only {few} of some task: fewer than {FEW_SAMPLES} say little about a difference.": least < FEW_SAMPLES,
            f"No interval for {missed}, the first for this reason: {''.join(unpaired[:1])}.": unpaired,
        }
        applying = [note for note, applies in notes.items() if applies]
        return applying + super().notes() + drawing_notes(self.setting, self.rows) + mixture_notes(self.samples)


@dataclass(frozen=True)
class AgreeGroup(Group):
    """How well methods agree with dense over long answers, of one model on one kind of prompt.

    Its rows have ``agreement_low`` and ``agreement_high``, the 95 % interval over samples, and ``divergence_least`` too.
    """

    choices: Mapping[tuple[str, int], Sequence[Choices]] = field(default_factory=dict)
    """The samples of each (label, length); empty where they are not beside the rows."""

    def __post_init__(self) -> None:
        answered = [self.choices.get((row["label"], row["length"]), ()) for row in self.rows]
        known = iter(intervals([[np.array([one.agreement for one in found])] for found in answered if found], 0.0, 1.0))
        for row, found in zip(self.rows, answered, strict=True):
            row["agreement_low"], row["agreement_high"] = next(known) if found else (None, None)
            row["divergence_least"] = min((one.divergence for one in found), default=None)

    @property
    def title(self) -> str:
        about = self.setting
        setting = (
            f"prompt {about['prompt']}, {counted(about['new_tokens'], 'new token')}, {self.machine}seed {about['seed']}"
        )
        return f"Agreement with dense: {self.subject}, {setting}{_older_prompt(about)}"

    def summary(self) -> Record:
        """Nothing follows from these rows together."""
        return {}

    def tables(self, fidelity: Callable[[TtftGroup, str], str]) -> dict[str, pd.DataFrame]:
        """A caption and a table of texts: a line for each method and length."""
        lines = [
            {
                "method": row["label"],
                "length": length_name(row["length"]),
                "same token": _cell(row, lambda part: f"{part:.1%}"),
                "95 % interval": NOTHING if low is None else f"{low:.1%} to {row['agreement_high']:.1%}",
                "first difference, median": _text(row["divergence_median"], "g"),
                "earliest": _text(row["divergence_least"], "d"),
                "never differs": _text(row["identical"], ".0%"),
                "samples": row["samples"],
            }
            for row in self.rows
            if row["label"] != "dense"
            for low in (row["agreement_low"],)
        ]
        return {
            "At how many places of dense's text a method's next token is dense's, and how many tokens greedy decoding has "
            "in common with dense before the first that differs:": pd.DataFrame(lines)
        }

    def notes(self) -> list[str]:
        few = min(row["samples"] for row in self.rows)
        bare = [row for row in self.measured() if row["agreement_low"] is None]
        notes = {
            f"The weights are {self.setting['weights']}: agreement says nothing about a trained model.": (
                self.setting["weights"] != "checkpoint"
            ),
            f"Only {counted(few, 'sample')}: fewer than {FEW_SAMPLES} say little about a method.": few < FEW_SAMPLES,
            f"No interval for {_places(bare, self.rows)}: the choices of single samples are not beside the rows.": bare,
        }
        return [note for note, applies in notes.items() if applies] + super().notes()


def template_words(about: Mapping[str, Any]) -> str:
    """Whether a setting has a chat template, and what the template was given."""
    given = f" {about['chat_template_kwargs']}" if about["chat_template_kwargs"] else ""
    return f"with chat template{given}" if about["chat_template"] else "without chat template"


def significant(value: float) -> str:
    """Seconds with three significant digits: 0.0412, 3.60, 34.5, 128."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(decimals, 0)}f}"


def difference_fields(found: Difference | str) -> Record:
    """A difference as columns of a record: empty but for the reason in ``verdict`` where there is none."""
    known = found if isinstance(found, Difference) else None
    return {
        "difference": known and known.mean,
        "difference_low": known and known.low,
        "difference_high": known and known.high,
        "pairs": known and known.pairs,
        "differing": known and known.differing,
        "samples_needed": known and known.needed,
        "verdict": known.verdict if known else f"{NOT_COMPARED}{found}" if found else "",
    }


def _difference_line(row: Record, decimals: int) -> Record:
    """The columns of a difference as texts of a table, given the fields that ``difference_fields`` makes."""
    return {
        "points": signed(row["difference"], decimals),
        "95 % interval": f"{signed(row['difference_low'], decimals)} to {signed(row['difference_high'], decimals)}",
        "in words": row["verdict"],
        "pairs": row["pairs"],
        "differing": row["differing"],
        "samples a task needed": _text(row["samples_needed"], "d"),
    }


def signed(value: float, decimals: int) -> str:
    """Points with their sign; what rounds to nothing is +0, whichever side it comes from."""
    return f"{round(value, decimals) + 0.0:+.{decimals}f}"


def percent_text(percent: float, decimals: int = 1) -> str:
    """A change in percent with its sign; what rounds to nothing is 0."""
    return f"{signed(percent, decimals) if round(percent, decimals) else '0'} %"


def interval_text(mean: float, low: float, high: float, decimals: int = 2) -> str:
    """Points with the ends of their interval."""
    return f"{signed(mean, decimals)} ({signed(low, decimals)} to {signed(high, decimals)})"


def record(row: Row) -> Record:
    """A result row as a group holds it."""
    record = {"kind": row.kind, **vars(row), "settings": row.parameters, **row.settings}
    if isinstance(row, RulerRow):
        # Prepared prompts are hashed task by task: their hash names the data, not the wording.
        prepared = row.wording == "prepared"
        record["wording_version"] = "" if prepared else row.wording_hash
        source = f"{row.source} {row.wording_hash}" if prepared else row.source
        record["data"] = f"{source} {row.data_hash}".rstrip()
    else:
        record["data"] = record.get("prompt_hash", "")
    return record | {"parameters": _parameters(record)}


def grouped(rows: list[Record]) -> list[tuple[Record, list[Record]]]:
    """The rows of one kind, sorted into groups: each its setting and its rows, methods in their order, dense first."""
    _mark_older_data(rows)
    together: dict[tuple[Any, ...], list[Record]] = {}
    for row in sorted(rows, key=in_order):
        together.setdefault(tuple(row[name] for name in SETTING[row["kind"]]), []).append(row)
    for members in together.values():
        label(members)
        figure, place = FIGURES[members[0]["kind"]][0], "task" if "task" in members[0] else "length"
        dense = {row[place]: row for row in members if row["label"] == "dense" and row["status"] == OK and row[figure]}
        for row in members:
            compared = row["label"] != "dense" and row["status"] == OK and row[figure] is not None
            _compare(row, dense.get(row[place]) if compared else None)
    names = SETTING[rows[0]["kind"]] if rows else ()
    return [(dict(zip(names, key, strict=True)), together[key]) for key in sorted(together)]


def _compare(row: Record, dense: Record | None) -> None:
    """Set ``percent_vs_dense``; of a time also ``percent_low``, ``percent_high`` and ``time_verdict``, the words."""
    figure = FIGURES[row["kind"]][0]
    row["percent_vs_dense"] = None if dense is None else 100 * (row[figure] / dense[figure] - 1)
    if row["kind"] != "ttft":
        return
    row |= {"percent_low": None, "percent_high": None, "time_verdict": ""}
    if dense is not None:
        found = compare_rows(row, dense)
        row["time_verdict"] = found.verdict if isinstance(found, TimeDifference) else found
        if isinstance(found, TimeDifference):
            row |= {"percent_vs_dense": found.percent, "percent_low": found.low, "percent_high": found.high}


def _mark_older_data(rows: list[Record]) -> None:
    """Number the data that a task, and the prompts that a length, was measured on from the newest.

    Methods are compared on the same data only.
    """
    newest: dict[tuple[Any, ...], dict[str, str]] = {}
    places = [tuple(row.get(name) for name in (*SETTING[row["kind"]][:-1], "length", "task")) for row in rows]
    for row, place in zip(rows, places, strict=True):
        times = newest.setdefault(place, {})
        times[row["data"]] = max(times.get(row["data"], ""), row["time"])
    for row, place in zip(rows, places, strict=True):
        times = newest[place]
        older = sorted(times, key=times.__getitem__, reverse=True).index(row["data"])
        row[SETTING[row["kind"]][-1]] = older


def _older_prompt(about: Mapping[str, Any]) -> str:
    """What tells prompts of one kind apart that read otherwise, in words."""
    return f", older prompt {about['older_prompt']}" if about["older_prompt"] else ""


def in_order(row: Record) -> tuple[Any, ...]:
    """The key that sorts rows by method, dense first, then by parameters, length and task."""
    methods, tasks = list(METHODS), list(TASKS)
    method = methods.index(row["method"]) if row["method"] in methods else len(methods)
    task = tasks.index(row["task"]) if row.get("task") in tasks else len(tasks)
    # Dense attention as tmbench chooses it comes before what a user forced.
    values = [(name, *in_value_order(name, row[name])) for name in parameter_names([row])]
    return method, row["method"], row.get("dense_backend", ""), values, row["length"], task


def in_value_order(name: str, value: Any) -> tuple[Any, ...]:
    """The key that sorts a parameter's values: numbers before texts, and layers from one on, by it, before other choices."""
    if name == "layers" and str(value).endswith("-") and str(value)[:-1].isdecimal():
        return False, int(str(value)[:-1])
    return isinstance(value, str), value


def parameter_names(rows: Sequence[Record]) -> list[str]:
    """What decides which pairs these rows computed, in the order of the methods: the backend of dense attention does not."""
    settings = sorted((parse_parameters(row["settings"]) for row in rows), key=len, reverse=True)
    return [name for name in dict.fromkeys(name for own in settings for name in own) if name != "dense_backend"]


def label(rows: list[Record]) -> None:
    """Set ``label`` of rows that stand together: the method, with those parameters in which its variants differ."""
    variants: dict[str, list[Record]] = {}
    for row in rows:
        variants.setdefault(row["method"], []).append(row)
    for method, own in variants.items():
        names = (*parameter_names(own), "dense_backend")
        differing = [name for name in names if len({row.get(name) for row in own}) > 1]
        for row in own:
            values = ", ".join(f"{name} {row[name]}" for name in differing if name in row)
            row["label"] = f"{method} ({values})" if values else method


def _parameters(row: Record, source: bool = False) -> str:
    origin = f" ({row['layers_source']})" if source and row["layers_source"] else ""
    return ", ".join(f"{name} {row[name]}{origin * (name == 'layers')}" for name in parameter_names([row]))


def _cell(row: Record, text: Callable[[float], str]) -> str:
    value, percent = row[FIGURES[row["kind"]][0]], row["percent_vs_dense"]
    if row["status"] != OK or value is None:
        return STATUS_WORDS.get(row["status"], NOTHING)
    if percent is None or row["kind"] != "ttft":
        return text(value)
    if row["time_verdict"] == NO_DIFFERENCE:
        return f"{text(value)} ({NO_DIFFERENCE})"
    reason = "" if row["percent_low"] is not None else f", {row['time_verdict']}"
    return f"{text(value)} ({percent_text(percent, 0)}{reason})"


def _text(value: float | None, form: str | Callable[[float], str]) -> str:
    if value is None:
        return NOTHING
    return format(value, form) if isinstance(form, str) else form(value)


def _places(rows: Sequence[Record], whole: Sequence[Record]) -> str:
    if len(rows) == len(whole):
        return "all rows"
    lengths: dict[str, list[str]] = {}
    for row in rows:
        lengths.setdefault(row["label"], []).append(length_name(row["length"]))
    return "; ".join(f"{label} at {', '.join(names)}" for label, names in lengths.items())
