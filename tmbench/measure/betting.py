"""Whether a mean is below a margin, told as soon as it can be: a test that may be looked at after every sample.

A test bets against what it wants to refute (Waudby-Smith and Ramdas 2024, Journal of the Royal Statistical Society B 86,
1-27). Against "the mean is the margin or more" each sample multiplies a stake by ``1 + bet * (margin - value)``. If that is
so, the stake is not expected to grow. It then reaches ``1 / risk`` with at most that risk, at whatever number of samples one
looks (Ville's inequality), whatever the distribution. It needs bounded values: one counts for no more than ``cap``. The
stake is the mean of stakes with bets of all sizes, so nothing has to be known of the spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

ACCEPTED, REFUSED, UNDECIDED = "accepted", "refused", "undecided"
BETS = 100
"""Of how many sizes bets are, evenly up to the largest that never loses all."""
HALVINGS = 40


def capped(values: Sequence[float], cap: float) -> Floats:
    """The values, none of them further from zero than the cap."""
    return np.clip(np.asarray(values, dtype=np.float64), -cap, cap)


def judged(values: Sequence[float], margin: float, cap: float, risk: float, refusing: float) -> str:
    """Whether the mean of capped values is below the margin, above it, or neither is sure yet.

    Args:
        values: one or more, in the order in which they were drawn.
        margin: above 0 and below the cap.
        cap: what a value counts for at most.
        risk: of accepting a mean that is the margin or more.
        refusing: of refusing one that is the margin or less.
    """
    found = capped(values, cap)
    if not _stays(margin - found, cap - margin, risk):
        return ACCEPTED
    return UNDECIDED if _stays(found - margin, cap + margin, refusing) else REFUSED


def fewest(margin: float, cap: float, risk: float) -> int:
    """How many values it takes to accept a mean where all of them are zero."""
    count = 1
    while _stays(np.full(count, margin), cap - margin, risk):
        count += 1
    return count


def bounds(values: Sequence[float], cap: float, risk: float) -> tuple[float, float]:
    """The ends of an interval that holds the mean of capped values with all but this risk, whenever one looks."""
    found = capped(values, cap)
    return -_highest(-found, cap, risk / 2), _highest(found, cap, risk / 2)


def _highest(values: Floats, cap: float, risk: float) -> float:
    """The highest mean, up to the cap, that the values do not refute."""
    low, high = -cap, cap
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _stays(middle - values, cap - middle, risk) else (low, middle)
    return high


def _stays(gains: Floats, most: float, risk: float) -> bool:
    """Whether numbers, none of them below ``-most``, do not refute that their mean is zero or less, at this risk."""
    bets = np.arange(1, BETS + 1) / (BETS + 1) / most
    stakes = np.log1p(bets[:, None] * gains).sum(1)
    return bool(np.logaddexp.reduce(stakes) - math.log(BETS) < -math.log(risk))
