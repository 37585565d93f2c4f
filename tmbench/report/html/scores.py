"""The page of tasks: a heat map of methods by tasks of the paired differences to dense, for each section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmbench.report.differences import NOT_COMPARED
from tmbench.report.html.blocks import block_of, filters_of
from tmbench.report.html.charts import Says
from tmbench.report.html.margins import margins_with, says
from tmbench.report.intervals import Difference
from tmbench.report.report import Report
from tmbench.report.ruler import RulerSection, score_text
from tmbench.report.words import NOTHING, interval_text, signed
from tmbench.results.words import counted

STEPS = (2.0, 5.0, 10.0, 25.0)
"""Points from which on a colour is one step stronger."""


@dataclass(frozen=True)
class HeatCell:
    """One cell of a heat map."""

    task: str
    text: str
    look: str
    """The class that it is coloured by: "loss-1" to "gain-5", "none" where the interval spans 0, "" without a difference."""
    words: str
    says: Says | None = None
    """What depends on the margin."""


@dataclass(frozen=True)
class HeatMap:
    """Methods by tasks."""

    tasks: Sequence[str]
    """The first is the average."""
    lines: Mapping[str, Sequence[HeatCell]] = field(default_factory=dict)
    """By the method's label."""


def content(report: Report, root: Path) -> Mapping[str, Any]:
    """What the page's template is given."""
    margins = margins_with(report.margin)
    maps = [_heat_map(section, margins) for section in report.scores]
    blocks = [
        block_of(section, tasks=section.tasks, lengths=[section.setting.length], more=heat)
        for section, heat in zip(report.scores, maps, strict=True)
    ]
    cells = [[cell.says and cell.says.words for line in heat.lines.values() for cell in line] for heat in maps]
    chosen = {"margins": margins, "margin": margins.index(report.margin)}
    return {"blocks": blocks, "filters": filters_of(blocks), "data": cells, **chosen}


def _heat_map(section: RulerSection, margins: Sequence[float]) -> HeatMap:
    by_place = {(cell.label, cell.row.task): cell for cell in section.cells}
    averages = section.average_differences
    lines: dict[str, list[HeatCell]] = {}
    for label in section.labels:
        line = []
        for task in section.tasks:
            cell = by_place.get((label, task))
            if cell is None:
                line.append(HeatCell(task, NOTHING, "", f"{label} on {task}: not measured"))
            elif label == "dense" or not cell.known:
                text = score_text(cell)
                score = f"score {text}" if cell.known else text
                line.append(HeatCell(task, text, "", f"{label} on {task}: {score}"))
            else:
                line.append(_compared(task, f"{label} on {task}: score {score_text(cell)}", cell.difference, margins))
        if label in averages:
            first = _compared(section.over, f"{label}, {section.over}", averages[label], margins)
        else:
            mean = section.averages.get(label)
            text = NOTHING if mean is None else f"{mean:.1f}"
            first = HeatCell(section.over, text, "", f"{label}, average of {len(section.common_tasks)}: score {text}")
        lines[label] = [first, *line]
    return HeatMap(["average", *section.tasks], lines)


def _compared(task: str, place: str, found: Difference | str, margins: Sequence[float]) -> HeatCell:
    if not isinstance(found, Difference):
        return HeatCell(task, NOTHING, "", f"{place}; {NOT_COMPARED}{found}")
    points = interval_text(found.mean, found.low, found.high, 1)
    words = f"{place}; {points} points against dense over {counted(found.pairs, 'sample')}, {found.differing} of them differ"
    return HeatCell(task, signed(found.mean, 1), look_of(found), words, says(found, margins))


def look_of(found: Difference) -> str:
    """The colour of a difference: grey where its interval spans 0, and else the stronger the larger it is."""
    if found.low <= 0 <= found.high:
        return "none"
    step = 1 + sum(abs(found.mean) >= points for points in STEPS)
    return f"{'loss' if found.high < 0 else 'gain'}-{step}"
