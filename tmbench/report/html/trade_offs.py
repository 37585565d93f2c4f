"""The page of trade-offs: points kept against time saved, a dot for each method and length, and each length's front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ruler_tasks import TASKS
from tmbench.report.html.blocks import Block, block_of, filters_of
from tmbench.report.html.charts import Axis, Chart, Front, Point, chart_of, series_of
from tmbench.report.html.margins import margins_with, says
from tmbench.report.report import Report
from tmbench.report.settings import TradeOffSetting
from tmbench.report.tradeoff import TradeOff, TradeOffCell
from tmbench.report.words import figure_text
from tmbench.report.writers import filled
from tmbench.results.words import length_name

AVERAGE = ""
"""The view in which points are averages over tasks; the others are by the task's name."""


def content(report: Report, root: Path) -> Mapping[str, Any]:
    """What the page's template is given."""
    margins = margins_with(report.margin)
    together: dict[TradeOffSetting, list[TradeOff]] = {}
    for section in report.trade_offs:
        together.setdefault(replace(section.setting, length=0), []).append(section)
    blocks, data = [], []
    for sections in together.values():
        overs = list(dict.fromkeys(section.scores.over for section in sections))
        over = overs[0] if len(overs) == 1 else "averages of tasks"
        views = {AVERAGE: _chart([(section, section.cells, section.scores.over) for section in sections], over, margins)}
        for task in TASKS:
            found = [(section, cells, task) for section in sections if (cells := section.of_task(task))]
            if found:
                views[task] = _chart(found, task, margins)
        blocks.append(_block(sections, views))
        data.append([{"views": views}])
    chosen = {"margins": margins, "margin": margins.index(report.margin)}
    return {"blocks": blocks, "filters": filters_of(blocks), "data": data, **chosen}


def _block(sections: Sequence[TradeOff], views: Mapping[str, Chart]) -> Block:
    """The lengths of one setting, with the notes and tables of each."""
    named = [length_name(section.setting.length) for section in sections]
    about = " / ".join(dict.fromkeys(section.title.partition(": ")[2] for section in sections))
    said = [f"{name}: " if len(sections) > 1 else "" for name in named]
    notes = [start + note for start, section in zip(said, sections, strict=True) for note in section.notes()]
    tables = [
        replace(table, caption=start + table.caption)
        for start, section in zip(said, sections, strict=True)
        for table in filled(section.tables())
    ]
    return block_of(
        sections[0],
        [views[AVERAGE]],
        title=f"Accuracy kept against time saved at {', '.join(named)}: {about}",
        lengths=[section.setting.length for section in sections],
        tasks=[task for task in views if task],
        notes=notes,
        tables=tables,
    )


def _chart(found: Sequence[tuple[TradeOff, Sequence[TradeOffCell], str]], over: str, margins: Sequence[float]) -> Chart:
    """A chart of the cells of several lengths, each with what their points are over."""
    dense, fronts = [], []
    dots: dict[tuple[str, str], list[Point]] = {}
    labels: dict[tuple[str, str], str] = {}
    for section, cells, what in found:
        length = section.setting.length
        dense.append(Point(0.0, 0.0, f"dense at {length_name(length)}: what the others are held against", length))
        for cell in cells:
            # A method's label depends on what stands beside it, so that it may be another at another length.
            own = cell.row.method, cell.parameters
            labels.setdefault(own, cell.label)
            dots.setdefault(own, []).append(_dot(cell, what, margins))
        corners = [(cell.saved_percent, cell.difference.mean) for cell in cells if cell.front]
        fronts.append(Front(length, [(0.0, 0.0), *corners]))
    often = Counter(labels.values())
    series = [series_of("dense", "dense", 0, dense, dash=-1)]
    for (method, parameters), points in dots.items():
        label = labels[method, parameters]
        name = label if often[label] == 1 else f"{method} ({parameters})"
        series.append(series_of(name, method, 0, points, dash=-1))
    apart = any(cell.saved_low is None for _, cells, _ in found for cell in cells)
    name = (
        "Filled: on the Pareto front; dotted: the margin" + "; without a bar: not timed in the same rounds as dense" * apart
    )
    x, y = Axis("time saved against dense, %"), Axis(f"points, {over}")
    return chart_of(name, x, y, series, fronts=fronts, margins=margins)


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
        length_name(cell.row.length),
        says(found, margins),
    )
