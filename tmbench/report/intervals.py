"""How sure a difference to dense is: intervals over paired samples, what they say in words, and how many samples it takes.

Every method answers the same samples, so a method is held against dense sample by sample. What the samples have in common,
that some are hard for any method, then drops out of the difference, and far fewer samples tell the same loss.

**Interval.** All means that are still likely, whatever the distribution of the differences (``tmbench.report.likelihood``).
A mean is in it if some distribution between -100 and 100 points has that mean and makes the samples at most 40 times less
likely than their own frequencies do: 40 is one in 2.5 %. That distribution may hold losses and gains of 100 points which no
sample showed, so an interval over samples that all came out alike is as wide as their number allows: of n samples without a
difference it ends at ``1 - 0.025^(1 / n)``, the exact bound. For differences of two values the 40 is Chernoff's inequality,
which always holds; for others it is measured, by ``benchmarks/interval_coverage.py``. Where samples are many the ends are
``Z_INTERVAL`` = 2.72 standard errors from the mean. Tasks are strata: their frequencies stay apart, each task counts alike,
and one sample of each task is spent on its own mean, so that tasks of one sample tell nothing.

**Words.** The non-inferiority margin is one point of a hundred, unless the user says otherwise.

- "loss" and "gain": the interval excludes 0. Fewer than six samples that differ never do that: a sample that lost is at best
  balanced by one unseen that would gain as much, and ``2^-5`` is more than 2.5 % (the sign test).
- "no measurable loss": otherwise, where the interval ends above minus the margin, so that a loss of the margin is excluded.
- "too few samples": everything else.

**Many comparisons.** By chance an interval excludes 0 on the side of a loss in 2.5 % of comparisons at most, so some of 130
do. Where a table has several, "loss" and "gain" are those that Holm's method confirms (Holm 1979, Scandinavian Journal of
Statistics 6, 65-70). The chance that one of a table's losses is none is then at most 2.5 %, however the comparisons hang
together, and the same holds of its gains. What excludes 0 by itself alone is a "possible loss" or a "possible gain".
Intervals stay as they are, of each comparison alone.

**Samples needed.** So many a task that a method which loses nothing is told so in 80 of 100 measurements. With the standard
deviations ``s`` of the paired differences of T tasks, ``n = ((2.72 + z(80 %)) / margin)^2 * mean(s^2) / T``, the sample size
of a paired non-inferiority test (Julious 2004, Statistics in Medicine 23, 1921-1986) with this interval's 2.72 in place of
1.96, and at least ``unseen_samples``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tmbench.report.likelihood import Floats, Strata, lowest_means, tabled

CONFIDENCE = 0.95
MARGIN = 1.0
"""Points of a hundred."""
ALLOWANCE = -math.log((1 - CONFIDENCE) / 2)
"""Natural logarithm of how many times less likely than their own frequencies the samples may become: 40 times."""
Z_INTERVAL, Z_POWER = math.sqrt(2 * ALLOWANCE), 0.841621
"""Standard errors to an end of the interval where samples are many, and the normal distribution's quantile at 80 %."""
DECIMALS = 7

LOSS, GAIN, NO_LOSS, TOO_FEW = "loss", "gain", "no measurable loss", "too few samples"
POSSIBLE = {LOSS: "possible loss", GAIN: "possible gain"}
"""What is said of an interval that excludes 0, where as many comparisons as there are may make one do so."""


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences and how sure it is; all figures in the differences' own unit, points for scores."""

    mean: float
    low: float
    high: float
    """The ends of the 95 % interval."""
    pairs: int
    """Samples that both answered, over all tasks."""
    differing: int
    """Those of them whose scores differ."""
    tasks: int
    needed: int | None
    """Samples a task that would tell a method without loss so; None where a task has only one sample, and so no spread."""
    verdict: str
    """One of ``LOSS``, ``GAIN``, ``NO_LOSS``, ``TOO_FEW`` and the values of ``POSSIBLE``."""
    variance: float | None
    """Of the mean over tasks of one sample each; None where a task has only one sample."""

    def at(self, margin: float) -> Difference:
        """The same difference for another margin; what excludes 0 does so for any."""
        spanning = self.verdict in (NO_LOSS, TOO_FEW)
        verdict = in_words(self.low, self.high, margin) if spanning else self.verdict
        return replace(self, needed=samples_needed(self.variance, self.tasks, margin), verdict=verdict)

    @property
    def words(self) -> str:
        """The verdict, and where there are too few samples how many a task it takes."""
        short = self.verdict == TOO_FEW and self.needed is not None
        return f"{self.verdict} ({self.needed} a task needed)" if short else self.verdict


def difference(strata: Sequence[Sequence[float] | Floats], margin: float = MARGIN) -> Difference:
    """The mean over tasks of the mean paired difference, with its interval.

    Args:
        strata: for each task the differences of its samples, method minus dense, in points from -100 to 100.
        margin: the non-inferiority margin in points.

    Raises:
        ValueError: there is no task, a task has no sample, a difference is not from -100 to 100, or the margin is not above
            0 and at most 100.
    """
    (found,) = differences([strata], margin)
    return found


def differences(comparisons: Sequence[Sequence[Sequence[float] | Floats]], margin: float = MARGIN) -> list[Difference]:
    """``difference`` of several comparisons, faster than one by one."""
    if not 0 < margin <= 100:
        raise ValueError(f"the margin must be above 0 and at most 100 points, not {margin}")
    taken = [[np.asarray(stratum, dtype=np.float64) for stratum in strata] for strata in comparisons]
    return [
        Difference(
            mean=float(np.mean([task.mean() for task in tasks])),
            low=low,
            high=high,
            pairs=sum(map(len, tasks)),
            differing=sum(int(np.count_nonzero(task)) for task in tasks),
            tasks=len(tasks),
            needed=samples_needed(variance := _variance(tasks), len(tasks), margin),
            verdict=in_words(low, high, margin),
            variance=variance,
        )
        for tasks, (low, high) in zip(taken, intervals(taken), strict=True)
    ]


def family(comparisons: Sequence[Sequence[Sequence[float] | Floats]], margin: float = MARGIN) -> list[Difference]:
    """``differences`` of all comparisons of a table, with "loss" and "gain" as Holm's method confirms them together."""
    found = differences(comparisons, margin)
    confirmed = {words: _confirmed(comparisons, [one.verdict == words for one in found], words) for words in POSSIBLE}
    return [
        one
        if one.verdict not in POSSIBLE or number in confirmed[one.verdict]
        else replace(one, verdict=POSSIBLE[one.verdict])
        for number, one in enumerate(found)
    ]


def _confirmed(comparisons: Sequence[Sequence[Sequence[float] | Floats]], excluding: Sequence[bool], words: str) -> set[int]:
    """Which comparisons exclude 0 on one side under Holm's method; ``excluding`` are those that do so alone.

    The step that confirms ``k`` of ``m`` tests all at 2.5 % of ``m - k``; what it confirms more makes the next one.
    """
    confirmed: set[int] = set()
    while True:
        left = [number for number, alone in enumerate(excluding) if alone and number not in confirmed]
        if not left:
            return confirmed
        allowance = ALLOWANCE + math.log(len(comparisons) - len(confirmed))
        taken = [[np.asarray(task, dtype=np.float64) for task in comparisons[number]] for number in left]
        ends = intervals(taken, allowance=allowance)
        more = {n for n, (low, high) in zip(left, ends, strict=True) if (high < 0 if words == LOSS else low > 0)}
        if not more:
            return confirmed
        confirmed |= more


def interval(tasks: Sequence[Floats], lowest: float = -100.0, highest: float = 100.0) -> tuple[float, float]:
    """The ends of the 95 % interval of the mean over tasks of each task's mean, for values between two bounds."""
    (found,) = intervals([tasks], lowest, highest)
    return found


def intervals(
    comparisons: Sequence[Sequence[Floats]],
    lowest: float = -100.0,
    highest: float = 100.0,
    allowance: float = ALLOWANCE,
) -> list[tuple[float, float]]:
    """``interval`` of several comparisons, of 95 % unless another ``allowance`` is given."""
    # Most tasks of most methods differ nowhere from dense: what is alike is computed once.
    keys = [tuple(np.asarray(task, dtype=np.float64).tobytes() for task in tasks) for tasks in comparisons]
    distinct = dict(zip(keys, comparisons, strict=True))
    found: dict[tuple[bytes, ...], tuple[float, float]] = {}
    for count in {len(key) for key in distinct}:
        alike = {key: tasks for key, tasks in distinct.items() if len(key) == count}
        found |= dict(zip(alike, _intervals(list(alike.values()), lowest, highest, allowance), strict=True))
    return [found[key] for key in keys]


def _intervals(
    comparisons: Sequence[Sequence[Floats]], lowest: float, highest: float, allowance: float
) -> list[tuple[float, float]]:
    if not comparisons:
        return []
    if not all(tasks and all(map(len, tasks)) for tasks in comparisons):
        raise ValueError("a difference needs at least one task, and each task at least one sample")
    for task in (task for tasks in comparisons for task in tasks):
        if not (lowest <= task.min() and task.max() <= highest):
            raise ValueError(f"values from {task.min():g} to {task.max():g} are not all from {lowest:g} to {highest:g}")
    values, shares = tabled(comparisons)
    middle, half = (lowest + highest) / 2, (highest - lowest) / 2
    scaled = np.where(shares > 0, (values - middle) / half, 0)
    counts = np.array([[len(task) for task in tasks] for tasks in comparisons], dtype=np.float64)
    several = counts.shape[1] > 1
    strata = Strata(scaled, shares, counts - several, np.full(counts.shape[1], 1 / counts.shape[1]))
    # Rounded, so that an interval is the same whatever it is computed together with.
    ends = [half * sign * lowest_means(one, allowance) for one, sign in ((strata, 1), (strata.mirrored, -1))]
    lows, highs = (np.round(middle + end, DECIMALS).tolist() for end in ends)
    return list(zip(lows, highs, strict=True))


def in_words(low: float, high: float, margin: float) -> str:
    """What an interval from ``low`` to ``high`` says; the rule is above."""
    if high < 0 or low > 0:
        return LOSS if high < 0 else GAIN
    return NO_LOSS if low > -margin else TOO_FEW


def by_chance(comparisons: int) -> float:
    """How many of so many intervals may exclude 0 on the side of a loss by chance alone, at most, on average."""
    return comparisons * (1 - CONFIDENCE) / 2


def unseen_samples(margin: float, tasks: int = 1) -> int:
    """The fewest samples a task that exclude a loss of ``margin`` points where no sample differs.

    The loss is taken at its most hidden: few samples that lose all their 100 points, so each shows it with ``margin`` %.
    """
    if margin >= 100:
        return 1 + (tasks > 1)
    together = ALLOWANCE / -math.log1p(-margin / 100)
    return math.ceil(together / tasks) + (tasks > 1)


def samples_needed(variance: float | None, tasks: int, margin: float) -> int | None:
    """Samples a task for the margin, given ``Difference.variance``; the formula is above."""
    if variance is None:
        return None
    by_spread = ((Z_INTERVAL + Z_POWER) / margin) ** 2 * variance
    return max(2, math.ceil(by_spread) + (tasks > 1), unseen_samples(margin, tasks))


def _variance(tasks: Sequence[Floats]) -> float | None:
    """Of the mean over tasks of one sample each; None where a task has only one sample, and so no spread."""
    if any(len(task) < 2 for task in tasks):
        return None
    return float(np.mean([task.var(ddof=1) for task in tasks])) / len(tasks)
