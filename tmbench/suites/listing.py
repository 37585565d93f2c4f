"""Drafts whose text is a list in random order: as many lines as fit, any of which the question may be about."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ruler_tasks.fit import Filled
from ruler_tasks.lines import LineTokens
from ruler_tasks.recipe import Fitting

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What is asked of a list."""

    text: str
    """The prompt up to the answer prefix; "{lines}" stands for the list."""
    prefix: str
    """How the answer begins, which is part of the prompt."""
    outputs: tuple[str, ...]
    """The reference answers."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """What was drawn among the task's settings."""


class Listing(ABC, Generic[T]):
    """What the lines of one sample say, drawn one after the other, so that more of them leave the first as they are."""

    least: int
    """The fewest lines of a sample."""

    @abstractmethod
    def first(self, count: int) -> list[T]:
        """The first so many."""

    @abstractmethod
    def line(self, item: T) -> str:
        """One as a line."""

    @abstractmethod
    def question(self, items: Sequence[T]) -> Question:
        """What is asked of these, in the order in which a prompt shows them; the same for the same ones."""


class ListDraft(Generic[T]):
    """A sample whose number of lines is open. The unit is a line."""

    def __init__(self, setting: Fitting, listing: Listing[T], line: LineTokens, rng: random.Random) -> None:
        """``line`` is what a line is planned with."""
        self._setting = setting
        self._listing = listing
        self._line = line
        self._order = rng.getrandbits(64)
        least = self._filled(listing.first(listing.least))
        self._base = setting.count_one(least.prompt) - listing.least * line.mean

    def fill(self, room: int) -> Filled:
        return self._filled(self._listing.first(self._line.most(room - self._base, self._listing.least)))

    def _filled(self, items: list[T]) -> Filled:
        random.Random(self._order).shuffle(items)
        asked = self._listing.question(items)
        text = asked.text.replace("{lines}", "\n".join(map(self._listing.line, items)))
        return Filled(self._setting.frame.around(text), asked.prefix, asked.outputs, len(items), parameters=asked.parameters)
