"""The page of trade-offs: points kept against time saved, a dot for each method, and the front, by section and task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tmbench.report.html.blocks import block_of, filters_of
from tmbench.report.html.charts import Axis, Chart, Point, chart_of, series_of
from tmbench.report.html.margins import margins_with, says
from tmbench.report.report import Report
from tmbench.report.tradeoff import TradeOff, TradeOffCell
from tmbench.report.words import figure_text
from tmbench.results.words import length_name

AVERAGE = ""
"""The view in which points are averages over tasks; the others are by the task's name."""


def content(report: Report, root: Path) -> Mapping[str, Any]:
    """What the page's template is given."""
    margins = margins_with(report.margin)
    blocks, data = [], []
    for section in report.trade_offs:
        views = {AVERAGE: _chart(section, section.cells, section.scores.over, margins)}
        for task in section.scores.tasks:
            cells = section.of_task(task)
            if cells:
                views[task] = _chart(section, cells, task, margins)
        tasks = [task for task in views if task]
        blocks.append(block_of(section, [views[AVERAGE]], tasks=tasks, lengths=[section.setting.length]))
        data.append([{"views": views}])
    chosen = {"margins": margins, "margin": margins.index(report.margin)}
    return {"blocks": blocks, "filters": filters_of(blocks), "data": data, **chosen}


def _chart(section: TradeOff, cells: Sequence[TradeOffCell], over: str, margins: Sequence[float]) -> Chart:
    length = section.setting.length
    dense = Point(0.0, 0.0, f"dense at {length_name(length)}: what the others are held against", length)
    series = [series_of("dense", "dense", 0, [dense], dash=-1)]
    series += [series_of(cell.label, cell.row.method, 0, [_dot(cell, over, margins)], dash=-1) for cell in cells]
    front = [(0.0, 0.0), *((cell.saved_percent, cell.difference.mean) for cell in cells if cell.front)]
    apart = any(cell.saved_low is None for cell in cells)
    name = (
        "Filled: on the Pareto front; dotted: the margin" + "; without a bar: not timed in the same rounds as dense" * apart
    )
    x, y = Axis("time saved against dense, %"), Axis(f"points, {over}")
    return chart_of(name, x, y, series, steps=front, margins=margins)


def _dot(cell: TradeOffCell, over: str, margins: Sequence[float]) -> Point:
    saved = (cell.saved_low, cell.saved_high)
    words = [
        f"{cell.label} at {length_name(cell.row.length)}: time saved {cell.saved}",
        f"{cell.points} points against dense, {over}",
        f"density {figure_text(cell.row.coverage, '.1%')}",
        *["on the Pareto front"] * cell.front,
    ]
    found = cell.difference
    return Point(
        cell.saved_percent,
        found.mean,
        "; ".join(words),
        cell.row.length,
        (found.low, found.high),
        None if saved[0] is None or saved[1] is None else (saved[0], saved[1]),
        cell.front,
        says(found, margins),
    )
