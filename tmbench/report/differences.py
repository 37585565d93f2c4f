"""Paired differences as tables and records have them."""

from __future__ import annotations

from tmbench.report.intervals import Difference
from tmbench.report.words import NOTHING, ends_text, figure_text, signed

NOT_COMPARED = "not compared: "
DIFFERENCE_COLUMNS = ("points", "95 % interval", "in words", "pairs", "differing", "samples a task needed")


def verdict_of(found: Difference | str) -> str:
    """What a difference says, or why there is none, in words."""
    if isinstance(found, Difference):
        return found.verdict
    return f"{NOT_COMPARED}{found}" if found else ""


def difference_texts(found: Difference | str, decimals: int = 2) -> list[str]:
    """The cells below ``DIFFERENCE_COLUMNS``."""
    if not isinstance(found, Difference):
        return [NOTHING, NOTHING, verdict_of(found), *[NOTHING] * 3]
    return [
        signed(found.mean, decimals),
        ends_text(found.low, found.high, decimals),
        found.verdict,
        str(found.pairs),
        str(found.differing),
        figure_text(found.needed, "d"),
    ]
