"""Reports from result files alone: tables in the layout of the publications, and every figure in long form.

A speed-up never stands without a figure of what the method kept, or the words that none was measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from tmbench.errors import UserError
from tmbench.report.evidence import fidelity
from tmbench.report.groups import FIGURES, MODEL, NOTHING, AgreeGroup, Record, RulerGroup, TtftGroup, grouped, record
from tmbench.report.intervals import MARGIN
from tmbench.report.lengths import by_length
from tmbench.report.tradeoff import TradeOff, trade_offs
from tmbench.results.choices import choices_of
from tmbench.results.json_text import json_text
from tmbench.results.rows import AgreeRow, RulerRow, TtftRow
from tmbench.results.sample_scores import read_samples
from tmbench.results.tables import read_all

FRONT = (
    "kind", *MODEL, "prompt", "threads", "seed", "wording", "method", "label", "parameters", "length", "task", "status",
    "figure", "value", "percent_vs_dense",
)  # fmt: skip
"""The columns that a table in long form begins with."""
COMPARED = ("percent_vs_dense", "percent_low", "percent_high")
"""The columns that are about a kind's first figure alone."""
TEXTS = (
    "method", "task", "parameters", "faster than dense", "fidelity", "backends", "in words", "what changes", "elsewhere",
)  # fmt: skip
"""The columns of tables that hold no figures."""


@dataclass(frozen=True)
class Report:
    """All that a results folder holds, in groups of comparable rows."""

    ttft: Sequence[TtftGroup]
    ruler: Sequence[RulerGroup]
    agree: Sequence[AgreeGroup] = ()

    @cached_property
    def trade_offs(self) -> list[TradeOff]:
        """What both TTFT and RULER were measured of, at one length."""
        return trade_offs(self.ttft, self.ruler)

    @property
    def groups(self) -> list[TtftGroup | RulerGroup | AgreeGroup | TradeOff]:
        """All groups: of TTFT, of RULER, of agreement, and of both TTFT and RULER."""
        return [*self.ttft, *self.ruler, *self.agree, *self.trade_offs]

    def fidelity(self, group: TtftGroup, label: str) -> str:
        """What a method kept, in words: see ``tmbench.report.evidence``."""
        return fidelity(group, label, self.ruler)

    def markdown(self) -> str:
        """The report as Markdown: a section for each device, and in it the groups with their notes."""
        lines = ["# tmbench report"]
        for device in sorted({group.setting["device"] for group in self.groups}):
            here = [group for group in self.groups if group.setting["device"] == device]
            rows = [row for group in here for row in group.rows]
            lines += [f"## {' / '.join(_unique(rows, 'device_name'))} ({device})", _environment(rows)]
            for lengths in by_length(group for group in here if isinstance(group, RulerGroup)):
                lines += _section(lengths.title, lengths.tables(), lengths.notes())
            for group in here:
                lines += _section(group.title, group.tables(self.fidelity), group.notes())
        return "\n\n".join(line for line in lines if line) + "\n"

    def csv(self) -> str:
        """Every figure on a line of its own, with all columns of its row; times in seconds, scores from 0 to 100."""
        lines, columns = [], dict.fromkeys(FRONT)
        for group in self.groups:
            records = [*group.rows, *(group.average_rows() if isinstance(group, RulerGroup) else ())]
            figures = FIGURES[records[0]["kind"]]
            rest = dict.fromkeys(name for row in records for name in row if name not in figures)
            columns |= rest
            for figure in figures:
                first = figure == figures[0]
                # What is no number is no figure, and compares with nothing.
                known = [row for row in records if first or (row.get(figure) is not None and row[figure] == row[figure])]
                blank = {} if first else dict.fromkeys(COMPARED)
                lines += [{name: row.get(name) for name in rest} | blank | _figure(row, figure) for row in known]
        used = [name for name in columns if name in ("figure", "value") or any(name in line for line in lines)]
        text = io.StringIO()
        writer = csv.DictWriter(text, used, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def json(self) -> str:
        """The groups with their rows, what follows from them, and the notes; figures that are not finite are null."""
        groups = [
            {"setting": group.setting, **group.summary(), "notes": group.notes(), "rows": group.rows}
            for group in self.groups
        ]
        return json_text(groups) + "\n"


def build(root: Path, margin: float = MARGIN) -> Report:
    """The report on all rows under a results folder; ``margin`` is the loss in points that nobody minds.

    Raises UserError where there are no rows, or a file is not ours.
    """
    ttft = [record(row) for row in read_all(root, TtftRow)]
    ruler = [record(row) for row in read_all(root, RulerRow)]
    agree = [record(row) for row in read_all(root, AgreeRow)]
    if not ttft and not ruler and not agree:
        raise UserError(f"no results under {root}: run tmbench ttft or tmbench ruler first")
    scores = [
        RulerGroup(setting, rows, {(row["label"], row["task"]): read_samples(root, row) for row in rows}, margin)
        for setting, rows in grouped(ruler)
    ]
    agreement = [
        AgreeGroup(setting, rows, {(row["label"], row["length"]): choices_of(root, row) for row in rows})
        for setting, rows in grouped(agree)
    ]
    return Report([TtftGroup(*group) for group in grouped(ttft)], scores, agreement)


def _figure(row: Record, figure: str) -> Record:
    value = row.get(figure)
    return {"figure": figure, "value": None if value is None or value != value else value}


def _section(title: str, tables: Mapping[str, pd.DataFrame], notes: Sequence[str]) -> list[str]:
    filled = [f"{caption}\n\n{_markdown(table)}" for caption, table in tables.items() if len(table)]
    return [f"### {title}", *filled, "\n".join(f"- {note}" for note in notes)]


def _unique(rows: Iterable[Record], name: str) -> list[str]:
    return sorted({str(row[name]) for row in rows if row[name]})


def _environment(rows: Sequence[Record]) -> str:
    parts = {"driver": "driver", "torch": "torch", "triton": "triton", "transformers": "transformers", "tmbench": "tmbench"}
    words = [f"{word} {', '.join(_unique(rows, name))}" for name, word in parts.items() if _unique(rows, name)]
    commits = sorted({row["commit"] + " (edited)" * row["dirty"] for row in rows if row["commit"]})
    return "; ".join([*words, f"commit {', '.join(commits)}"] if commits else words) + "."


def _markdown(table: pd.DataFrame) -> str:
    """A table as Markdown; pandas takes a hundred times as long for it as all else of a report."""
    columns = []
    for name in table.columns:
        cells = [NOTHING if cell is None or cell != cell else str(cell).replace("|", "\\|") for cell in table[name]]
        width = max(len(name) + 2, *map(len, cells))
        if name in TEXTS:
            columns.append([name.ljust(width), ":" + "-" * (width + 1), *(cell.ljust(width) for cell in cells)])
        else:
            columns.append([name.rjust(width), "-" * (width + 1) + ":", *(cell.rjust(width) for cell in cells)])
    header, rule, *lines = zip(*columns, strict=True)
    return "\n".join([f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(line)} |" for line in lines)])
