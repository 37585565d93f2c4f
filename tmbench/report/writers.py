"""A report as text: Markdown for people, CSV with a line for each figure, JSON with everything."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from tmbench.report.lengths import by_length
from tmbench.report.records import FIGURES, Record, average_records, records, section_record
from tmbench.report.report import Report
from tmbench.report.ruler import RulerSection
from tmbench.report.section import Part
from tmbench.report.table import Table, columns
from tmbench.results.json_text import json_text
from tmbench.results.rows import Row

FRONT = (
    "kind", "device", "model", "revision", "weights", "dtype", "model_hash", "prompt", "threads", "seed", "wording",
    "method", "label", "parameters", "length", "task", "status", "figure", "value", "percent_vs_dense",
)  # fmt: skip
"""The columns that a table in long form begins with."""
COMPARED = ("percent_vs_dense", "percent_low", "percent_high")
"""The columns that are about a kind's first figure alone."""


def report_markdown(report: Report) -> str:
    """The report as Markdown: a heading for each device, and below it the sections with their notes."""
    lines = ["# tmbench report"]
    for device in sorted({section.setting.device for section in report.sections}):
        here = [section for section in report.sections if section.setting.device == device]
        rows = [cell.row for section in here for cell in section.cells]
        names = sorted({row.device_name for row in rows if row.device_name})
        lines += [f"## {' / '.join(names)} ({device})", _environment(rows)]
        parts: list[Part] = [*by_length(one for one in here if isinstance(one, RulerSection)), *here]
        for part in parts:
            lines += [f"### {part.title}", *map(captioned, filled(part.tables()))]
            lines.append("\n".join(f"- {note}" for note in part.notes()))
    return "\n\n".join(line for line in lines if line) + "\n"


def filled(tables: Iterable[Table]) -> list[Table]:
    """Those tables that have rows."""
    return [table for table in tables if table.rows]


def captioned(table: Table) -> str:
    """A table as Markdown below its caption."""
    return f"{table.caption}\n\n{table_markdown(table)}"


def table_markdown(table: Table) -> str:
    """A table as Markdown, its columns of one width throughout."""
    found = []
    for place, column in enumerate(table.columns):
        cells = [row[place].replace("|", "\\|") for row in table.rows]
        width = max(len(column.name) + 2, *map(len, cells), 0)
        if column.text:
            found.append([column.name.ljust(width), ":" + "-" * (width + 1), *(cell.ljust(width) for cell in cells)])
        else:
            found.append([column.name.rjust(width), "-" * (width + 1) + ":", *(cell.rjust(width) for cell in cells)])
    header, rule, *lines = zip(*found, strict=True)
    return "\n".join([f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(line)} |" for line in lines)])


def table_csv(table: Table) -> str:
    """A table as CSV, its header first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    writer.writerows(table.rows)
    return text.getvalue()


def long_form(report: Report) -> Table:
    """Every figure on a line of its own, with all columns of its row; times in seconds, scores from 0 to 100."""
    lines: list[Record] = []
    names = dict.fromkeys(FRONT)
    for section in report.sections:
        found = [*records(section), *(average_records(section) if isinstance(section, RulerSection) else ())]
        figures = FIGURES[str(found[0]["kind"])]
        rest = dict.fromkeys(name for record in found for name in record if name not in figures)
        names |= rest
        for figure in figures:
            first = figure == figures[0]
            blank = {} if first else dict.fromkeys(COMPARED)
            for record in found:
                # What is no number is no figure, and compares with nothing.
                value = record.get(figure)
                known = value is not None and value == value
                if first or known:
                    own = {name: record.get(name) for name in rest} | blank
                    lines.append(own | {"figure": figure, "value": value if known else None})
    used = {name for line in lines for name in line} | {"figure", "value"}
    shown = [name for name in names if name in used]
    return Table(
        "", columns(*shown), [["" if line.get(name) is None else str(line[name]) for name in shown] for line in lines]
    )


def report_csv(report: Report) -> str:
    """The long form as CSV."""
    return table_csv(long_form(report))


def report_json(report: Report) -> str:
    """The sections with their cells, what follows from them, and the notes; figures that are not finite are null."""
    return json_text([section_record(section) for section in report.sections]) + "\n"


def _environment(rows: Sequence[Row]) -> str:
    found = {
        name: sorted({str(version) for row in rows if (version := getattr(row, name))})
        for name in ("driver", "torch", "triton", "transformers", "tmbench")
    }
    words = [f"{name} {', '.join(versions)}" for name, versions in found.items() if versions]
    commits = sorted({row.commit + " (edited)" * row.dirty for row in rows if row.commit})
    return "; ".join([*words, f"commit {', '.join(commits)}"] if commits else words) + "."
