"""Scores of lm-evaluation-harness's tasks, of one model at one length, asked in one way."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tmbench.report.answers import Answers
from tmbench.report.comparable import Placed
from tmbench.report.differences import DIFFERENCE_COLUMNS, NOT_COMPARED, difference_texts, verdict_of
from tmbench.report.intervals import MARGIN, Difference, by_chance
from tmbench.report.loss import LossDifference
from tmbench.report.section import FEW_SAMPLES, Cell, Section, status_text
from tmbench.report.settings import LmEvalSetting
from tmbench.report.student import mean_interval
from tmbench.report.table import Table, columns
from tmbench.report.words import NOTHING, figure_text
from tmbench.results.lm_eval_rows import Likelihood, LmEvalRow
from tmbench.results.rows import OK
from tmbench.results.sample_scores import Samples
from tmbench.results.words import counted, length_name


@dataclass(frozen=True)
class LmEvalCell(Cell[LmEvalRow]):
    """One metric of one task, and how it differs from dense's over the same documents."""

    dense: LmEvalRow | None
    """Dense's row of the same; None for dense itself, and where either has no value."""
    difference: Difference | str
    """In points of a hundred; in words why there is none, "" for dense itself."""
    nats: LossDifference | None = None
    """Of a perplexity: how much less likely the texts are than under dense, in nats for each of what the metric counts."""

    @property
    def figure(self) -> float | None:
        return self.row.value

    @property
    def percent_vs_dense(self) -> float | None:
        """The value against dense's, in percent of dense's."""
        if self.dense is None or self.row.value is None or not self.dense.value:
            return None
        return 100 * (self.row.value / self.dense.value - 1)

    @property
    def verdict(self) -> str:
        """What the difference says."""
        return verdict_of(self.difference)

    @property
    def text(self) -> str:
        """The value, or what came instead of it."""
        return self.row.shown if self.known else status_text(self)


@dataclass(frozen=True)
class LmEvalSection(Section[LmEvalSetting, LmEvalCell]):
    """The values of several methods, task by task and metric by metric."""

    margin: float = MARGIN
    """The non-inferiority margin in points."""

    @property
    def title(self) -> str:
        about = self.setting
        return f"lm-eval {about.harness}, up to {length_name(about.length)}: {about.subject}, {about.words}"

    def tables(self) -> list[Table]:
        """The values as the harness has them, and the differences to dense."""
        return [self._values(), self._differences(), self._likelihoods(), self._cost()]

    def _values(self) -> Table:
        found: dict[tuple[str, str], dict[str, LmEvalCell]] = {}
        for cell in self.cells:
            found.setdefault((cell.row.task, cell.row.measure), {})[cell.label] = cell
        lines = []
        for (task, metric), own in found.items():
            row = next(iter(own.values())).row
            better = {True: "higher", False: "lower"}.get(row.higher_is_better, NOTHING)  # type: ignore[arg-type]
            texts = [own[label].text if label in own else NOTHING for label in self.labels]
            lines.append([task, metric, better, str(row.num_fewshot), str(row.samples), *texts])
        names = ("task", "metric", "better", "examples", "documents", *self.labels)
        return Table("Metrics as the harness has them:", columns(*names, texts=("task", "metric", "better")), lines)

    def _differences(self) -> Table:
        lines = [
            [cell.row.task, cell.row.measure, cell.label, *difference_texts(cell.difference, 1)]
            for cell in self.cells
            if isinstance(cell.difference, Difference)
        ]
        names = ("task", "metric", "method", *DIFFERENCE_COLUMNS)
        caption = f"Points of a hundred against dense over the same documents, for a margin of {self.margin:g}:"
        return Table(caption, columns(*names, texts=("task", "metric", "method", "in words")), lines)

    def _likelihoods(self) -> Table:
        lines = [
            [cell.row.task, cell.row.measure, cell.label, cell.nats.text] for cell in self.cells if cell.nats is not None
        ]
        names = ("task", "metric", "method", "nats")
        caption = (
            "Nats against dense over the same documents, for each word or byte as the metric counts, with the 95 % "
            "interval. Above 0 the texts are less likely:"
        )
        return Table(caption, columns(*names, texts=("task", "metric", "method")), lines)

    def _cost(self) -> Table:
        own = {(cell.row.task, cell.label): cell for cell in self.measured()}
        lines = [
            [
                task,
                label,
                str(cell.row.requests),
                str(cell.row.truncated),
                figure_text(cell.row.prompt_tokens_mean, ".0f"),
                figure_text(cell.row.coverage, ".1%"),
            ]
            for (task, label), cell in own.items()
        ]
        names = ("task", "method", "requests", "cut", "prompt tokens, mean", "density")
        caption = "What was asked, how many prompts lost their beginning, and the share of the causal pairs computed:"
        return Table(caption, columns(*names, texts=("task", "method")), lines, details=True)

    def notes(self) -> list[str]:
        compared = sum(isinstance(cell.difference, Difference) for cell in self.cells)
        bare = [cell for cell in self.measured() if cell.nats is None and cell.verdict.startswith(NOT_COMPARED)]
        unpaired = [cell.verdict.removeprefix(NOT_COMPARED) for cell in bare]
        few = min(cell.row.samples for cell in self.cells)
        cut = sorted({cell.row.task for cell in self.cells if cell.row.truncated})
        notes = {
            f"The weights are {self.setting.weights}: these scores say nothing about a trained model.": (
                self.setting.weights != "checkpoint"
            ),
            f"Only {counted(few, 'document')} of some task: fewer than {FEW_SAMPLES} say little about a difference.": (
                few < FEW_SAMPLES
            ),
            f"Prompts of {', '.join(cut)} were longer than the model may read here, and lost their beginning.": bool(cut),
            f"Chance alone may make up to {by_chance(compared):.1f} of {compared} differences look like a loss. So "
            '"loss" and "gain" are what Holm\'s method confirms for a table as a whole; a "possible loss" excludes 0 by '
            "itself alone.": compared > 1,
            f"No interval for {counted(len(unpaired), 'value')}, the first for this reason: {''.join(unpaired[:1])}.": (
                bool(unpaired)
            ),
        }
        return [note for note, applies in notes.items() if applies] + super().notes()


def lm_eval_section(
    setting: LmEvalSetting,
    placed: Sequence[Placed[LmEvalRow]],
    samples: Mapping[tuple[str, str], Samples],
    likelihoods: Mapping[tuple[str, str], Mapping[int, Likelihood]],
    margin: float = MARGIN,
) -> LmEvalSection:
    """The section of rows of one setting, given by (label, ``place_of`` a row) what each document scored, and how likely
    its text was."""
    answers = Answers(samples, margin)
    others = [one for one in placed if one.label != "dense"]
    found = iter(answers.compare_all([(one.label, "dense", [place_of(one.row)]) for one in others]))
    dense = {place_of(one.row): one.row for one in placed if one.label == "dense" and one.row.status == OK}
    cells = []
    for one in placed:
        compared = one.label != "dense" and one.row.status == OK and one.row.value is not None
        of_dense = dense.get(place_of(one.row)) if compared else None
        place = place_of(one.row)
        nats = None
        if one.label != "dense":
            nats = _nats(likelihoods.get((one.label, place), {}), likelihoods.get(("dense", place), {}))
        cells.append(LmEvalCell(one.row, one.label, of_dense, "" if one.label == "dense" else next(found), nats))
    return LmEvalSection(setting, cells, margin)


def _nats(own: Mapping[int, Likelihood], dense: Mapping[int, Likelihood]) -> LossDifference | None:
    """How much less likely texts are, for each unit of their weight; None where they are not the same texts."""
    same = own.keys() == dense.keys() and all(
        (one.told, one.weight) == (dense[index].told, dense[index].weight) for index, one in own.items()
    )
    if not own or not same:
        return None
    weight = statistics.fmean(one.weight for one in own.values())
    apart = [(dense[index].logprob - one.logprob) / weight for index, one in own.items()]
    return LossDifference(statistics.fmean(apart), mean_interval(apart) if len(apart) > 1 else None)


def place_of(row: LmEvalRow) -> str:
    """The task and the metric: what is compared between methods."""
    return f"{row.task}, {row.measure}"
