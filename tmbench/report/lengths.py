"""RULER by length, in the layout of the publications: a line for each method, a column for each length, and their mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from tmbench.report.groups import SETTING, RulerGroup, in_order, interval_text, label
from tmbench.report.intervals import Difference
from tmbench.results.words import length_name

ACROSS = tuple(name for name in SETTING["ruler"] if name != "length")


@dataclass(frozen=True)
class RulerLengths:
    """The averages of one model under one wording at several lengths."""

    setting: Mapping[str, Any]
    """What the lengths have in common."""
    groups: Sequence[RulerGroup]
    """One for each length, the shortest first."""

    @property
    def title(self) -> str:
        at = f"RULER at {length_name(self.groups[0].setting['length'])}"
        return self.groups[0].title.replace(at, "RULER by length", 1)

    @cached_property
    def _own_labels(self) -> dict[str, dict[int, str]]:
        """For each method, dense first, its label in the group of each length that has it.

        A group names only those parameters in which its own variants differ; here those of all lengths are told apart.
        """
        rows = [row | {"own": row["label"]} for group in self.groups for row in group.rows]
        label(rows)
        found: dict[str, dict[int, str]] = {}
        for row in sorted(rows, key=in_order):
            found.setdefault(row["label"], {})[row["length"]] = row["own"]
        return found

    @property
    def labels(self) -> list[str]:
        """Every method that some length has, with the parameters that tell its variants apart."""
        return list(self._own_labels)

    def _found(self, name: str) -> Iterator[tuple[int, RulerGroup, str]]:
        """The lengths that have the method of a label, each with its group and the method's label in it."""
        own = self._own_labels[name]
        return ((length, group, own[length]) for group in self.groups if (length := group.setting["length"]) in own)

    def averages(self, name: str) -> dict[int, float]:
        """The averages of the method of a label, at each length that has one."""
        return {length: group.averages[own] for length, group, own in self._found(name) if own in group.averages}

    def differences(self, name: str) -> dict[int, Difference]:
        """The average differences to dense of the method of a label, at each length that has one."""
        found = ((length, group.average_differences.get(own)) for length, group, own in self._found(name))
        return {length: each for length, each in found if isinstance(each, Difference)}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Captions and tables of texts: the averages, and how they differ from dense."""
        names = {group.setting["length"]: length_name(group.setting["length"]) for group in self.groups}
        scores, differences = [], []
        for name in self.labels:
            means, found = self.averages(name), self.differences(name)
            cells = {names[length]: f"{means[length]:.1f}" if length in means else None for length in names}
            whole = f"{sum(means.values()) / len(means):.1f}" if len(means) == len(names) else None
            scores.append({"method": name, **cells, "average": whole})
            if found:
                words = {names[length]: _words(found[length]) if length in found else None for length in names}
                differences.append({"method": name, **words})
        tasks = " / ".join(dict.fromkeys(str(len(group.common_tasks)) for group in self.groups))
        tasks += " task" if tasks == "1" else " tasks"
        over = f"Averages of {tasks}, from 0 to 100; the last column is their mean over the lengths:"
        return {
            over: pd.DataFrame(scores),
            "Points against dense over the same samples, in brackets the 95 % interval:": pd.DataFrame(differences),
        }

    def notes(self) -> list[str]:
        """What a reader must know: sentences, only those that apply."""
        tasks = [group.common_tasks for group in self.groups]
        uneven = "The averages are not over the same tasks at every length: the sections below name them."
        return [uneven] if any(each != tasks[0] for each in tasks) else []


def _words(found: Difference) -> str:
    return f"{interval_text(found.mean, found.low, found.high, 1)}, {found.verdict}"


def by_length(groups: Iterable[RulerGroup]) -> list[RulerLengths]:
    """Groups that differ in length alone, put together wherever there are two or more."""
    together: dict[tuple[Any, ...], list[RulerGroup]] = {}
    for group in groups:
        together.setdefault(tuple(group.setting[name] for name in ACROSS), []).append(group)
    return [
        RulerLengths(dict(zip(ACROSS, key, strict=True)), sorted(members, key=lambda one: one.setting["length"]))
        for key, members in together.items()
        if len(members) > 1
    ]
