"""Accuracy kept against time saved: methods and variants that were both timed and asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tmbench.report.effects import Effect, effects_of
from tmbench.report.intervals import Difference
from tmbench.report.ruler import RulerSection
from tmbench.report.section import Cell, Section
from tmbench.report.settings import TradeOffSetting, times_words
from tmbench.report.table import Table, columns
from tmbench.report.time_intervals import APART, FASTER, TimeDifference, compare_rows, time_text
from tmbench.report.ttft import FEW_REPEATS, NOT_INTERLEAVED, TtftCell, TtftSection
from tmbench.report.words import NOTHING, figure_text, interval_text
from tmbench.results.rows import TtftRow
from tmbench.results.words import counted, length_name


@dataclass(frozen=True)
class TradeOffCell(Cell[TtftRow]):
    """What a method saves of dense's time, and what it keeps."""

    time: TtftCell
    difference: Difference
    """The average difference to dense, in points."""
    front: bool
    """Whether it is on the Pareto front: timed in the same rounds as dense, and nothing else that was beats it. What beats
    another keeps as much accuracy in measurably less time, or more in no measurably longer time."""

    @property
    def figure(self) -> float | None:
        return self.saved_percent

    @property
    def saved_percent(self) -> float:
        """The part of dense's time that it saves, in percent."""
        assert self.time.percent_vs_dense is not None
        return -self.time.percent_vs_dense

    @property
    def saved_low(self) -> float | None:
        """The lower end of its 95 % interval; None where dense was not timed in the same rounds."""
        return None if self.time.percent_high is None else -self.time.percent_high

    @property
    def saved_high(self) -> float | None:
        """The upper end of it."""
        return None if self.time.percent_low is None else -self.time.percent_low

    @property
    def apart(self) -> bool:
        """Whether dense was timed in other rounds."""
        return self.time.verdict == APART

    @property
    def saved(self) -> str:
        """The time that it saves, in words."""
        return time_text(self.saved_percent, self.saved_low, self.saved_high, self.time.verdict)

    @property
    def points(self) -> str:
        """The points against dense with their interval."""
        return interval_text(self.difference.mean, self.difference.low, self.difference.high)


@dataclass(frozen=True)
class TradeOff(Section[TradeOffSetting, TradeOffCell]):
    """One model at one length, timed and asked: the methods beside dense, by the time that they save."""

    scores: RulerSection

    @property
    def title(self) -> str:
        about = self.setting
        template = f"{about.template}, " if about.chat_template else ""
        wording = f"wording {about.wording}, {about.drawn}{template}{self.scores.over}"
        setting = f"{about.subject}, {times_words(about)}, {wording}"
        return f"Accuracy kept against time saved at {length_name(about.length)}: {setting}"

    @cached_property
    def effects(self) -> list[Effect]:
        """What each parameter changes between neighbouring values, all others equal; and the shape at the same cost."""
        return effects_of([cell.time for cell in self.cells], self.labels, self.scores)

    def of_task(self, task: str) -> list[TradeOffCell]:
        """The same methods by their points on one task, with the front of these; those that were compared there."""
        found = {cell.label: cell.difference for cell in self.scores.cells if cell.row.task == task}
        kept = {}
        for cell in self.cells:
            difference = found.get(cell.label)
            if isinstance(difference, Difference):
                kept[cell.label] = cell.time, difference
        dense = self.cells[0].time.dense
        assert dense is not None
        return _placed(dense, kept)

    def tables(self) -> list[Table]:
        """The methods by the time that they save, and what single parameters change."""
        methods = [
            [
                cell.label,
                cell.saved,
                cell.points,
                cell.difference.words,
                figure_text(cell.row.coverage, ".1%"),
                NOTHING if cell.saved_low is None else "yes" if cell.front else "no",
            ]
            for cell in self.cells
        ]
        names = ("method", "time saved", "points against dense", "in words", "density", "on the Pareto front")
        effects = [
            [one.parameter, one.before, one.after, one.elsewhere, one.points_text, one.points.words, one.time]
            for one in self.effects
        ]
        changes = ("what changes", "from", "to", "elsewhere", "points", "in words", "time")
        return [
            Table(
                "The time saved over interleaved rounds, and the points, with their 95 % intervals. What is on the Pareto "
                "front is beaten by nothing else in both time and points, and times that do not measurably differ count as "
                "equal:",
                columns(*names, texts=("method", "in words")),
                methods,
            ),
            Table(
                "What one change does, by the same samples and with its 95 % interval:",
                columns(*changes, texts=("what changes", "elsewhere", "in words")),
                effects,
            ),
        ]

    def notes(self) -> list[str]:
        few = min(cell.row.repeats for cell in self.cells)
        notes = [f"Times of only {counted(few, 'repeat')}: fewer than {FEW_REPEATS} hardly tell what is faster."] * (
            few < FEW_REPEATS
        )
        apart = [cell.label for cell in self.cells if cell.apart]
        if apart:
            notes.append(f"{NOT_INTERLEAVED}: {'; '.join(apart)}.")
        return notes + super().notes()


def trade_offs(ttft: Sequence[TtftSection], ruler: Sequence[RulerSection]) -> list[TradeOff]:
    """All lengths at which methods were both timed beside dense and compared with it sample by sample."""
    found = []
    for scores in ruler:
        for times in ttft:
            newest = scores.setting.older_data == times.setting.older_prompt == 0
            alike = scores.setting.base == times.setting.base and scores.setting.threads == times.setting.threads
            if newest and alike:
                cells = _cells(times, scores)
                if cells:
                    found.append(TradeOff(TradeOffSetting.joined(scores.setting, times.setting), cells, scores))
    return found


@dataclass(frozen=True)
class _Point:
    row: TtftRow
    points: float


def _cells(times: TtftSection, scores: RulerSection) -> list[TradeOffCell]:
    timed = [cell for cell in times.measured() if cell.row.length == scores.setting.length]
    dense = next((cell for cell in timed if cell.label == "dense"), None)
    if dense is None:
        return []
    kept: dict[str, tuple[TtftCell, Difference]] = {}
    for cell in timed:
        label = scores.label_of.get((cell.row.method, cell.parameters), "")
        found = scores.average_differences.get(label)
        # A forced backend of dense attention is another time for the same scores: the one that tmbench chose comes first.
        if isinstance(found, Difference) and cell.percent_vs_dense is not None:
            kept.setdefault(label, (cell, found))
    return _placed(dense.row, kept)


def _placed(dense: TtftRow, kept: Mapping[str, tuple[TtftCell, Difference]]) -> list[TradeOffCell]:
    """Cells by label, the one that saves most last, on the front or behind it."""
    ordered = sorted(kept.items(), key=lambda one: -(one[1][0].percent_vs_dense or 0.0))
    known = [_Point(dense, 0.0)]
    known += [_Point(cell.row, found.mean) for cell, found in kept.values() if cell.percent_low is not None]
    cells = []
    for label, (cell, found) in ordered:
        own = _Point(cell.row, found.mean)
        beaten = any(_beats(other, own) for other in known if other.row is not own.row)
        cells.append(TradeOffCell(cell.row, label, cell, found, cell.percent_low is not None and not beaten))
    return cells


def _beats(one: _Point, other: _Point) -> bool:
    if one.points > other.points:
        return not _faster(other.row, one.row)
    return one.points == other.points and _faster(one.row, other.row)


def _faster(one: TtftRow, other: TtftRow) -> bool:
    found = compare_rows(one, other)
    return isinstance(found, TimeDifference) and found.verdict == FASTER
