"""Figures as a report writes them: rounded, signed, and a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable

NOTHING = "-"
SKIPPED = "tiles skipped"
"""The name of a share of tiles that were skipped while attention was computed."""
HALF_COUNTED = (
    "Where tiles were skipped while attention was computed, a pair of a skipped tile counts half in the density: queries "
    "and keys were multiplied, values were not."
)


def significant(value: float) -> str:
    """Seconds with three significant digits: 0.0412, 3.60, 34.5, 128."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(decimals, 0)}f}"


def signed(value: float, decimals: int) -> str:
    """Points with their sign; what rounds to nothing is +0, whichever side it comes from."""
    return f"{round(value, decimals) + 0.0:+.{decimals}f}"


def percent_text(percent: float, decimals: int = 1) -> str:
    """A change in percent with its sign; what rounds to nothing is 0."""
    return f"{signed(percent, decimals) if round(percent, decimals) else '0'} %"


def ends_text(low: float, high: float, decimals: int = 2) -> str:
    """The ends of an interval of points. One that rounds to nothing keeps its side of 0, which words go by."""
    return " to ".join(f"{end + 0.0:+.{decimals}f}" for end in (low, high))


def interval_text(mean: float, low: float, high: float, decimals: int = 2) -> str:
    """Points with the ends of their interval."""
    return f"{signed(mean, decimals)} ({ends_text(low, high, decimals)})"


def figure_text(value: float | None, form: str | Callable[[float], str]) -> str:
    """A figure by a format or a function, and a dash for none."""
    if value is None:
        return NOTHING
    return format(value, form) if isinstance(form, str) else form(value)
