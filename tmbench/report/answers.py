"""The single answers behind scores, held against each other sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tmbench.report.intervals import MARGIN, Difference, differences, family
from tmbench.results.sample_scores import Samples


@dataclass(frozen=True)
class Answers:
    """What every method answered to the samples of every task, by (label, task)."""

    samples: Mapping[tuple[str, str], Samples] = field(default_factory=dict)
    margin: float = MARGIN
    """The non-inferiority margin in points."""

    def compare(self, label: str, reference: str, tasks: Sequence[str]) -> Difference | str:
        """The paired difference of two labels over tasks, in points; where a task cannot be compared, why."""
        pairs = self.pairs(label, reference, tasks)
        return pairs if isinstance(pairs, str) else differences([pairs], self.margin)[0]

    def compare_all(self, wanted: Sequence[tuple[str, str, Sequence[str]]]) -> list[Difference | str]:
        """``compare`` of all that a table has, each over equally many tasks, with "loss" and "gain" confirmed together."""
        pairs = [self.pairs(*one) for one in wanted]
        known = iter(family([each for each in pairs if not isinstance(each, str)], self.margin))
        return [each if isinstance(each, str) else next(known) for each in pairs]

    def complete(self, tasks: Sequence[str], labels: Sequence[str]) -> list[str]:
        """Those tasks for which every sample of every label is known."""
        return [task for task in tasks if all(not self.samples[label, task].missing for label in labels)]

    def pairs(self, label: str, reference: str, tasks: Sequence[str]) -> list[list[float]] | str:
        """For each task the paired differences of two labels; where a task cannot be compared, why."""
        strata = []
        for task in tasks:
            answers = [self.samples.get((name, task)) or Samples(missing="not measured") for name in (label, reference)]
            for name, answer in zip((label, reference), answers, strict=True):
                if answer.missing:
                    return f"{name} on {task}: {answer.missing}"
            own, other = answers
            pairs = [index for index in own.scores if index in other.scores]
            if not pairs or not all(own.same(other, index) for index in pairs):
                return f"{label} and {reference} on {task}: they did not answer the same samples"
            strata.append([100 * (own.scores[index] - other.scores[index]) for index in pairs])
        return strata or "no task in common"
