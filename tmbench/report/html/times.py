"""The page of times: a chart of seconds with the roofline below it, and one of the density, for each section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tmbench.report.html.blocks import block_of, filters_of
from tmbench.report.html.charts import Axis, Chart, Point, chart_of, length_axis, series_of
from tmbench.report.report import Report
from tmbench.report.time_intervals import TimeDifference, time_text
from tmbench.report.ttft import TtftCell, TtftSection
from tmbench.report.words import figure_text, significant
from tmbench.results.words import length_name

ROOFLINE_DASH = 2


def content(report: Report, root: Path) -> Mapping[str, Any]:
    """What the page's template is given."""
    blocks = [block_of(section, _charts(section)) for section in report.ttft]
    return {"blocks": blocks, "filters": filters_of(blocks), "data": [block.charts for block in blocks]}


def _charts(section: TtftSection) -> list[Chart]:
    cells = section.measured()
    if not cells:
        return []
    axis = length_axis(sorted({cell.row.length for cell in cells}))
    times, rooflines, densities = [], [], []
    for label in section.labels:
        own = section.measured(label)
        if own:
            method, variant = own[0].row.method, _variant(section, own[0])
            times.append(series_of(label, method, variant, [_time(cell) for cell in own]))
            under = [_roofline(cell) for cell in own if cell.row.floor_s is not None]
            named = f"{label}, roofline"
            rooflines.append(series_of(named, method, variant, under, dash=ROOFLINE_DASH, of=label))
            computed = [_density(cell) for cell in own if cell.row.coverage is not None]
            densities.append(series_of(label, method, variant, computed))
    name = "Seconds to the first token, median; dotted: the roofline"
    share = "Density: the share of the causal pairs that was computed"
    charts = [
        chart_of(name, axis, Axis("seconds", "log"), times + rooflines),
        chart_of(share, axis, Axis("density, %", ends=(0.0, 100.0)), densities),
    ]
    return [chart for chart in charts if chart.series]


def _variant(section: TtftSection, cell: TtftCell) -> int:
    labels = list(dict.fromkeys(one.label for one in section.cells if one.row.method == cell.row.method))
    return labels.index(cell.label)


def _time(cell: TtftCell) -> Point:
    """The median with the fastest and the slowest repeat."""
    row = cell.row
    ends = None if row.ttft_min_s is None or row.ttft_max_s is None else (row.ttft_min_s, row.ttft_max_s)
    words = [f"{cell.label} at {length_name(row.length)}: {significant(cell.seconds)} s"]
    if ends:
        words.append(f"{significant(ends[0])} to {significant(ends[1])} s in {row.repeats} repeats")
    if isinstance(cell.against, TimeDifference):
        words.append(f"{time_text(cell.against.percent, cell.percent_low, cell.percent_high, cell.verdict)} against dense")
    elif cell.against:
        words.append(f"against dense: {cell.against}")
    words += [cell.slower_kernel] * bool(cell.slower_kernel)
    return Point(row.length, cell.seconds, "; ".join(words), row.length, ends)


def _roofline(cell: TtftCell) -> Point:
    row = cell.row
    assert row.floor_s is not None
    words = (
        f"{cell.label} at {length_name(row.length)}: roofline {significant(row.floor_s)} s, "
        f"TTFT / roofline {figure_text(row.ttft_over_floor, '.3g')}"
    )
    return Point(row.length, row.floor_s, words, row.length, filled=False)


def _density(cell: TtftCell) -> Point:
    assert cell.row.coverage is not None
    words = f"{cell.label} at {length_name(cell.row.length)}: density {cell.row.coverage:.1%}"
    return Point(cell.row.length, 100 * cell.row.coverage, words, cell.row.length)
