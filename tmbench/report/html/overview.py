"""The first page, what ran where, and the page of all rows with the commands that repeat them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tmbench.report.html.blocks import Filters, block_of, filters_of
from tmbench.report.html.commands import command_of
from tmbench.report.report import AnySection, Report
from tmbench.report.section import Cell, status_text
from tmbench.report.table import Table, columns
from tmbench.report.words import figure_text, significant
from tmbench.results.rows import OK, Row
from tmbench.results.suite_rows import SUITE_ROWS
from tmbench.results.words import length_name

RAN = ("driver", "torch", "triton", "transformers", "python", "tmbench")
FIGURES: Mapping[str, tuple[str, str | Callable[[float], str], str]] = {
    "ttft": ("ttft_median_s", significant, " s"),
    "ruler": ("score", ".4g", ""),
    **{kind.kind: ("score", ".4g", "") for kind in SUITE_ROWS},
    "lm_eval": ("value", ".4f", ""),
    "agree": ("agreement", ".1%", " agree"),
    "loss": ("nll_prompt", ".4f", " nats a token"),
    "probe": ("middle_logits", ".2e", " in the middle"),
}
"""The figure of a row that stands for it in the list: its column, how it is written, and what follows it."""


def content(report: Report) -> Mapping[str, Any]:
    """What the first page's template is given."""
    rows = [cell.row for section in _measured(report) for cell in section.cells]
    return {"blocks": (), "filters": Filters(), "provenance": _provenance(rows), "count": len(rows)}


def rows_content(report: Report, root: Path) -> Mapping[str, Any]:
    """What the template of the page of rows is given."""
    cells = [cell for section in _measured(report) for cell in section.cells]
    found = list(_lines(cells))
    names = list(found[0]["cells"])
    for line in found:
        line["cells"] = list(line["cells"].values())
    rows = [cell.row for cell in cells]
    filters = Filters(
        {row.device: row.device_name or row.device for row in rows},
        {row.model: row.model for row in rows},
        {str(length): length_name(length) for length in sorted({row.length for row in rows})},
        {task: task for task in sorted({str(getattr(row, "task", "")) for row in rows} - {""})},
    )
    return {"blocks": found[:1], "filters": filters, "columns": names, "data": found}


def further_content(report: Report, root: Path) -> Mapping[str, Any]:
    """What the template of the page of lm-eval's tasks, agreement and losses is given."""
    sections: list[AnySection] = [*report.lm_eval, *report.agree, *report.losses]
    blocks = [block_of(section) for section in sections]
    return {"blocks": blocks, "filters": filters_of(blocks), "data": None}


def _measured(report: Report) -> list[AnySection]:
    """The sections whose cells are rows; trade-offs are made of them."""
    return [*report.ttft, *report.scores, *report.lm_eval, *report.agree, *report.losses, *report.probes]


def _lines(cells: Sequence[Cell[Row]]) -> Iterator[dict[str, Any]]:
    """The rows as the script shows them: their cells by the columns' names, the command and what it needs."""
    for cell in cells:
        row = cell.row
        name, form, unit = FIGURES[row.kind]
        value = getattr(row, name)
        figure = figure_text(value, form) + unit if row.status == OK and value is not None else status_text(cell)
        task = str(getattr(row, "task", ""))
        said = {
            "method": row.method,
            "length": length_name(row.length),
            "task or prompt": task or str(getattr(row, "prompt", "")),
            "figure": figure,
            "kind": row.kind,
            "parameters": cell.parameters,
            "model": row.model,
            "device": row.device_name or row.device,
            "measured": row.time[:16].replace("T", " "),
        }
        command = command_of(row)
        yield {
            "cells": said,
            "by": {"device": row.device, "model": row.model, "length": str(row.length), "task": task},
            "command": command.text,
            "needs": command.needs,
            "more": f"commit {row.commit or 'unknown'}{', edited' * row.dirty}; {row.backends or 'no backend known'}",
        }


def _provenance(rows: Sequence[Row]) -> Table:
    """What ran where: a line for each device and set of versions."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        ran = tuple(str(getattr(row, name)) for name in RAN)
        commit = row.commit + " (edited)" * (row.dirty and bool(row.commit))
        found.setdefault((row.device_name or row.device, *ran, commit), []).append(row)
    lines = []
    for key, own in found.items():
        times = sorted(row.time[:10] for row in own)
        days = times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
        models = ", ".join(sorted({row.model for row in own}))
        lines.append([key[0], models, str(len(own)), days, *(each or "-" for each in key[1:])])
    names = ("device", "models", "rows", "measured", *RAN, "commit")
    return Table("What ran where:", columns(*names, texts=tuple(name for name in names if name != "rows")), lines)
