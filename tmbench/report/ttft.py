"""Times to first token of one model on one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tmbench.methods.table import LAYERS, NATIVE, STATIC_PATTERNS
from tmbench.report.break_even import break_even
from tmbench.report.comparable import Placed
from tmbench.report.evidence import Evidence, best_evidence
from tmbench.report.ruler import RulerSection
from tmbench.report.section import Cell, Section, file_notes, places_text, status_text
from tmbench.report.served import CAPTION, ways
from tmbench.report.settings import TtftSetting, older_words
from tmbench.report.slower_kernels import slower_than_dense
from tmbench.report.table import Table, columns
from tmbench.report.time_intervals import NO_DIFFERENCE, UNKNOWN_REPEATS, TimeDifference, compare_rows, interleaved
from tmbench.report.words import HALF_COUNTED, NOTHING, SKIPPED, figure_text, percent_text, significant
from tmbench.results.rows import OK, TtftRow
from tmbench.results.variants import pattern_settings
from tmbench.results.words import length_name

FEW_REPEATS = 3
SLOWER_KERNEL = "slower kind of kernel"
NOT_INTERLEAVED = "Not interleaved with dense, so the machine may have changed in between"


@dataclass(frozen=True)
class TtftCell(Cell[TtftRow]):
    """One time, and how it compares with dense's."""

    dense: TtftRow | None
    """Dense's row of the same length; None for dense itself, and where either has no time."""

    @property
    def figure(self) -> float | None:
        return self.row.ttft_median_s

    @property
    def seconds(self) -> float:
        """The median of a cell that came out well."""
        assert self.row.ttft_median_s is not None
        return self.row.ttft_median_s

    @cached_property
    def against(self) -> TimeDifference | str:
        """The time against dense's over the same rounds; in words why there is none, "" without dense's time."""
        return "" if self.dense is None else compare_rows(self.row, self.dense)

    @property
    def percent_vs_dense(self) -> float | None:
        """The time against dense's in percent: over the rounds, or of medians that were not measured together."""
        if isinstance(self.against, TimeDifference):
            return self.against.percent
        if self.dense is None or self.row.ttft_median_s is None or self.dense.ttft_median_s is None:
            return None
        return 100 * (self.row.ttft_median_s / self.dense.ttft_median_s - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Of batches above one: of a single prompt it would say what its time says."""
        return self.row.tokens_per_second if self.row.batch_size > 1 else None

    @property
    def percent_low(self) -> float | None:
        """The lower end of its 95 % interval."""
        return self.against.low if isinstance(self.against, TimeDifference) else None

    @property
    def percent_high(self) -> float | None:
        """The upper end of its 95 % interval."""
        return self.against.high if isinstance(self.against, TimeDifference) else None

    @property
    def verdict(self) -> str:
        """What the time against dense says, or why it says nothing."""
        return self.against.verdict if isinstance(self.against, TimeDifference) else self.against

    @property
    def text(self) -> str:
        """The median, and in brackets the time against dense and whether a slower kind of kernel took it."""
        if not self.known:
            return status_text(self)
        percent = self.percent_vs_dense
        if self.verdict == NO_DIFFERENCE:
            said = [NO_DIFFERENCE]
        else:
            said = [] if percent is None else [percent_text(percent, 0)]
            said += [self.against] if percent is not None and isinstance(self.against, str) else []
        said += [SLOWER_KERNEL] if self.slower_kernel else []
        return significant(self.seconds) + (f" ({', '.join(said)})" if said else "")

    @property
    def slower_kernel(self) -> str:
        """Which of its patterns ran on a slower kind of kernel than dense did; "" where none did."""
        return slower_than_dense(self.row.backends, "" if self.dense is None else self.dense.backends)

    @property
    def parameters_with_source(self) -> str:
        """The parameters in words, and where the choice of layers comes from."""
        source = f" ({self.row.layers_source})" if self.row.layers_source else ""
        given = pattern_settings(self.row).items()
        return ", ".join(f"{name} {value}{source * (name == LAYERS)}" for name, value in given)

    @property
    def chooses_by_the_data(self) -> bool:
        """Whether a pattern that ran chooses its keys by the data."""
        return not {name.partition(":")[0] for name in self.row.backends.split("+")} <= {"", *STATIC_PATTERNS, *NATIVE}


@dataclass(frozen=True)
class TtftSection(Section[TtftSetting, TtftCell]):
    """The times of several methods by length, and beside them what each method kept."""

    scores: Sequence[RulerSection] = ()
    """Those of the same device and model."""

    @property
    def title(self) -> str:
        about = self.setting
        return f"Time to first token: {about.subject}, {about.words}{older_words('prompt', about.older_prompt)}"

    def break_even(self, label: str) -> tuple[int | None, str]:
        """The shortest length from which on the method is faster than dense wherever the two were interleaved, in tokens
        and in words: see ``tmbench.report.break_even``."""
        return break_even({cell.row.length: cell.verdict for cell in self.measured(label) if cell.verdict})

    @cached_property
    def evidence(self) -> dict[str, Evidence | None]:
        """For each label the scores that count for it."""
        found = {}
        for label in self.labels:
            cells = [cell for cell in self.cells if cell.label == label]
            longest = max(cell.row.length for cell in cells)
            found[label] = best_evidence(self.setting, cells[0].row.method, cells[0].parameters, longest, self.scores)
        return found

    def fidelity(self, label: str) -> str:
        """What the method of a label kept: its worst logit error, and its best RULER evidence."""
        rows = [cell.row for cell in self.cells if cell.label == label]
        errors = [(row.logit_error, length_name(row.length)) for row in rows if row.logit_error is not None]
        # A logit error that is not a number is the worst there is, and compares with nothing.
        worst = max(errors, key=lambda error: (math.isnan(error[0]), error[0]), default=None)
        kept = [f"logit error {worst[0]:.2g} at {worst[1]}"] if worst else []
        evidence = self.evidence[label]
        if evidence is not None:
            kept.append(evidence.words)
        elif kept and self.scores:
            kept.append("no RULER score with these parameters")
        return "; ".join(kept) or "not measured"

    def tables(self) -> list[Table]:
        """Times by method and length, break-even lengths, the times against dense, and details."""
        return [self._times(), self._break_evens(), self._against(), self._served(), self._details()]

    def _times(self) -> Table:
        lengths = sorted({cell.row.length for cell in self.cells})
        texts = {(cell.label, cell.row.length): cell.text for cell in self.cells}
        kept = {label: "the reference" if label == "dense" else self.fidelity(label) for label in self.labels}
        return Table(
            "Median seconds; in brackets the time against dense, the median over interleaved rounds, so less is faster:",
            columns("method", *map(length_name, lengths), "fidelity", texts=("method", "fidelity")),
            [[label, *(texts.get((label, length), NOTHING) for length in lengths), kept[label]] for label in self.labels],
        )

    def _break_evens(self) -> Table:
        first = {cell.label: cell for cell in reversed(self.cells) if cell.row.method != "dense"}
        names = ("method", "faster than dense", "parameters")
        return Table(
            "Break-even, the shortest prompt from which on a method is faster than dense at every length measured:",
            columns(*names, texts=names),
            [[name, self.break_even(name)[1], first[name].parameters_with_source] for name in self.labels if name in first],
        )

    def _against(self) -> Table:
        lines = []
        for cell in self.measured():
            if isinstance(found := cell.against, TimeDifference):
                ends = f"{percent_text(found.low)} to {percent_text(found.high)}"
                place = length_name(cell.row.length)
                lines.append([cell.label, place, percent_text(found.percent), ends, found.verdict])
        return Table(
            "Time against dense over the same interleaved rounds, and what it says:",
            columns("method", "length", "median", "95 % interval", "in words", texts=("method", "in words")),
            lines,
            details=True,
        )

    def _served(self) -> Table:
        """A line for each cell and each other way in which its prompts were fed."""
        lines = []
        for one in served_times(self):
            seconds = [significant(cell.seconds) for cell in (one.whole, one.then)]
            known = one.against if isinstance(one.against, TimeDifference) else None
            ends = f"{percent_text(known.low)} to {percent_text(known.high)}" if known else NOTHING
            said = known.verdict if known else str(one.against)
            lines.append([one.label, one.read, length_name(one.length), *seconds, percent_text(one.percent), ends, said])
        names = ("method", "read", "length", "in one piece, s", "then, s", "time", "95 % interval", "in words")
        return Table(
            CAPTION.format(what="times", over="over the same interleaved rounds"),
            columns(*names, texts=("method", "read", "in words")),
            lines,
        )

    def _details(self) -> Table:
        names = [
            "method", "length", "min s", "max s", "repeats", "density", "TTFT / roofline", "logit error", "same first token",
            "backends",
        ]  # fmt: skip
        lines = [
            [
                cell.label,
                length_name(cell.row.length),
                figure_text(cell.row.ttft_min_s, significant),
                figure_text(cell.row.ttft_max_s, significant),
                str(cell.row.repeats),
                figure_text(cell.row.coverage, ".1%"),
                figure_text(cell.row.ttft_over_floor, ".3g"),
                figure_text(cell.row.logit_error, ".2g"),
                {True: "yes", False: "no", None: NOTHING}[cell.row.same_token_as_dense],
                cell.row.backends,
            ]
            for cell in self.measured()
        ]
        if self.setting.batch_size > 1:
            names.append("tokens/s")
            for line, cell in zip(lines, self.measured(), strict=True):
                line.append(figure_text(cell.tokens_per_second, ",.0f"))
        if any(cell.row.skipped_share is not None for cell in self.measured()):
            names.append(SKIPPED)
            for line, cell in zip(lines, self.measured(), strict=True):
                line.append(figure_text(cell.row.skipped_share, ".1%"))
        peaks = [cell.row.peak_memory_bytes for cell in self.measured()]
        if any(peaks):
            names.append("peak GiB")
            for line, peak in zip(lines, peaks, strict=True):
                line.append(figure_text(peak and peak / 2**30, ".1f"))
        return Table("Details:", columns(*names, texts=("method", "backends")), lines, details=True)

    def notes(self) -> list[str]:
        cells = self.measured()
        dense = {cell.row.length: cell.row for cell in cells if cell.label == "dense"}
        apart = [cell for cell in cells if cell.row.length in dense and not interleaved(cell.row, dense[cell.row.length])]
        few = [cell for cell in cells if cell.row.repeats < FEW_REPEATS]
        random, structured = (self.setting.weights == drawn for drawn in ("random", "structured"))
        chosen = any(cell.chooses_by_the_data for cell in cells)
        unknown = [cell for cell in cells if cell.verdict == UNKNOWN_REPEATS]
        notes = {
            "The weights are random: methods that choose keys by the data cost more than on trained weights, and what they "
            "keep means nothing. These figures do not transfer to a trained model.": random and chosen,
            "The weights are random: the times of these methods do not depend on them, but what the methods keep does, so "
            "logit errors and first tokens say nothing about a trained model.": random and not chosen,
            "The weights are structured: drawn so that attention has local bands, slashes, sinks and columns. A method that "
            "chooses keys by the data costs what it would on trained weights only if its density would be the same; logit "
            "errors and first tokens say nothing about a trained model.": structured,
            "Dense has no time here, so there is nothing to compare with.": not dense,
            f"{NOT_INTERLEAVED}: {places_text(apart, cells)}.": bool(apart),
            f"Fewer than {FEW_REPEATS} repeats, so the spread is hardly known: {places_text(few, cells)}.": bool(few),
            HALF_COUNTED: any(cell.row.skipped_share is not None for cell in cells),
            **self._kernel_notes(),
            **self._prefill_notes(),
            f"The single repeats are not in the rows, so what is faster is not known: {places_text(unknown, cells)}.": (
                bool(unknown)
            ),
        }
        return [note for note, applies in notes.items() if applies] + file_notes(self.cells) + super().notes()

    def _kernel_notes(self) -> dict[str, bool]:
        """Which times are not those of the kind of kernel that dense had."""
        cells = self.measured()
        slower: dict[str, list[TtftCell]] = {}
        for cell in cells:
            slower.setdefault(cell.slower_kernel, []).append(cell)
        return {
            f"A {SLOWER_KERNEL} than dense's took part of these times: {words} ({places_text(slow, cells)}).": True
            for words, slow in slower.items()
            if words
        }

    def _prefill_notes(self) -> dict[str, bool]:
        """Which scores that stand beside times were measured on another prefill."""
        cited = {label: one for label, one in self.evidence.items() if one is not None and label != "dense"}
        others: dict[str, list[str]] = {}
        for label, one in cited.items():
            if one.other_prefill:
                others.setdefault(one.scores.setting.accuracy_prefill, []).append(label)
        return {
            f"Scores beside these times are of the {prefill} prefill, not of the {self.setting.prefill} one that was timed"
            f"{'' if len(labels) == len(cited) else ': ' + '; '.join(labels)}.": True
            for prefill, labels in others.items()
        }


@dataclass(frozen=True)
class ServedTime:
    """One time of one method whose prompts were fed otherwise than in one piece with their question."""

    label: str
    read: str
    """How they were fed, in words."""
    whole: TtftCell
    """In one piece."""
    then: TtftCell

    @property
    def length(self) -> int:
        return self.whole.row.length

    @property
    def against(self) -> TimeDifference | str:
        """The time against one piece over the same rounds; in words why there is none."""
        return compare_rows(self.then.row, self.whole.row)

    @property
    def percent(self) -> float:
        """The time against one piece in percent: over the rounds, or of medians that were not measured together."""
        found = self.against
        return found.percent if isinstance(found, TimeDifference) else 100 * (self.then.seconds / self.whole.seconds - 1)


def served_times(whole: TtftSection) -> list[ServedTime]:
    """Every method of a section as it was served, way by way."""
    return [ServedTime(label, way.read, cell, then) for way in ways(whole) for label, cell, then in way.pairs(whole)]


def ttft_section(
    setting: TtftSetting, placed: Sequence[Placed[TtftRow]], scores: Sequence[RulerSection] = ()
) -> TtftSection:
    """The section of rows of one setting; of all scores those of the same device and model count."""
    known = [one for one in placed if one.row.status == OK]
    dense = {one.row.length: one.row for one in known if one.label == "dense" and one.row.ttft_median_s}
    cells = []
    for label, row in ((one.label, one.row) for one in placed):
        compared = label != "dense" and row.status == OK and row.ttft_median_s is not None
        cells.append(TtftCell(row, label, dense.get(row.length) if compared else None))
    return TtftSection(setting, cells, [section for section in scores if section.setting.base == setting.base])
