"""What a method kept, in words that stand beside its time: its logit error, and its RULER score of the same settings.

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

from tmbench.report.groups import MODEL, Record, RulerGroup, TtftGroup
from tmbench.report.intervals import Difference
from tmbench.results.words import counted, length_name


@dataclass(frozen=True)
class Evidence:
    """The scores of one method and of dense over the tasks that both have."""

    scores: RulerGroup
    label: str

    @cached_property
    def pairs(self) -> list[tuple[Record, Record]]:
        """Rows of the method and of dense, task by task."""
        dense = {row["task"]: row for row in self.scores.measured("dense")}
        return [(row, dense[row["task"]]) for row in self.scores.measured(self.label) if row["task"] in dense]

    @cached_property
    def samples(self) -> list[int]:
        """How many samples of each task both answered."""
        return [min(own["samples"], dense["samples"]) for own, dense in self.pairs]

    def order(self, times: TtftGroup, length: int) -> tuple[Any, ...]:
        """A key by which the best evidence of a time comes first."""
        about = self.scores.setting
        far = abs(math.log(about["length"] / length))
        other = about["threads"] != times.setting["threads"]
        return other, about["older_data"], -len(self.pairs), -sum(self.samples), far, -about["length"], self.scores.title

    def words(self, times: TtftGroup) -> str:
        """The two scores, over what they are, what is other than for the time, and what the difference says."""
        own, dense = (sum(row["score"] for row in rows) / len(rows) for rows in zip(*self.pairs, strict=True))
        least, most = min(self.samples), max(self.samples)
        each = counted(most, "sample") if least == most else f"{least} to {most} samples"
        over = f"{counted(len(self.pairs), 'task')} x {each} at {length_name(self.scores.setting['length'])}"
        threads = self.scores.setting["threads"]
        if threads != times.setting["threads"]:
            over += f" with {counted(threads, 'CPU thread')}, not {times.setting['threads']}"
        tasks = [row["task"] for row, _ in self.pairs]
        found: Difference | str | None = self.scores.average_differences.get(self.label)
        if sorted(tasks) != sorted(self.scores.paired_tasks):
            found = self.scores.compare(self.label, "dense", tasks)
        said = f": {found.verdict}" if isinstance(found, Difference) and self.label != "dense" else ""
        return f"RULER {own:.1f} (dense {dense:.1f}, {over}){said}"


def fidelity(times: TtftGroup, label: str, ruler: Sequence[RulerGroup]) -> str:
    """What the method of a label kept: its worst logit error, and its best RULER evidence."""
    rows = [row for row in times.rows if row["label"] == label]
    errors = [(row["logit_error"], length_name(row["length"])) for row in rows if row["logit_error"] is not None]
    # A logit error that is not a number is the worst there is, and compares with nothing.
    worst = max(errors, key=lambda error: (math.isnan(error[0]), error[0]), default=None)
    kept = [f"logit error {worst[0]:.2g} at {worst[1]}"] if worst else []
    same = [scores for scores in ruler if all(scores.setting[name] == times.setting[name] for name in MODEL)]
    wanted = (rows[0]["method"], rows[0]["parameters"])
    found = []
    for scores in same:
        labels = {(row["method"], row["parameters"]): row["label"] for row in reversed(scores.rows)}
        evidence = Evidence(scores, labels.get(wanted, ""))
        if evidence.label and evidence.pairs:
            found.append(evidence)
    longest = max(row["length"] for row in rows)
    if found:
        kept.append(min(found, key=lambda one: one.order(times, longest)).words(times))
    elif kept and same:
        kept.append("no RULER score with these parameters")
    return "; ".join(kept) or "not measured"
