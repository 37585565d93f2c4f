"""How many lines of random contents fit a room, planned from the mean and the spread of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, pstdev

from ruler_tasks.fit import largest
from ruler_tasks.recipe import Fitting

_SPREAD = 2.0  # standard deviations by which the first prompt of random lines is kept below the room
_MANY, _FEW = 2048, 128
_LONG = 16384


@dataclass(frozen=True)
class LineTokens:
    """Mean and standard deviation of the tokens of a line, the newline in front of it included."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, setting: Fitting, key: tuple[Hashable, ...], lines: Callable[[int], Sequence[str]]) -> LineTokens:
        """Those of some lines made for the purpose; a long prompt is planned with more of them.

        Args:
            key: what such lines depend on: for the same they are counted once.
            lines: makes so many.
        """
        count = _MANY if setting.length > _LONG else _FEW
        memo = setting.tokens.memo
        if (*key, count) not in memo:
            anchor, *counts = setting.tokens.count([".", *(f".\n{line}" for line in lines(count))], add_special_tokens=False)
            memo[*key, count] = cls(fmean(counts) - anchor, pstdev(counts))
        found: LineTokens = memo[*key, count]
        return found

    def cost(self, count: int) -> float:
        """Tokens that so many lines hardly exceed."""
        return count * self.mean + _SPREAD * self.deviation * sqrt(count)

    def most(self, room: float, least: int) -> int:
        """The most lines believed to take at most `room` tokens, or `least`."""
        return largest(self.cost, room, least, int(room / self.mean))
