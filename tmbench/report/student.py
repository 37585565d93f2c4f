"""Student's t distribution: how far the mean of a few values may be from the truth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache

CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the 95 % interval of the mean of two or more values."""
    reach = quantile(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - reach, mean + reach


@cache
def quantile(count: int) -> float:
    """The 97.5 % quantile for a mean of so many values, two or more, to four decimals: 12.7062, 4.3027, 3.1824, ..."""
    low, high = 1.0, 13.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, count - 1) < CONFIDENCE else (low, middle)
    return round(high, 4)


def _within(t: float, freedom: int) -> float:
    """The probability of a value from -t to t (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
