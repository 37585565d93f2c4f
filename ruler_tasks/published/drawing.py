"""The published search for a size, and the one stream of random numbers that all samples of a task come from.

One generator is seeded once. The search for a size draws a sample for each size that it tries; then sample follows sample,
each as large as the search found, and smaller by a fixed step as often as it is too long. So a sample depends on the
tokenizer, the length, and all that was drawn before it. Tokens are counted without special ones, as RULER counts them.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ruler_tasks.errors import TaskLengthError
from ruler_tasks.fit import Filled
from ruler_tasks.recipe import Setting

LONG_FROM = 4096
"""Lengths below are drawn with smaller steps and fewer repetitions."""

_MORE_DRAWS = 64  # at the smallest size; the published code would go on for ever


class UndrawableError(Exception):
    """A draw for which the published code raises an error: it counts as one that is too long."""


@dataclass(frozen=True)
class Start:
    """Where the samples begin: what the search found, and the state of the generators after it."""

    units: int
    state: Any
    example: str = ""
    limited: bool = False


class Drawing(ABC):
    """The samples of one task at one length.

    Attributes:
        step: units by which a sample that is too long shrinks; the search begins with as many.
        limited: whether a list of words that the published code has was missed.
    """

    step = 10
    example = ""
    limited = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.rng = random.Random(setting.seed)
        self.units = 0

    @abstractmethod
    def drawn(self, units: int, index: int) -> Filled:
        """The next sample with so many units of haystack; raises UndrawableError where there can be none."""

    @property
    @abstractmethod
    def source(self) -> str:
        """What the text is made of."""

    def counted(self, text: str) -> int:
        """Tokens of a text, special ones left out."""
        return self.setting.tokens.count_one(text, add_special_tokens=False)

    def shuffled(self, items: list[Any]) -> None:
        """Shuffles in place with a generator that is seeded anew each time: equally many items end up at equal places."""
        random.Random(self.setting.seed).shuffle(items)

    def probed(self, units: int) -> int:
        """The tokens of a sample that is drawn for the search."""
        return self.counted(self.drawn(units, 0).prompt)

    def search(self) -> int:
        """The units that samples are to have."""
        return search(self.probed, self.setting.length, self.setting.answer, self.step)

    def state(self) -> Any:
        """The state of all generators."""
        return self.rng.getstate()

    def restore(self, state: Any) -> None:
        """Sets all generators to a state."""
        self.rng.setstate(state)

    def sample(self, index: int) -> tuple[Filled, int]:
        """The next sample and its tokens; raises TaskLengthError where the published code would try for ever."""
        units = self.units
        for _ in range(units // self.step + _MORE_DRAWS):
            try:
                filled = self.drawn(units, index)
            except UndrawableError:
                pass
            else:
                tokens = self.counted(filled.prompt)
                if tokens + self.setting.answer <= self.setting.length:
                    return filled, tokens
            if units > self.step:
                units -= self.step
        raise too_short(self.setting)

    def begin(self) -> None:
        """Takes the generators to where the first sample is drawn. What the search finds is kept with the tokenizer."""
        setting = self.setting
        memo = setting.tokens.memo
        key = (
            "published", setting.task, setting.length, setting.answer, setting.seed, setting.wording, setting.frame,
            setting.sources,
        )  # fmt: skip
        if key not in memo:
            units = self.search()
            memo[key] = Start(units, self.state(), self.example, self.limited)
        start: Start = memo[key]
        self.units, self.example, self.limited = start.units, start.example, start.limited
        self.restore(start.state)


def too_short(setting: Setting) -> TaskLengthError:
    """The error for a length at which the published code never ends."""
    return TaskLengthError(
        f"Task {setting.task} finds no sample that fits {setting.length} tokens, drawn as the reference draws it: "
        "take a longer one."
    )


def search(
    probed: Callable[[int], int],
    length: int,
    answer: int,
    step: int,
    *,
    estimate_at: int | None = None,
    most: Callable[[float], int] | None = None,
) -> int:
    """The published search by halves between `step` units and a multiple of what an estimate gives.

    Args:
        probed: draws a sample of so many units and counts its tokens.
        answer: tokens that a sample takes beside those counted.
        estimate_at: the units of the first sample drawn, from which the tokens of a unit are estimated.
        most: the largest size tried, given the tokens of a unit; three times what would fill the length by default.
    """
    first = estimate_at or step
    each = probed(first) / first
    low, high = step, max(most(each) if most else int((length / each) * 3), step * 2)
    found = step
    while low <= high:
        middle = (low + high) // 2
        try:
            fits = probed(middle) + answer <= length
        except UndrawableError:
            fits = False
        if fits:
            found, low = middle, middle + 1
        else:
            high = middle - 1
    return found
