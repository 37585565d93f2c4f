"""What it costs to read prompts as engines do, in chunks or without their question: against one piece, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tmbench.report.answers import Answers
from tmbench.report.intervals import Difference
from tmbench.report.settings import RulerSetting

if TYPE_CHECKING:
    from tmbench.report.ruler import RulerSection


@dataclass(frozen=True)
class Served:
    """One method whose prompts were fed otherwise than in one piece with their question."""

    label: str
    fed: str
    """How, in words."""
    tasks: Sequence[str]
    """Those that both were asked, every sample of which is known."""
    whole: float
    """The average score over these tasks in one piece."""
    score: float
    difference: Difference | str
    """In points against one piece, over the same samples; in words why there is none."""


def in_one_piece(setting: RulerSetting) -> RulerSetting:
    """The setting that has nothing else in common with prompts in chunks or asked later than how it is asked."""
    return replace(setting, chunk=0, prompt_length="", ask_later=False)


def with_served(sections: Sequence[RulerSection]) -> list[RulerSection]:
    """The same sections, those of prompts in one piece with those that differ in nothing but how prompts were fed."""
    found: dict[RulerSetting, list[RulerSection]] = {}
    for section in sections:
        if section.setting.fed:
            found.setdefault(in_one_piece(section.setting), []).append(section)
    return [replace(section, served=found.get(section.setting, ())) for section in sections]


def served(whole: RulerSection) -> list[Served]:
    """Every method of a section as it was served, way by way."""
    return [one for other in whole.served for one in _against(whole, other)]


def _against(whole: RulerSection, other: RulerSection) -> list[Served]:
    about = {label: method for method, label in whole.label_of.items()}
    names = [(label, other.label_of[about[label]]) for label in whole.labels if about.get(label) in other.label_of]
    tasks = [
        task
        for task in whole.tasks
        if all(
            task in section.scores[label] and not section.answers.samples[label, task].missing
            for pair in names
            for section, label in zip((whole, other), pair, strict=True)
        )
    ]
    if not tasks:
        return []
    fed = other.setting.fed.removeprefix(", ")
    joined = Answers(
        {(label, task): whole.answers.samples[label, task] for label, _ in names for task in tasks}
        | {(f"{label}, {fed}", task): other.answers.samples[own, task] for label, own in names for task in tasks},
        whole.answers.margin,
    )
    found = joined.compare_all([(f"{label}, {fed}", label, tasks) for label, _ in names])
    means = [[sum(own[task] for task in tasks) / len(tasks) for own in (whole.scores[a], other.scores[b])] for a, b in names]
    return [
        Served(label, fed, tasks, before, after, difference)
        for (label, _), (before, after), difference in zip(names, means, found, strict=True)
    ]
