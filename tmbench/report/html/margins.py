"""The margins that a reader may choose, and what a difference says at each of them."""

from __future__ import annotations

from collections.abc import Sequence

from tmbench.report.html.charts import Says
from tmbench.report.intervals import TOO_FEW, Difference
from tmbench.results.words import counted

OFFERED = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
"""Points of a hundred."""


def margins_with(margin: float) -> list[float]:
    """The margins of the slider, that of the report among them."""
    return sorted({*OFFERED, margin})


def says(found: Difference, margins: Sequence[float]) -> Says:
    """The words of a difference at each margin."""
    return Says([_words(found.at(margin), margin) for margin in margins])


def _words(found: Difference, margin: float) -> str:
    """The verdict, and where there are too few samples how many more of each task a method without loss needs."""
    if found.verdict != TOO_FEW or found.needed is None:
        return found.verdict
    more = found.needed - found.pairs // found.tasks
    if more > 0:
        return f"{found.verdict}, needs {counted(more, 'more sample')} a task"
    return f"{found.verdict}, as a loss of {margin:g} is not excluded"
