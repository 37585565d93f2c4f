"""The published search for a size, and the one stream of random numbers that all samples of a task come from.

One generator is seeded once. The search for a size draws a sample for each size that it tries; then sample follows sample,
each as large as the search found, and smaller by a fixed step as often as it is too long. So a sample depends on the
tokenizer, the length, and all that was drawn before it. Tokens are counted without special ones, as RULER counts them.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ruler_tasks.errors import SeedError, TaskLengthError
from ruler_tasks.example import Example
from ruler_tasks.fit import Filled
from ruler_tasks.niah import Niah
from ruler_tasks.qa import Questions
from ruler_tasks.recipe import Recipe, Setting
from ruler_tasks.tokens import TokenCounter
from ruler_tasks.tracking import Tracking
from ruler_tasks.words import CommonWords, FrequentWords

LONG_FROM = 4096
"""Lengths below are drawn with smaller steps and fewer repetitions."""

_MORE_DRAWS = 64  # at the smallest size; the published code would go on for ever
_LARGEST_SEED = 2**32 - 1  # what numpy's generator takes


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


def published_examples(recipe: Recipe, setting: Setting, indices: Iterable[int]) -> Iterator[Example]:
    """The samples with these numbers, in their order; those in between are drawn and dropped.

    Raises:
        SeedError: the seed is larger than the published generators take.
        TaskLengthError: the first sample does not fit the length; later ones raise as they are asked for.
    """
    if setting.seed > _LARGEST_SEED:
        raise SeedError(f"The seed {setting.seed} is too large for the reference's draws: take one up to {_LARGEST_SEED}.")
    drawing = _drawing(recipe, setting)
    try:
        drawing.begin()
    except UndrawableError as error:
        raise too_short(setting) from error
    drawing.sample(0)
    return _generate(recipe, setting, indices)


def _generate(recipe: Recipe, setting: Setting, indices: Iterable[int]) -> Iterator[Example]:
    drawing = _drawing(recipe, setting)
    drawing.begin()
    at = 0
    for index in indices:
        if index < at:
            drawing.begin()
            at = 0
        while at <= index:
            filled, tokens = drawing.sample(at)
            at += 1
        yield Example(
            task=setting.task,
            index=index,
            input=filled.input,
            answer_prefix=filled.answer_prefix,
            outputs=filled.outputs,
            length=tokens + setting.answer,
            max_new_tokens=setting.answer,
            source=drawing.source,
            position=None if filled.answer_at is None else partial(_tokens_before, setting.tokens, filled),
            parameters=filled.parameters,
        )


def _tokens_before(tokens: TokenCounter, filled: Filled) -> int:
    return tokens.count_one(filled.input[: filled.answer_at], add_special_tokens=False)


def _drawing(recipe: Recipe, setting: Setting) -> Drawing:
    # These modules are made of what stands above.
    from ruler_tasks.published.documents import DocumentDrawing
    from ruler_tasks.published.needles import NeedleDrawing
    from ruler_tasks.published.variables import ChainDrawing
    from ruler_tasks.published.word_lists import CodedWordDrawing, WordListDrawing

    match recipe:
        case Niah():
            return NeedleDrawing(setting, recipe)
        case Tracking():
            return ChainDrawing(setting, recipe.hops)
        case CommonWords():
            return WordListDrawing(setting)
        case FrequentWords():
            return CodedWordDrawing(setting)
        case Questions():
            return DocumentDrawing(setting, recipe)
        case _:
            raise TypeError(f"There is no published way to draw {recipe!r}.")
