"""What one change does: two variants of a method that differ in one parameter, or in their shape at the same cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tmbench.report.comparable import in_value_order
from tmbench.report.intervals import Difference
from tmbench.report.ruler import RulerSection
from tmbench.report.time_intervals import APART, TimeDifference, compare_rows, time_text
from tmbench.report.ttft import TtftCell
from tmbench.report.words import NOTHING, interval_text
from tmbench.results.parameters_text import Value
from tmbench.results.variants import parameter_names, pattern_settings

SAME_COST = 0.005
"""Densities that differ by less than this part of themselves count as the same cost."""
SHAPE = "shape at the same cost"
WINDOW, LAST = "n_local", "last_n"
"""The two parameters of a triangle's shape that can be exchanged for each other."""


@dataclass(frozen=True)
class Effect:
    """The second of two variants against the first."""

    parameter: str
    before: str
    after: str
    """The values, or the parameters that make the two shapes."""
    elsewhere: str
    """What the two have in common among the parameters in which any variants here differ."""
    points: Difference
    """Over the same samples."""
    times: TimeDifference | str
    """Over the same rounds: negative is faster. In words why there is none."""

    @property
    def time_percent(self) -> float | None:
        """The change of the time; None where it is not known."""
        return self.times.percent if isinstance(self.times, TimeDifference) else None

    @property
    def time(self) -> str:
        """The change of the time in words."""
        if isinstance(self.times, str):
            return NOTHING if self.times == APART else self.times
        return time_text(self.times.percent, self.times.low, self.times.high, self.times.verdict)

    @property
    def points_text(self) -> str:
        """The points with their interval."""
        return interval_text(self.points.mean, self.points.low, self.points.high)


@dataclass(frozen=True)
class Variant:
    """A method at one setting, as it was timed, under its label among the scores."""

    cell: TtftCell
    label: str

    @property
    def settings(self) -> dict[str, Value]:
        return pattern_settings(self.cell.row)

    def without(self, *names: str) -> tuple[str, frozenset[tuple[str, Value]]]:
        """The method and all other parameters: variants that agree in it differ in these names alone."""
        return self.cell.row.method, frozenset(item for item in self.settings.items() if item[0] not in names)


def effects_of(cells: Sequence[TtftCell], labels: Sequence[str], scores: RulerSection) -> list[Effect]:
    """The effects between neighbouring values of each parameter, and of the shape at the same cost.

    Args:
        cells: the timed variants.
        labels: what each is called in ``scores``.
    """
    variants = [Variant(cell, label) for cell, label in zip(cells, labels, strict=True)]
    found = []
    for name in parameter_names(cell.row for cell in cells):
        # Numbers, and layers from one on, are neighbours of each other, and texts of texts.
        alike: dict[tuple[bool, tuple[str, frozenset[tuple[str, Value]]]], list[Variant]] = {}
        for one in variants:
            if name in one.settings:
                is_text = in_value_order(name, one.settings[name])[0]
                alike.setdefault((is_text, one.without(name)), []).append(one)
        for key in sorted(alike, key=lambda key: key[0]):
            ordered = sorted(alike[key], key=lambda one: in_value_order(name, one.settings[name]))
            found += [_effect(name, (name,), pair, variants, scores) for pair in pairwise(ordered)]
    found += [_effect(SHAPE, (WINDOW, LAST), pair, variants, scores) for pair in _same_cost(variants)]
    return [effect for effect in found if effect is not None]


def _effect(
    parameter: str, names: Sequence[str], pair: tuple[Variant, Variant], variants: Sequence[Variant], scores: RulerSection
) -> Effect | None:
    """None where the two agree with dense's samples but not with each other's beyond those."""
    first, second = pair
    points = scores.answers.compare(second.label, first.label, scores.paired_tasks)
    if not isinstance(points, Difference):
        return None
    own = first.settings
    differing = [name for name in own if name not in names and len({one.settings.get(name, "") for one in variants}) > 1]
    several = len({one.cell.row.method for one in variants}) > 1
    common = [first.cell.row.method] * several + [f"{name} {own[name]}" for name in differing]
    if len(names) == 1:
        before, after = str(own[parameter]), str(second.settings[parameter])
    else:
        before, after = (", ".join(f"{name} {one.settings[name]}" for name in names) for one in pair)
    times = compare_rows(second.cell.row, first.cell.row)
    return Effect(parameter, before, after, ", ".join(common), points, times)


def _same_cost(variants: Sequence[Variant]) -> Iterator[tuple[Variant, Variant]]:
    """Variants without last queries and a wider window, and those with last queries that compute as many pairs."""
    shaped = [one for one in variants if WINDOW in one.settings and LAST in one.settings]
    for second in shaped:
        for first in shaped:
            own, other = first.settings, second.settings
            wider = in_value_order(WINDOW, own[WINDOW]) > in_value_order(WINDOW, other[WINDOW])
            exchanged = own[LAST] == 0 and other[LAST] != 0 and wider
            if not exchanged or first.without(WINDOW, LAST) != second.without(WINDOW, LAST):
                continue
            costs = first.cell.row.coverage, second.cell.row.coverage
            if (
                costs[0] is not None
                and costs[1] is not None
                and abs(costs[0] - costs[1]) <= SAME_COST * min(costs[0], costs[1])
            ):
                yield first, second
