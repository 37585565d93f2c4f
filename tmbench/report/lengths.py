"""Scores by length, in the layout of the publications: a line for each method, a column for each length, and their mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tmbench.report.comparable import labelled, order_of
from tmbench.report.intervals import Difference
from tmbench.report.ruler import RulerSection
from tmbench.report.settings import RulerSetting
from tmbench.report.table import Table, columns
from tmbench.report.words import NOTHING, interval_text
from tmbench.results.words import length_name


@dataclass(frozen=True)
class RulerLengths:
    """The averages of one model under one wording at several lengths."""

    sections: Sequence[RulerSection]
    """One for each length, the shortest first."""

    @property
    def title(self) -> str:
        about = self.sections[0].setting
        return f"{self.sections[0].suite} by length: {about.subject}, {about.words}"

    @cached_property
    def _own_labels(self) -> dict[str, dict[int, str]]:
        """For each method, dense first, its label in the section of each length that has it.

        A section names only those parameters in which its own variants differ; here those of all lengths are told apart.
        """
        cells = [cell for section in self.sections for cell in section.cells]
        order = order_of([cell.row for cell in cells])
        labels = [placed.label for placed in labelled([cell.row for cell in cells])]
        found: dict[str, dict[int, str]] = {}
        for cell, label in sorted(zip(cells, labels, strict=True), key=lambda pair: order(pair[0].row)):
            found.setdefault(label, {})[cell.row.length] = cell.label
        return found

    @property
    def labels(self) -> list[str]:
        """Every method that some length has, with the parameters that tell its variants apart."""
        return list(self._own_labels)

    def _found(self, label: str) -> Iterator[tuple[int, RulerSection, str]]:
        """The lengths that have the method of a label, each with its section and the method's label in it."""
        own = self._own_labels[label]
        return ((length, one, own[length]) for one in self.sections if (length := one.setting.length) in own)

    def averages(self, label: str) -> dict[int, float]:
        """The averages of the method of a label, at each length that has one."""
        return {length: one.averages[own] for length, one, own in self._found(label) if own in one.averages}

    def differences(self, label: str) -> dict[int, Difference]:
        """The average differences to dense of the method of a label, at each length that has one."""
        found = ((length, one.average_differences.get(own)) for length, one, own in self._found(label))
        return {length: each for length, each in found if isinstance(each, Difference)}

    def tables(self) -> list[Table]:
        """The averages, and how they differ from dense."""
        lengths = [section.setting.length for section in self.sections]
        names = [length_name(length) for length in lengths]
        scores, differences = [], []
        for label in self.labels:
            means, found = self.averages(label), self.differences(label)
            whole = f"{sum(means.values()) / len(means):.1f}" if len(means) == len(lengths) else NOTHING
            cells = [f"{means[length]:.1f}" if length in means else NOTHING for length in lengths]
            scores.append([label, *cells, whole])
            if found:
                words = [_words(found[length]) if length in found else NOTHING for length in lengths]
                differences.append([label, *words])
        tasks = " / ".join(dict.fromkeys(str(len(section.common_tasks)) for section in self.sections))
        tasks += " task" if tasks == "1" else " tasks"
        return [
            Table(
                f"Averages of {tasks}, from 0 to 100; the last column is their mean over the lengths:",
                columns("method", *names, "average", texts=("method",)),
                scores,
            ),
            Table(
                "Points against dense over the same samples, in brackets the 95 % interval:",
                columns("method", *names, texts=("method",)),
                differences,
            ),
        ]

    def notes(self) -> list[str]:
        """What a reader must know: sentences, only those that apply."""
        tasks = [section.common_tasks for section in self.sections]
        uneven = "The averages are not over the same tasks at every length: the sections below name them."
        return [uneven] if any(each != tasks[0] for each in tasks) else []


def _words(found: Difference) -> str:
    return f"{interval_text(found.mean, found.low, found.high, 1)}, {found.verdict}"


def by_length(sections: Iterable[RulerSection]) -> list[RulerLengths]:
    """Sections that differ in length alone, put together wherever there are two or more."""
    together: dict[RulerSetting, list[RulerSection]] = {}
    for section in sections:
        together.setdefault(replace(section.setting, length=0), []).append(section)
    return [
        RulerLengths(sorted(members, key=lambda one: one.setting.length))
        for members in together.values()
        if len(members) > 1
    ]
