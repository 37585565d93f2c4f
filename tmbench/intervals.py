"""How sure a difference to dense is: paired bootstrap intervals, what they say in words, and how many samples it takes.

Every method answers the same samples, so a method is held against dense sample by sample. What the samples have in common,
that some are hard for any method, then drops out of the difference, and far fewer samples tell the same loss.

**Interval.** The percentile bootstrap (Efron 1979, Annals of Statistics 7, 1-26): each task's paired differences are drawn
again with replacement, as many as there are; the mean over the draw is taken, for an average the plain mean of the tasks'
means; the 2.5 % and the 97.5 % quantile of ``RESAMPLES`` such means are the interval. Tasks are strata: each keeps its
number of samples. The seed is fixed, so that the same results make the same report. With fewer than about 50 samples a task
such an interval is too narrow.

**Words.** The margin is the loss that nobody minds, one point of a hundred unless the user says otherwise.

- "loss" and "gain": the interval excludes 0, and at least ``FEWEST_DIFFERING`` samples were answered differently. Fewer than
  that all fall on one side by chance too often: five once in 16 times, six once in 32 (the sign test).
- "no measurable loss": otherwise, where the interval ends above minus the margin, so that a loss of the margin is excluded,
  and there are at least ``unseen_samples`` samples. With fewer, a loss of the margin may have spared every sample that was
  asked: the rule of three (Hanley and Lippman-Hand 1983, JAMA 249, 1743-1745). An interval over samples that all came out
  alike has no width, whether they are three or three thousand.
- "too few samples": everything else.

**Samples needed.** So many a task that a method which loses nothing is told so in 80 of 100 measurements. With the standard
deviations ``s`` of the paired differences of T tasks, ``n = ((z(97.5 %) + z(80 %)) / margin)^2 * mean(s^2) / T``, the
sample size of a paired non-inferiority test (Julious 2004, Statistics in Medicine 23, 1921-1986), and ``unseen_samples`` in
all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
MARGIN = 1.0
"""Points of a hundred."""
SEED = 20_250_728
FEW_VALUES, DRAWS_AT_ONCE = 20, 2**22
FEWEST_DIFFERING = 6
Z_BOTH_SIDES, Z_POWER = 1.959964, 0.841621
"""Quantiles of the normal distribution at 97.5 % and 80 %."""

LOSS, GAIN, NO_LOSS, TOO_FEW = "loss", "gain", "no measurable loss", "too few samples"

Floats = NDArray[np.float64]


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
    """One of ``LOSS``, ``GAIN``, ``NO_LOSS`` and ``TOO_FEW``."""


def difference(strata: Sequence[Sequence[float] | Floats], margin: float = MARGIN) -> Difference:
    """The mean over tasks of the mean paired difference, with its interval.

    Args:
        strata: for each task the differences of its samples, method minus dense, in points from -100 to 100.
        margin: the loss in points that nobody minds.

    Raises:
        ValueError: there is no task, a task has no sample, or the margin is not above 0 and at most 100.
    """
    if not 0 < margin <= 100:
        raise ValueError(f"the margin must be above 0 and at most 100 points, not {margin}")
    tasks = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    if not tasks or not all(len(task) for task in tasks):
        raise ValueError("a difference needs at least one task, and each task at least one sample")
    low, high = interval(tasks)
    pairs, differing = sum(map(len, tasks)), sum(int(np.count_nonzero(task)) for task in tasks)
    return Difference(
        mean=float(np.mean([task.mean() for task in tasks])),
        low=low,
        high=high,
        pairs=pairs,
        differing=differing,
        tasks=len(tasks),
        needed=samples_needed(tasks, margin),
        verdict=in_words(low, high, pairs, differing, margin),
    )


def interval(tasks: Sequence[Floats]) -> tuple[float, float]:
    """The ends of the 95 % interval of the mean over tasks of each task's mean."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(bootstrap_means(tasks), [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_means(tasks: Sequence[Floats]) -> Floats:
    """``[RESAMPLES]`` means of the tasks' means, each task's samples drawn again with replacement."""
    generator = np.random.default_rng(SEED)
    total = np.zeros(RESAMPLES)
    for task in tasks:
        total += _drawn_means(generator, task)
    return total / len(tasks)


def _drawn_means(generator: np.random.Generator, task: Floats) -> Floats:
    values, counts = np.unique(task, return_counts=True)
    if FEW_VALUES * len(values) <= len(task):
        # Only values enter a mean, and how often each is drawn is multinomial: the same as drawing samples, and faster.
        means: Floats = generator.multinomial(len(task), counts / len(task), size=RESAMPLES) @ values / len(task)
        return means
    rows = max(1, DRAWS_AT_ONCE // len(task))
    ordered = np.repeat(values, counts)
    chunks = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([ordered[generator.integers(len(task), size=(n, len(task)))].mean(axis=1) for n in chunks])


def in_words(low: float, high: float, pairs: int, differing: int, margin: float) -> str:
    """What an interval from ``low`` to ``high`` over so many pairs says; the rule is above."""
    if (high < 0 or low > 0) and differing >= FEWEST_DIFFERING:
        return LOSS if high < 0 else GAIN
    return NO_LOSS if low > -margin and pairs >= unseen_samples(margin) else TOO_FEW


def unseen_samples(margin: float) -> int:
    """The fewest samples of which at least one shows a loss of ``margin`` points with 95 % probability.

    The loss is taken at its most hidden: few samples that lose all their 100 points, so each shows it with ``margin`` %.
    """
    return 1 if margin >= 100 else math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - margin / 100))


def samples_needed(tasks: Sequence[Floats], margin: float) -> int | None:
    """Samples a task for the margin; the formula is above. None where a task has only one sample, and so no spread."""
    if any(len(task) < 2 for task in tasks):
        return None
    variance = float(np.mean([task.var(ddof=1) for task in tasks])) / len(tasks)
    by_spread = ((Z_BOTH_SIDES + Z_POWER) / margin) ** 2 * variance
    return max(2, math.ceil(by_spread), math.ceil(unseen_samples(margin) / len(tasks)))
