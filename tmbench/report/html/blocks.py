"""What pages are made of: a section of the report with its notes, tables and charts, and what the filters find it by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tmbench.report.html.charts import Chart
from tmbench.report.report import AnySection
from tmbench.report.table import Table
from tmbench.report.writers import filled
from tmbench.results.words import length_name


@dataclass(frozen=True)
class Block:
    """One section of the report."""

    title: str
    device: str
    device_name: str
    model: str
    lengths: Sequence[int]
    notes: Sequence[str]
    tables: Sequence[Table]
    charts: Sequence[Chart] = ()
    tasks: Sequence[str] = ()
    more: Any = None
    """What its page alone knows."""


@dataclass(frozen=True)
class Filters:
    """What the filters of a page offer: only those that leave a choice."""

    device: dict[str, str] = field(default_factory=dict)
    """Folders of devices with the devices' names."""
    model: dict[str, str] = field(default_factory=dict)
    length: dict[str, str] = field(default_factory=dict)
    task: dict[str, str] = field(default_factory=dict)


def block_of(section: AnySection, charts: Sequence[Chart] = (), **more: Any) -> Block:
    """A section as a block; ``more`` are fields in place of what is taken from it."""
    given: dict[str, Any] = {
        "title": section.title,
        "device": section.setting.device,
        "device_name": section.cells[0].row.device_name,
        "model": section.setting.model,
        "lengths": sorted({cell.row.length for cell in section.cells}),
        "notes": section.notes(),
        "tables": filled(section.tables()),
        "charts": charts,
    }
    return Block(**(given | more))


def filters_of(blocks: Iterable[Block]) -> Filters:
    """The filters of a page with these blocks."""
    found = Filters()
    for block in blocks:
        found.device[block.device] = block.device_name or block.device
        found.model[block.model] = block.model
        found.length.update({str(length): length_name(length) for length in block.lengths})
        found.task.update({task: task for task in block.tasks})
    return Filters(
        found.device,
        found.model,
        dict(sorted(found.length.items(), key=lambda one: int(one[0]))),
        found.task,
    )
