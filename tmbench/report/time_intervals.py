"""How sure a difference of two times is: intervals over repeats that were interleaved.

Methods are interleaved (A B C A B C), so the repeats of one round belong together: what changed from round to round, a
clock or another program on the same cores, changed both. Each round gives one ratio of two times. If the two take equally
long, it is as likely that the one of a round is the slower as the other, so the logarithm of the ratio is spread evenly
about 0, however uneven the times are.

**Figure.** The median of the rounds' ratios: one slow repeat does not move it far.

**Interval**, 95 %, over the logarithms of the ratios. From ``FEWEST_RANKED`` rounds on it is that of the signed-rank test
(Wilcoxon 1945, Biometrics Bulletin 1, 80-83; Hodges and Lehmann 1963, Annals of Mathematical Statistics 34, 598-611): of the
means of all pairs of rounds, a round with itself included, so many are cut off at both ends that the exact distribution of
the ranks leaves at most 5 %. Fewer rounds have no such interval: then it is Student's t interval of the mean, which one slow
repeat makes wide, and which keeps its level where slow repeats are common. It is stretched to the median where it would
leave that out.

**Words.** "faster" and "slower" where the interval excludes 0, "no measurable difference" where it does not. One repeat, or
times that were not interleaved, say neither.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, combinations_with_replacement, takewhile

from tmbench.report.student import mean_interval
from tmbench.report.words import percent_text, signed
from tmbench.results.rows import TtftRow

CONFIDENCE = 0.95
FEWEST_RANKED, MANY_RANKED = 6, 50
"""Beyond so many the ranks' sum counts as normal."""
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no measurable difference"
FAR = 1000
"""Percent beyond which an end of an interval is not told: two repeats that differ have one in the millions."""
APART, ONE_REPEAT, UNKNOWN_REPEATS = "not interleaved", "one repeat", "repeats not known"


@dataclass(frozen=True)
class TimeDifference:
    """A time against another, in percent of the other: negative is faster."""

    percent: float
    low: float
    high: float
    """The ends of the 95 % interval."""

    @property
    def verdict(self) -> str:
        """One of ``FASTER``, ``SLOWER`` and ``NO_DIFFERENCE``."""
        if self.low <= 0 <= self.high:
            return NO_DIFFERENCE
        return FASTER if self.high < 0 else SLOWER


def interleaved(one: TtftRow, other: TtftRow) -> bool:
    """Whether two TTFT rows of one length come from the same rounds: then what changed over time changed both."""
    return one.rounds == other.rounds


def compare_rows(one: TtftRow, other: TtftRow) -> TimeDifference | str:
    """The time of one TTFT row against another's of the same length; in words why there is none."""
    return _compared(one.samples_s, other.samples_s) if interleaved(one, other) else APART


@lru_cache(maxsize=2**14)
def _compared(one: str, other: str) -> TimeDifference | str:
    """``compare_rows`` of the repeats of two rows. Fronts ask for the same pair again for every task."""
    own, others = _seconds(one), _seconds(other)
    if not own or len(own) != len(others):
        return UNKNOWN_REPEATS
    return ONE_REPEAT if len(own) == 1 else time_difference(own, others)


def time_difference(own: Sequence[float], others: Sequence[float]) -> TimeDifference:
    """Times in seconds against others, round by round.

    Raises ValueError for fewer than two rounds, unequal numbers, and times that are not above 0.
    """
    if len(own) < 2 or len(own) != len(others) or not all(0 < value < math.inf for value in (*own, *others)):
        raise ValueError("times are compared over two or more rounds, each with two times above 0")
    ratios = [a / b for a, b in zip(own, others, strict=True)]
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.median(ratios)
    low, high = _ranked(logs) if len(logs) >= FEWEST_RANKED else mean_interval(logs)
    percent, low, high = (100 * (ratio - 1) for ratio in (middle, math.exp(low), math.exp(high)))
    return TimeDifference(percent, min(low, percent), max(high, percent))


def time_text(percent: float, low: float | None, high: float | None, words: str) -> str:
    """A change of a time with its interval; without one, why there is none."""
    if low is None or high is None:
        return f"{percent_text(percent)}, {words}"
    ends = f"{_end(low)} to {_end(high)}"
    return f"{NO_DIFFERENCE} ({ends} %)" if words == NO_DIFFERENCE else f"{percent_text(percent)} ({ends})"


def _end(percent: float) -> str:
    """An end of an interval of percent."""
    return signed(percent, 1) if abs(percent) <= FAR else f"{'over +' if percent > 0 else 'below -'}{FAR}"


@lru_cache(maxsize=2**14)
def _seconds(text: str) -> Sequence[float]:
    """The repeats of a row, in their order; empty where it has none that can be read."""
    try:
        found = [float(word) for word in text.split()]
    except ValueError:
        return []
    return found if all(0 < value < math.inf for value in found) else []


def _ranked(logs: Sequence[float]) -> tuple[float, float]:
    means = sorted((a + b) / 2 for a, b in combinations_with_replacement(logs, 2))
    cut = _cut(len(logs))
    return means[cut], means[-1 - cut]


@cache
def _cut(rounds: int) -> int:
    """How many of the means of pairs are left out at each end: the largest sum of ranks below which 2.5 % or less lies."""
    if rounds > MANY_RANKED:
        spread = math.sqrt(rounds * (rounds + 1) * (2 * rounds + 1) / 24)
        return int(rounds * (rounds + 1) / 4 - 1.959964 * spread)
    ways = [1]
    for rank in range(1, rounds + 1):
        ways = [a + b for a, b in zip(ways + [0] * rank, [0] * rank + ways, strict=True)]
    likely = accumulate(count / 2**rounds for count in ways)
    return len(list(takewhile(lambda part: part <= (1 - CONFIDENCE) / 2, likely))) - 1
