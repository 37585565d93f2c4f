"""What it costs to read prompts as engines do, in chunks or without their question: against one piece, sample by sample.

Whatever the figure, a method is held against itself: the same parameters on the same place, read in one piece. What makes a
difference of two cells, and what an interval is over, each kind of section says of its own figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tmbench.report.settings import Setting

if TYPE_CHECKING:
    from tmbench.report.section import Section

S = TypeVar("S", bound=Setting)
T = TypeVar("T", bound="Section[Any, Any]")
WHOLE: dict[str, Any] = {"chunk": 0, "prompt_length": "", "ask_later": False, "question_tokens": 0}
"""What settings have of prompts in one piece with their questions."""
CAPTION = "As it is served: {what} against the same method in one piece {over}:"


@dataclass(frozen=True)
class Way(Generic[T]):
    """Prompts of a section that were also fed otherwise than in one piece with their question."""

    read: str
    """How, in words."""
    other: T
    labels: Sequence[tuple[str, str]]
    """Of every method that both have: in one piece, and then."""

    def pairs(self, whole: T) -> Iterator[tuple[str, Any, Any]]:
        """The label, and the cells that both have figures of: in one piece, and then; method by method."""
        for label, own in self.labels:
            there = {cell.place: cell for cell in self.other.measured(own)}
            for cell in whole.measured(label):
                if cell.place in there:
                    yield label, cell, there[cell.place]


def in_one_piece(setting: S) -> S:
    """The setting that has nothing else in common with prompts in chunks or asked later than how it is asked."""
    own = vars(setting)
    return replace(setting, **{name: value for name, value in WHOLE.items() if name in own})


def with_served(sections: Sequence[T]) -> list[T]:
    """The same sections, those of prompts in one piece with those that differ in nothing but how prompts were fed."""
    found: dict[Setting, list[T]] = {}
    for section in sections:
        if section.setting.fed:
            found.setdefault(in_one_piece(section.setting), []).append(section)
    return [replace(section, served=found.get(section.setting, ())) for section in sections]


def ways(whole: T) -> list[Way[T]]:
    """How the prompts of a section were fed otherwise."""
    about = {label: method for method, label in whole.label_of.items()}
    found = []
    others: Sequence[Any] = whole.served
    for other in others:
        names = [(label, other.label_of[about[label]]) for label in whole.labels if about.get(label) in other.label_of]
        found.append(Way(other.setting.read.removeprefix(", "), other, names))
    return found
