"""Finds the largest prompt of a sample that fits a length, in one or two tokenisations.

A task hands over a `Draft`: a sample whose random choices are made and whose size is still open. `fit` asks it for the
largest prompt that it believes to take a number of tokens, has that prompt counted exactly, and asks again with the
error of the belief corrected, until the prompt fits and no more would. Prompts are counted in small batches, which
uses all cores; each sample's outcome depends on its own counts alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

_ROUNDS = 12
_SLACK = 256  # 1/256 of the budget may stay empty: less than a tokenisation of a long prompt is worth
_LEAST_SLOPE = 1 / 16
_CAUTION = 1000  # the first prompt leaves 1/1000 of the budget free, for a belief that is off by a few tokens


@dataclass(frozen=True)
class Filled:
    """A prompt of one size.

    Attributes:
        input: the text up to the answer prefix, frame included.
        answer_prefix: the text after it.
        outputs: the reference answers.
        size: in the task's own unit; of two prompts of one draft the larger has the larger size.
        answer_at: the character of `input` at which the first answer begins, where the task keeps it.
        parameters: what was chosen for this sample among the task's settings, by RULER's names; see `Example`.
    """

    input: str
    answer_prefix: str
    outputs: tuple[str, ...]
    size: int
    answer_at: int | None = None
    parameters: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def prompt(self) -> str:
        """The whole text."""
        return self.input + self.answer_prefix


class Draft(Protocol):
    """A sample whose size is still open."""

    def fill(self, room: int) -> Filled:
        """The largest prompt believed to take at most `room` tokens, or the smallest there is.

        Equal rooms give equal prompts, and a larger room never a smaller one.
        """


Fit = tuple[Filled, int] | None
"""A prompt and its exact number of tokens, or None where not even the smallest one fits."""


def fit(draft: Draft, budget: int) -> Generator[Filled, int, Fit]:
    """Yields prompts, is sent the exact token count of each, and returns the largest found within `budget` tokens.

    It is a secant search between a room whose prompt fits and one whose prompt does not, and ends after a fixed number
    of rounds at any budget.
    """
    best: Fit = None
    fits, over, too_large = 0, 1 << 40, 1 << 40  # rooms known to fit and not to, and the size of the latter's prompt
    slope, last = 1.0, None
    room = budget - budget // _CAUTION
    filled = draft.fill(room)
    for _ in range(_ROUNDS):
        tokens = yield filled
        if tokens <= budget:
            best, fits = (filled, tokens), room
            if (budget - tokens) * _SLACK <= budget:
                break
        else:
            over, too_large = room, filled.size
        if last is not None and last[0] != room:
            slope = min(max((tokens - last[1]) / (room - last[0]), _LEAST_SLOPE), 1 / _LEAST_SLOPE)
        last = room, tokens
        room += int((budget - tokens) / slope)
        if not fits < room < over:
            room = (fits + over) // 2
        filled = draft.fill(room)
        while filled.size >= too_large and room > fits + 1:
            over, room = room, (fits + room) // 2
            filled = draft.fill(room)
        if filled.size >= too_large or (best is not None and filled.size <= best[0].size):
            break
    return best


def in_step(fits: Sequence[Generator[Filled, int, Fit]], count: Callable[[Sequence[str]], list[int]]) -> list[Fit]:
    """Runs several fits side by side, counting the prompts of each round in one batch.

    Args:
        fits: generators of `fit`, not yet started.
        count: the exact tokens of each of some texts.
    """
    results: list[Fit] = [None] * len(fits)
    waiting = {number: next(generator) for number, generator in enumerate(fits)}
    while waiting:
        counts = count([filled.prompt for filled in waiting.values()])
        still: dict[int, Filled] = {}
        for number, tokens in zip(waiting, counts, strict=True):
            try:
                still[number] = fits[number].send(tokens)
            except StopIteration as end:
                results[number] = end.value
        waiting = still
    return results


def most_units(cumulative: Sequence[float], room: float) -> int:
    """How many units fit: `cumulative[i]` is what the first i + 1 of them take."""
    return bisect_right(cumulative, room)


def largest(cost: Callable[[int], float], room: float, least: int, start: int) -> int:
    """The largest n >= `least` with cost(n) <= `room`, or `least`; the cost must not fall as n grows.

    Args:
        start: a first guess, for speed.
    """
    high = max(start, least + 1)
    while cost(high) <= room:
        high *= 2
    low = least
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= room else (low, middle)
    return low
