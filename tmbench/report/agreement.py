"""Token agreement with dense over long answers, of one model on one kind of prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tmbench.report.comparable import Placed
from tmbench.report.differences import DIFFERENCE_COLUMNS, difference_texts
from tmbench.report.intervals import MARGIN, Difference, family, intervals
from tmbench.report.section import FEW_SAMPLES, Cell, Section, file_notes, places_text, status_text
from tmbench.report.served import CAPTION, ways
from tmbench.report.settings import AgreeSetting, machine_words, older_words, prefill_words
from tmbench.report.table import Table, columns
from tmbench.report.words import NOTHING, figure_text
from tmbench.results.choices import Choices
from tmbench.results.rows import OK, AgreeRow
from tmbench.results.words import counted, length_name


@dataclass(frozen=True)
class AgreeCell(Cell[AgreeRow]):
    """How far one method's choices are dense's, with what the single samples say of it."""

    dense: AgreeRow | None
    """Dense's row of the same length; None for dense itself, and where either has no agreement."""
    choices: Sequence[Choices]
    """The single samples; none where they are not beside the row."""
    ends: tuple[float, float] | None
    """Of the 95 % interval of the agreement over them."""

    @property
    def figure(self) -> float | None:
        return self.row.agreement

    @property
    def percent_vs_dense(self) -> float | None:
        """The agreement against that of dense with itself, in percent."""
        if self.dense is None or self.row.agreement is None or not self.dense.agreement:
            return None
        return 100 * (self.row.agreement / self.dense.agreement - 1)

    @property
    def earliest(self) -> int | None:
        """The fewest tokens that any sample has in common with dense before the first that differs."""
        return min((sample.divergence for sample in self.choices), default=None)

    @property
    def agreement_low(self) -> float | None:
        return None if self.ends is None else self.ends[0]

    @property
    def agreement_high(self) -> float | None:
        return None if self.ends is None else self.ends[1]

    @property
    def text(self) -> str:
        """The agreement, or what came instead of it."""
        return status_text(self) if not self.known else figure_text(self.row.agreement, ".1%")


@dataclass(frozen=True)
class AgreeSection(Section[AgreeSetting, AgreeCell]):
    """The agreement of several methods by length."""

    margin: float = MARGIN
    """The non-inferiority margin in points."""

    @property
    def title(self) -> str:
        about = self.setting
        machine = f"{prefill_words(about.prefill)}{machine_words(about.threads)}"
        setting = f"prompt {about.prompt}, {counted(about.new_tokens, 'new token')}, {machine}seed {about.seed}"
        return f"Token agreement with dense: {about.subject}, {setting}{older_words('prompt', about.older_prompt)}"

    def tables(self) -> list[Table]:
        """A line for each method and length."""
        lines = [
            [
                cell.label,
                length_name(cell.row.length),
                cell.text,
                NOTHING if cell.ends is None else f"{cell.ends[0]:.1%} to {cell.ends[1]:.1%}",
                figure_text(cell.row.divergence_median, "g"),
                figure_text(cell.earliest, "d"),
                figure_text(cell.row.identical, ".0%"),
                str(cell.row.samples),
            ]
            for cell in self.cells
            if cell.label != "dense"
        ]
        names = (
            "method", "length", "same token", "95 % interval", "first difference, median", "earliest", "never differs",
            "samples",
        )  # fmt: skip
        caption = (
            "At how many places of dense's text a method's next token is dense's, and how many tokens greedy decoding has "
            "in common with dense before the first that differs:"
        )
        return [Table(caption, columns(*names, texts=("method",)), lines), self._served()]

    def _served(self) -> Table:
        """A line for each cell and each other way in which its prompts were fed."""
        over = f"over the same prompts, each against dense's text of its own way, for a margin of {self.margin:g}"
        names = ("method", "read", "length", "in one piece", "then", *DIFFERENCE_COLUMNS[:-1])
        return Table(
            CAPTION.format(what="points of token agreement", over=over),
            columns(*names, texts=("method", "read", "in words")),
            [
                [one.label, one.read, length_name(one.length), one.whole.text, one.then.text, *found[:-1]]
                for one in served_agreements(self)
                for found in [difference_texts(one.difference)]
            ],
        )

    def notes(self) -> list[str]:
        few = min(cell.row.samples for cell in self.cells)
        bare = [cell for cell in self.measured() if cell.ends is None]
        notes = {
            f"The weights are {self.setting.weights}: token agreement says nothing about a trained model.": (
                self.setting.weights != "checkpoint"
            ),
            f"Only {counted(few, 'sample')}: fewer than {FEW_SAMPLES} say little about a method.": few < FEW_SAMPLES,
            f"No interval for {places_text(bare, self.cells)}: the choices of single samples are not beside the rows.": (
                bool(bare)
            ),
        }
        return [note for note, applies in notes.items() if applies] + file_notes(self.cells) + super().notes()


@dataclass(frozen=True)
class ServedAgreement:
    """The agreement of one method at one length whose prompts were fed otherwise than in one piece with their question."""

    label: str
    read: str
    """How they were fed, in words."""
    whole: AgreeCell
    """In one piece."""
    then: AgreeCell
    difference: Difference | str
    """In points against one piece, over the same prompts; in words why there is none."""

    @property
    def length(self) -> int:
        return self.whole.row.length


def served_agreements(whole: AgreeSection) -> list[ServedAgreement]:
    """Every method of a section as it was served, way by way; of dense, which agrees with itself, nothing is asked."""
    found = [(way.read, *both) for way in ways(whole) for both in way.pairs(whole) if both[0] != "dense"]
    pairs = [_paired(cell.choices, then.choices) for _, _, cell, then in found]
    known = iter(family([[own] for own in pairs if not isinstance(own, str)], whole.margin))
    return [
        ServedAgreement(label, read, cell, then, own if isinstance(own, str) else next(known))
        for (read, label, cell, then), own in zip(found, pairs, strict=True)
    ]


def _paired(whole: Sequence[Choices], then: Sequence[Choices]) -> list[float] | str:
    """How far the agreement of each prompt changed, in points; where prompts cannot be paired, why."""
    there = {one.index: one for one in whole}
    pairs = [(there[one.index], one) for one in then if one.index in there]
    if not pairs:
        return "the choices of single samples are not beside the rows"
    if any(before.prompt_hash != after.prompt_hash for before, after in pairs):
        return "they did not read the same prompts"
    return [100 * (after.agreement - before.agreement) for before, after in pairs]


def agree_section(
    setting: AgreeSetting,
    placed: Sequence[Placed[AgreeRow]],
    choices: Mapping[tuple[str, int], Sequence[Choices]],
    margin: float = MARGIN,
) -> AgreeSection:
    """The section of rows of one setting, given the samples of each (label, length); none where they are not beside them."""
    answered = [choices.get((one.label, one.row.length), ()) for one in placed]
    known = iter(intervals([[np.array([sample.agreement for sample in found])] for found in answered if found], 0.0, 1.0))
    dense = {
        one.row.length: one.row for one in placed if one.label == "dense" and one.row.status == OK and one.row.agreement
    }
    cells = []
    for one, found in zip(placed, answered, strict=True):
        compared = one.label != "dense" and one.row.status == OK and one.row.agreement is not None
        of_dense = dense.get(one.row.length) if compared else None
        cells.append(AgreeCell(one.row, one.label, of_dense, found, next(known) if found else None))
    return AgreeSection(setting, cells, margin)
