"""Claims of the TriangleMix publication, and what an interval of rows says of each; rendered into docs/claims.md.

A claim says where a figure lies: above a bound, below one, or between two. What was measured has an interval. A claim is

- supported where all of the interval lies strictly within the claim's bounds,
- refuted where all of it lies strictly outside of them,
- undecided where a part of it lies on either side or an end on a bound, and where there is no interval,
- not measured where there are no rows.

Nothing else decides, so no verdict is ever typed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tmbench.report.table import Table, columns
from tmbench.report.writers import table_markdown

SUPPORTED, REFUTED, UNDECIDED, NOT_MEASURED = "supported", "refuted", "undecided", "not measured"
VERDICTS = (SUPPORTED, REFUTED, UNDECIDED, NOT_MEASURED)


@dataclass(frozen=True)
class Claim:
    """Where a figure lies if the publication is right."""

    text: str
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low < self.high or (math.isinf(self.low) and math.isinf(self.high)):
            raise ValueError(f"{self.text!r} claims nothing: a bound is needed, and the lower one below the upper one")


@dataclass(frozen=True)
class Found:
    """One figure with its interval, in the claim's own unit."""

    where: str
    """The model, the length and the device."""
    text: str
    """The figure and its interval, with the unit."""
    ends: tuple[float, float] | None
    """None where single samples or repeats are not known."""
    over: str = ""
    """What the interval is over."""


def verdict(claim: Claim, found: Found | None) -> str:
    """One of ``VERDICTS``, by the rules above; raises ValueError for ends that are no interval."""
    if found is None:
        return NOT_MEASURED
    if found.ends is None:
        return UNDECIDED
    low, high = found.ends
    if not low <= high:
        raise ValueError(f"{found.where}: from {low} to {high} is no interval")
    if claim.low < low and high < claim.high:
        return SUPPORTED
    return REFUTED if high < claim.low or low > claim.high else UNDECIDED


@dataclass(frozen=True)
class Judged:
    """A claim with all that was found of it, each found by itself."""

    claim: Claim
    found: Sequence[Found]
    missing: str = ""
    """Why there are no rows, where there are none."""

    @property
    def verdicts(self) -> list[str]:
        return [verdict(self.claim, one) for one in self.found] or [NOT_MEASURED]

    @property
    def words(self) -> str:
        """All verdicts together: each with how often it stands, where they are not all alike."""
        counts = Counter(self.verdicts)
        if len(counts) == 1:
            return self.verdicts[0]
        return ", ".join(f"{name} {counts[name]} of {len(self.found)}" for name in VERDICTS if counts[name])

    def lines(self) -> list[list[str]]:
        """A line for each figure, or one that says why there is none."""
        if not self.found:
            return [[self.claim.text, self.missing, "", "", NOT_MEASURED]]
        return [
            [self.claim.text, one.where, one.text, one.over, said]
            for one, said in zip(self.found, self.verdicts, strict=True)
        ]


def claims_table(judged: Sequence[Judged]) -> str:
    """Every figure beside its claim."""
    names = ("the claim", "measured on", "measured (its interval)", "over", "verdict")
    return table_markdown(Table("", columns(*names, texts=names), [line for one in judged for line in one.lines()]))


def verdicts_table(groups: Sequence[tuple[str, Sequence[Judged]]]) -> str:
    """A line for each claim: its verdicts together."""
    names = ("about", "the claim", "verdict")
    rows = [[name, one.claim.text, one.words] for name, judged in groups for one in judged]
    return table_markdown(Table("", columns(*names, texts=names), rows))
