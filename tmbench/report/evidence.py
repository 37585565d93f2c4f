"""What a method kept: the RULER score of the same settings that stands beside its time.

A time has evidence from scores of the same model, device and parameters, and of as many threads where there are any. Of
several sets of scores the one with the most tasks counts, then that with the most samples, then that of the nearest length;
the words say which it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tmbench.report.intervals import Difference
from tmbench.report.ruler import RulerCell, RulerSection
from tmbench.report.settings import TtftSetting
from tmbench.results.words import counted, length_name


@dataclass(frozen=True)
class Evidence:
    """The scores of one method and of dense over the tasks that both have, beside times of one setting."""

    times: TtftSetting
    scores: RulerSection
    label: str

    @cached_property
    def pairs(self) -> list[tuple[RulerCell, RulerCell]]:
        """Cells of the method and of dense, task by task."""
        dense = {cell.row.task: cell for cell in self.scores.measured("dense")}
        return [(cell, dense[cell.row.task]) for cell in self.scores.measured(self.label) if cell.row.task in dense]

    @cached_property
    def samples(self) -> list[int]:
        """How many samples of each task both answered."""
        return [min(own.row.samples, dense.row.samples) for own, dense in self.pairs]

    @property
    def other_prefill(self) -> bool:
        """Whether the scores' prompts were read by another prefill than the times'."""
        return self.scores.setting.accuracy_prefill != self.times.prefill

    def order(self, length: int) -> tuple[Any, ...]:
        """A key by which the best evidence of a time at a length comes first."""
        about = self.scores.setting
        far = abs(math.log(about.length / length))
        other = about.threads != self.times.threads
        most = (-len(self.pairs), -sum(self.samples))
        return other, about.older_data, *most, self.other_prefill, far, -about.length, self.scores.title

    @cached_property
    def difference(self) -> Difference | str | None:
        """The average difference to dense over the tasks that both have, or why there is none."""
        tasks = [cell.row.task for cell, _ in self.pairs]
        if sorted(tasks) != sorted(self.scores.paired_tasks):
            return self.scores.answers.compare(self.label, "dense", tasks)
        return self.scores.average_differences.get(self.label)

    @cached_property
    def words(self) -> str:
        """The two scores, over what they are, what is other than for the time, and what the difference says."""
        own, dense = (sum(cell.row.score or 0.0 for cell in cells) / len(cells) for cells in zip(*self.pairs, strict=True))
        least, most = min(self.samples), max(self.samples)
        each = counted(most, "sample") if least == most else f"{least} to {most} samples"
        over = f"{counted(len(self.pairs), 'task')} x {each} at {length_name(self.scores.setting.length)}"
        threads = self.scores.setting.threads
        if threads != self.times.threads:
            over += f" with {counted(threads, 'CPU thread')}, not {self.times.threads}"
        found = self.difference
        said = f": {found.verdict}" if isinstance(found, Difference) and self.label != "dense" else ""
        return f"RULER {own:.1f} (dense {dense:.1f}, {over}){said}"


def best_evidence(
    times: TtftSetting, method: str, parameters: str, length: int, scores: Sequence[RulerSection]
) -> Evidence | None:
    """The scores that count for a method's times up to a length; None where there are none.

    Args:
        parameters: as ``comparable.parameters_text`` gives them.
        scores: sections of the same device and model.
    """
    found = []
    for section in scores:
        evidence = Evidence(times, section, section.label_of.get((method, parameters), ""))
        if evidence.label and evidence.pairs:
            found.append(evidence)
    return min(found, key=lambda one: one.order(length), default=None)
