"""Scores of one model at one length, under one wording and on one set of data: of RULER or of another suite."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tmbench.report.answers import Answers
from tmbench.report.comparable import Placed, tasks_of
from tmbench.report.differences import DIFFERENCE_COLUMNS, NOT_COMPARED, difference_texts, verdict_of
from tmbench.report.intervals import MARGIN, Difference, by_chance, unseen_samples
from tmbench.report.samples_as import drawing_notes
from tmbench.report.section import FEW_SAMPLES, Cell, Section, status_text
from tmbench.report.served import CAPTION, ways
from tmbench.report.settings import RulerSetting
from tmbench.report.table import Table, columns
from tmbench.report.words import HALF_COUNTED, NOTHING, SKIPPED, figure_text
from tmbench.results.rows import OK, PREPARED, RulerRow
from tmbench.results.sample_scores import Samples, mixture_notes
from tmbench.results.suite_rows import SuiteRow
from tmbench.results.words import counted, length_name

STOOD_IN_FOR = {"qa_1": "SQuAD", "qa_2": "HotpotQA"}
MANY_METHODS = 7
"""Beyond so many methods a table or a plot of scores has a line for each of them, and a column for each task."""


@dataclass(frozen=True)
class RulerCell(Cell[RulerRow]):
    """One score, and how it differs from dense's over the same samples."""

    dense: RulerRow | None
    """Dense's row of the same task; None for dense itself, and where either has no score."""
    difference: Difference | str
    """In points; in words why there is none, "" for dense itself."""

    @property
    def figure(self) -> float | None:
        return self.row.score

    @property
    def percent_vs_dense(self) -> float | None:
        """The score against dense's, in percent of dense's."""
        if self.dense is None or self.row.score is None or not self.dense.score:
            return None
        return 100 * (self.row.score / self.dense.score - 1)

    @property
    def verdict(self) -> str:
        """What the difference says."""
        return verdict_of(self.difference)


@dataclass(frozen=True)
class RulerSection(Section[RulerSetting, RulerCell]):
    """The scores of several methods, task by task, and their averages."""

    answers: Answers = field(default_factory=Answers)

    @property
    def title(self) -> str:
        return f"{self.suite} at {length_name(self.setting.length)}: {self.setting.subject}, {self.setting.words}"

    @property
    def suite(self) -> str:
        """What people call the suite."""
        return self.cells[0].row.title

    @property
    def order(self) -> tuple[str, ...]:
        """All tasks of the suite, in its order."""
        return tasks_of(self.cells[0].row)

    @cached_property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Scores from 0 to 100 by label and task, tasks in the suite's order; those that are known."""
        found: dict[str, dict[str, float]] = {label: {} for label in self.labels}
        for cell in sorted(self.cells, key=lambda cell: self.order.index(cell.row.task)):
            if cell.row.score is not None:
                found[cell.label][cell.row.task] = cell.row.score
        return found

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that any method was asked, in the suite's order."""
        asked = {cell.row.task for cell in self.cells}
        return [task for task in self.order if task in asked]

    @cached_property
    def common_tasks(self) -> list[str]:
        """The tasks that every label has a score for."""
        return [task for task in self.tasks if all(task in own for own in self.scores.values())]

    @cached_property
    def averages(self) -> dict[str, float]:
        """Each label's mean score over ``common_tasks``; empty where there are none."""
        if not self.common_tasks:
            return {}
        return {label: statistics.fmean(own[task] for task in self.common_tasks) for label, own in self.scores.items()}

    @cached_property
    def densities(self) -> dict[str, float]:
        """The share of the causal pairs that each label computed, averaged over its tasks; only where it was counted."""
        return self._means(lambda row: row.coverage)

    @cached_property
    def skipped_shares(self) -> dict[str, float]:
        """The share of tiles that each label skipped, in the same way."""
        return self._means(lambda row: row.skipped_share)

    def _means(self, figure: Callable[[RulerRow], float | None]) -> dict[str, float]:
        found = {}
        for label in self.labels:
            parts = [part for cell in self.measured(label) if (part := figure(cell.row)) is not None]
            if parts:
                found[label] = sum(parts) / len(parts)
        return found

    @cached_property
    def paired_tasks(self) -> list[str]:
        """The tasks of the averages for which every sample of every method is known."""
        return self.answers.complete(self.common_tasks, self.labels)

    @cached_property
    def average_differences(self) -> dict[str, Difference | str]:
        """Each label's paired difference to dense, averaged over ``paired_tasks``; where there is none, why."""
        others = [label for label in self.labels if label != "dense"]
        found = self.answers.compare_all([(label, "dense", self.paired_tasks) for label in others])
        return dict(zip(others, found, strict=True))

    @property
    def over(self) -> str:
        """What the average differences are over, in words."""
        return f"average of {counted(len(self.paired_tasks), 'task')}"

    def tables(self) -> list[Table]:
        """Scores by task and method with their averages, and the differences to dense."""
        return [self._scores(), self._average_differences(), self._task_differences(), self._served()]

    def _scores(self) -> Table:
        texts = {(cell.row.task, cell.label): score_text(cell) for cell in self.cells}
        lines = []
        for task in self.tasks:
            samples = sorted({cell.row.samples for cell in self.cells if cell.row.task == task})
            lines.append([task, " / ".join(map(str, samples)), *(texts.get((task, name), NOTHING) for name in self.labels)])
        means = self.averages
        average = {name: f"{mean:.1f}" for name, mean in means.items()}
        if "dense" in means:
            others = {name: mean for name, mean in means.items() if name != "dense"}
            average |= {name: f"{mean:.1f} ({mean - means['dense']:+.1f})" for name, mean in others.items()}
        lines.append([f"average of {len(self.common_tasks)}", "", *(average.get(name, NOTHING) for name in self.labels)])
        if parts := self.densities:
            lines.append(["density", "", *(figure_text(parts.get(name), ".1%") for name in self.labels)])
        if parts := self.skipped_shares:
            lines.append([SKIPPED, "", *(figure_text(parts.get(name), ".1%") for name in self.labels)])
        caption = "Scores from 0 to 100; in brackets points against dense:"
        if len(self.labels) <= MANY_METHODS:
            return Table(caption, columns("task", "samples", *self.labels, texts=("task",)), lines)
        names, counts, *scores = (list(column) for column in zip(*lines, strict=True))
        turned = [[label, *own] for label, own in zip(self.labels, scores, strict=True)]
        return Table(caption, columns("method", *names, texts=("method",)), [*turned, ["samples", *counts]])

    def _average_differences(self) -> Table:
        """How the averages differ from dense's over the same samples."""
        found = {name: each for name, each in self.average_differences.items() if isinstance(each, Difference)}
        return Table(
            f"Points against dense over the same samples, {self.over}, and what they say for a margin of "
            f"{self.answers.margin:g}:",
            columns("method", *DIFFERENCE_COLUMNS, texts=("method", "in words")),
            [[name, *difference_texts(each)] for name, each in found.items()],
        )

    def _task_differences(self) -> Table:
        """A line for each task and method that differ from dense."""
        lines = [
            [cell.row.task, cell.label, *difference_texts(cell.difference, 1)]
            for cell in sorted(self.cells, key=lambda cell: self.order.index(cell.row.task))
            if isinstance(cell.difference, Difference) and cell.difference.differing
        ]
        margin = self.answers.margin
        return Table(
            "Points against dense by task. A method without a line here has the same score as dense in every sample of the "
            f"task; it takes {unseen_samples(margin)} such samples to exclude a loss of {margin:g}:",
            columns("task", "method", *DIFFERENCE_COLUMNS, texts=("task", "method", "in words")),
            lines,
        )

    def _served(self) -> Table:
        """A line for each method and each other way in which its prompts were fed."""
        lines = [
            [
                one.label,
                one.read,
                str(len(one.tasks)),
                f"{one.whole:.1f}",
                f"{one.score:.1f}",
                *difference_texts(one.difference),
            ]
            for one in served_scores(self)
        ]
        names = ("method", "read", "tasks", "in one piece", "then", *DIFFERENCE_COLUMNS)
        over = f"over the same samples, averaged over tasks, for a margin of {self.answers.margin:g}"
        return Table(
            CAPTION.format(what="points", over=over),
            columns(*names, texts=("method", "read", "in words")),
            lines,
        )

    def notes(self) -> list[str]:
        common, wording = self.common_tasks, self.setting.wording
        of_ruler = not isinstance(self.cells[0].row, SuiteRow)
        missing = ", ".join(task for task in self.order if task not in common)
        stand_ins: dict[str, dict[str, None]] = {}
        for cell in self.cells:
            if cell.row.source.startswith("generated"):
                stand_ins.setdefault(STOOD_IN_FOR.get(cell.row.task, "essays"), {})[cell.row.task] = None
        least = min(cell.row.samples for cell in self.cells)
        few = counted(least, "sample")
        verdicts = [cell.verdict for cell in self.measured()]
        compared = sum(isinstance(cell.difference, Difference) for cell in self.cells)
        unpaired = [words.removeprefix(NOT_COMPARED) for words in verdicts if words.startswith(NOT_COMPARED)]
        missed = counted(len(unpaired), "score")
        notes = {
            f"The weights are {self.setting.weights}: these scores say nothing about a trained model.": (
                self.setting.weights != "checkpoint"
            ),
            f"The average is over the {counted(len(common), 'task')} that every method has; missing somewhere: {missing}.": (
                bool(missing)
            ),
            **{
                f"Generated text stood in for {text}: scores of {', '.join(tasks)} do not compare with published ones.": True
                for text, tasks in stand_ins.items()
            },
            HALF_COUNTED: bool(self.skipped_shares),
            "The prompts were prepared elsewhere, so their wording is not known here.": wording == PREPARED,
            "The wording is not the published one: published scores compare only under `--wording reference`.": (
                of_ruler and wording != PREPARED and not wording.startswith("reference")
            ),
            f"The sentences are tmbench's own, and so is the drawing: published scores of {self.suite} do not compare.": (
                not of_ruler
            ),
            f"Only {few} of some task: fewer than {FEW_SAMPLES} say little about a difference.": least < FEW_SAMPLES,
            f"Chance alone may make up to {by_chance(compared):.1f} of {compared} differences by task look like a loss. So "
            '"loss" and "gain" are what Holm\'s method confirms for a table as a whole; a "possible loss" excludes 0 by '
            "itself alone.": compared > 1,
            f"No interval for {missed}, the first for this reason: {''.join(unpaired[:1])}.": bool(unpaired),
        }
        applying = [note for note, applies in notes.items() if applies]
        drawn = drawing_notes(self.setting.samples_as, wording, [cell.row.source for cell in self.cells])
        return applying + super().notes() + drawn + mixture_notes(self.answers.samples)


def ruler_section(
    setting: RulerSetting,
    placed: Sequence[Placed[RulerRow]],
    samples: Mapping[tuple[str, str], Samples],
    margin: float = MARGIN,
) -> RulerSection:
    """The section of rows of one setting, given what each (label, task) answered sample by sample."""
    answers = Answers(samples, margin)
    others = [one for one in placed if one.label != "dense"]
    found = iter(answers.compare_all([(one.label, "dense", [one.row.task]) for one in others]))
    dense = {one.row.task: one.row for one in placed if one.label == "dense" and one.row.status == OK and one.row.score}
    cells = []
    for one in placed:
        compared = one.label != "dense" and one.row.status == OK and one.row.score is not None
        of_dense = dense.get(one.row.task) if compared else None
        cells.append(RulerCell(one.row, one.label, of_dense, "" if one.label == "dense" else next(found)))
    return RulerSection(setting, cells, answers)


@dataclass(frozen=True)
class ServedScore:
    """The scores of one method whose prompts were fed otherwise than in one piece with their question."""

    label: str
    read: str
    """How they were fed, in words."""
    tasks: Sequence[str]
    """Those that both were asked, every sample of which is known."""
    whole: float
    """The average score over these tasks in one piece."""
    score: float
    difference: Difference | str
    """In points against one piece, over the same samples; in words why there is none."""
    strata: Sequence[Sequence[float]]
    """What it is made of: the points of every sample, task by task; none where there is no difference."""


def served_scores(whole: RulerSection, among: Collection[str] | None = None) -> list[ServedScore]:
    """Every method of a section as it was served, way by way, over all tasks or those of ``among``."""
    found = []
    for way in ways(whole):
        both = {(label, cell.row.task): (cell, then) for label, cell, then in way.pairs(whole)}
        tasks = [
            task
            for task in whole.tasks
            if (among is None or task in among)
            and all((label, task) in both for label, _ in way.labels)
            and not any(whole.answers.samples[label, task].missing for label, _ in way.labels)
            and not any(way.other.answers.samples[own, task].missing for _, own in way.labels)
        ]
        if not tasks:
            continue
        then = {(label, own): f"{label}, {way.read}" for label, own in way.labels}
        joined = Answers(
            {(label, task): whole.answers.samples[label, task] for label, _ in then for task in tasks}
            | {(name, task): way.other.answers.samples[own, task] for (_, own), name in then.items() for task in tasks},
            whole.answers.margin,
        )
        compared = joined.compare_all([(name, label, tasks) for (label, _), name in then.items()])
        for (label, own), difference in zip(then, compared, strict=True):
            before = statistics.fmean(whole.scores[label][task] for task in tasks)
            after = statistics.fmean(way.other.scores[own][task] for task in tasks)
            pairs = joined.pairs(then[label, own], label, tasks)
            strata = () if isinstance(pairs, str) else pairs
            found.append(ServedScore(label, way.read, tasks, before, after, difference, strata))
    return found


def score_text(cell: RulerCell) -> str:
    """A score, or what came instead of it."""
    return status_text(cell) if not cell.known or cell.row.score is None else f"{round(cell.row.score, 2):g}"
