"""What the pages' scripts draw: axes, and series of points that bring their words along.

The scripts draw SVG themselves. Of the libraries that could be inlined, Bokeh (1.3 MB) draws on a canvas, and the points of
Plotly (4.8 MB) take no focus: with neither can a point be reached by keyboard or read by a screen reader. Both take their
colours from a script and not from the page, and hold addresses of servers. Only lines, points and intervals are drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tmbench.report.length_lines import named_lengths
from tmbench.report.plot_style import COLOURS, DASHED, method_look
from tmbench.results.words import length_name

Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Axis:
    """One axis; ``ticks`` are values with their names, in place of those that the script chooses."""

    name: str
    scale: Scale = "linear"
    ticks: Sequence[tuple[float, str]] | None = None
    ends: tuple[float, float] | None = None
    """What it must reach, at least."""


@dataclass(frozen=True)
class Point:
    """A place, the ends of its intervals where there are any, and what is said of it."""

    x: float
    y: float
    words: str
    length: int
    """By which the filters find it."""
    y_ends: tuple[float, float] | None = None
    x_ends: tuple[float, float] | None = None
    filled: bool = True
    tag: str = ""
    """What stands beside it while points of several lengths are shown."""
    says: Says | None = None
    """What depends on the margin."""


@dataclass(frozen=True)
class Says:
    """What an interval says at each margin of the slider: its words, or the samples that it lacks for others."""

    words: Sequence[str]


@dataclass(frozen=True)
class Series:
    """Points of one method, joined by a line or apart."""

    name: str
    colour: str
    marker: str
    dash: int
    """0 for a solid line; -1 for no line."""
    points: Sequence[Point]
    of: str = ""
    """The series whose switch it shares, where that is another."""


@dataclass(frozen=True)
class Front:
    """The corners of what nothing beats at one length, as steps: a corner holds up to the next one."""

    length: int
    corners: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A figure for one of the scripts."""

    name: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    bands: Sequence[tuple[float, float]] = ()
    """Stretches of the horizontal axis that are marked."""
    fronts: Sequence[Front] = ()
    margins: Sequence[float] = ()
    """The margins that points speak of; the chart then shows the chosen one as a line."""


def chart_of(name: str, x: Axis, y: Axis, series: Sequence[Series], **more: Any) -> Chart:
    """A chart of those points that have a place on its axes; series without any are left out."""

    def placed(value: float, axis: Axis) -> bool:
        return math.isfinite(value) and (axis.scale == "linear" or value > 0)

    kept = [replace(one, points=[each for each in one.points if placed(each.x, x) and placed(each.y, y)]) for one in series]
    return Chart(name, x, y, [one for one in kept if one.points], **more)


def length_axis(lengths: Sequence[int]) -> Axis:
    """Prompt lengths, those named that have room."""
    named = named_lengths(sorted(lengths))
    ticks = [(length, length_name(length) if length in named else "") for length in sorted(lengths)]
    return Axis("prompt length, tokens", "log", ticks)


def series_of(name: str, method: str, variant: int, points: Sequence[Point], **more: Any) -> Series:
    """A series that looks like its method in every picture; ``variant`` is its number among the method's labels."""
    colour, marker, line = method_look(method, variant)
    dash = more.pop("dash", int(line == DASHED))
    # Black is for dense, and is white on a dark screen.
    return Series(name, "currentColor" if colour == COLOURS[0] else colour, marker, dash, points, **more)
