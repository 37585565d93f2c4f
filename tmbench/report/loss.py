"""Negative log-likelihoods of one model: inside of prompts, of the answers after them, and of their first tokens."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tmbench.report.comparable import Placed
from tmbench.report.section import FEW_SAMPLES, Cell, Section, places_text, status_text
from tmbench.report.served import CAPTION, ways
from tmbench.report.settings import LossSetting, machine_words, older_words, prefill_words
from tmbench.report.student import mean_interval
from tmbench.report.table import Table, columns
from tmbench.report.words import NOTHING, figure_text, interval_text, signed
from tmbench.results.loss_samples import LossSample
from tmbench.results.rows import OK, LossRow
from tmbench.results.words import counted, length_name

DECIMALS = 4


@dataclass(frozen=True)
class LossDifference:
    """A mean loss against dense's over the same samples, in nats per token; a higher loss is above 0."""

    mean: float
    ends: tuple[float, float] | None = None
    """Of its 95 % interval, Student's over the samples; None where these are not beside the rows, or there is only one."""

    @property
    def low(self) -> float | None:
        return None if self.ends is None else self.ends[0]

    @property
    def high(self) -> float | None:
        return None if self.ends is None else self.ends[1]

    @property
    def text(self) -> str:
        """The mean with its interval."""
        return signed(self.mean, DECIMALS) if self.ends is None else interval_text(self.mean, *self.ends, DECIMALS)


@dataclass(frozen=True)
class LossCell(Cell[LossRow]):
    """The losses of one method on one task at one length, and how they differ from dense's."""

    prompt: LossDifference | None
    answer: LossDifference | None
    first: LossDifference | None
    """Each None for dense itself, and where dense has not read the same samples."""
    samples: Mapping[int, LossSample] = field(default_factory=dict, repr=False)
    """The single samples by number; none where they are not beside the row."""

    @property
    def figure(self) -> float | None:
        return self.row.nll_prompt

    @property
    def place(self) -> str:
        return f"{self.row.task} at {length_name(self.row.length)}"

    @property
    def texts(self) -> list[str]:
        """The cells below ``LOSS_COLUMNS``."""
        if not self.known:
            return [status_text(self), *[NOTHING] * 5]
        pairs = (
            (self.row.nll_prompt, self.prompt),
            (self.row.nll_answer, self.answer),
            (self.row.nll_first, self.first),
        )
        return [
            text for nll, found in pairs for text in (figure_text(nll, f".{DECIMALS}f"), found.text if found else NOTHING)
        ]


LOSS_COLUMNS = (
    "prompt", "prompt, against dense", "answer", "answer, against dense", "first token", "first token, against dense",
)  # fmt: skip
IN_NATS = "in nats per token, and their differences to dense over the same samples with 95 % intervals by Student's t"
PARTS = ("prompt", "answer", "first token")


@dataclass(frozen=True)
class LossSection(Section[LossSetting, LossCell]):
    """The losses of several methods by task and length."""

    @property
    def title(self) -> str:
        about = self.setting
        machine = f"{prefill_words(about.prefill)}{machine_words(about.threads)}seed {about.seed}"
        return f"Loss of prompts and answers: {about.subject}, {machine}{older_words('data', about.older_data)}"

    def tables(self) -> list[Table]:
        """A line for each task, length and method."""
        ordered = sorted(self.cells, key=lambda cell: (cell.row.task, cell.row.length))
        lines = [
            [cell.row.task, length_name(cell.row.length), cell.label, *cell.texts, str(cell.row.samples)] for cell in ordered
        ]
        names = ("task", "length", "method", *LOSS_COLUMNS, "samples")
        table = Table(f"Mean negative log-likelihoods {IN_NATS}:", columns(*names, texts=("task", "method")), lines)
        return [table, self._served()]

    def _served(self) -> Table:
        """A line for each cell and each other way in which its prompts were fed."""
        over = "over the same samples, with 95 % intervals by Student's t"
        return Table(
            CAPTION.format(what="nats per token", over=over),
            columns("method", "read", "task", "length", *PARTS, "samples", texts=("method", "read", "task")),
            [
                [one.label, one.read, one.cell.row.task, length_name(one.cell.row.length)]
                + [part.text if part else NOTHING for part in one.parts]
                + [str(one.cell.row.samples)]
                for one in served_losses(self)
            ],
        )

    def notes(self) -> list[str]:
        few = min(cell.row.samples for cell in self.cells)
        compared = [cell for cell in self.measured() if cell.prompt is not None]
        bare = [cell for cell in compared if cell.prompt is not None and cell.prompt.ends is None]
        notes = {
            f"The weights are {self.setting.weights}: losses say nothing about a trained model.": (
                self.setting.weights != "checkpoint"
            ),
            f"Only {counted(few, 'sample')}: fewer than {FEW_SAMPLES} say little about a method, and an interval of few or "
            "uneven samples is a rough one.": few < FEW_SAMPLES,
            f"No interval for {places_text(bare, compared)}: samples are not beside the rows, or there is only one.": (
                bool(bare)
            ),
        }
        return [note for note, applies in notes.items() if applies] + super().notes()


@dataclass(frozen=True)
class ServedLoss:
    """The losses of one method on one task at one length, fed otherwise than in one piece with their question."""

    label: str
    read: str
    """How they were fed, in words."""
    cell: LossCell
    """Fed so."""
    parts: Sequence[LossDifference | None]
    """Of the prompt, its answer and its first token, against one piece over the same samples; None where these are not
    beside both rows."""


def served_losses(whole: LossSection) -> list[ServedLoss]:
    """Every method of a section as it was served, way by way."""
    return [
        ServedLoss(label, way.read, then, _differences(then.samples, cell.samples) or [None] * len(PARTS))
        for way in ways(whole)
        for label, cell, then in way.pairs(whole)
    ]


def loss_section(
    setting: LossSetting,
    placed: Sequence[Placed[LossRow]],
    samples: Mapping[tuple[str, str, int], Mapping[int, LossSample]],
) -> LossSection:
    """The section of rows of one setting, given the samples of each (label, task, length)."""
    cells = []
    for label, row in ((one.label, one.row) for one in placed):
        own, dense = (samples.get((name, row.task, row.length), {}) for name in (label, "dense"))
        if label == "dense" or row.status != OK:
            cells.append(LossCell(row, label, None, None, None, samples=own))
        elif differences := _differences(own, dense):
            cells.append(LossCell(row, label, *differences, samples=own))
        else:
            kept = (row.nll_prompt_vs_dense, row.nll_answer_vs_dense, row.nll_first_vs_dense)
            prompt, answer, first = (None if mean is None else LossDifference(mean) for mean in kept)
            cells.append(LossCell(row, label, prompt, answer, first, own))
    return LossSection(setting, cells)


def _differences(
    own: Mapping[int, LossSample], others: Mapping[int, LossSample]
) -> tuple[LossDifference, LossDifference, LossDifference] | None:
    """Of prompts, answers and first tokens over the samples that both have; None where there are none, or they differ."""
    pairs = [(own[index], others[index]) for index in own if index in others]
    if not pairs or not all(one.same(other) for one, other in pairs):
        return None
    return (
        _difference([one.nll_prompt - other.nll_prompt for one, other in pairs]),
        _difference([one.nll_answer - other.nll_answer for one, other in pairs]),
        _difference([one.nll_first - other.nll_first for one, other in pairs]),
    )


def _difference(values: Sequence[float]) -> LossDifference:
    return LossDifference(statistics.fmean(values), mean_interval(values) if len(values) > 1 else None)
