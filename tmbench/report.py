"""Reports from result files alone: tables in the layout of the publications, and every figure in long form.

A speed-up never stands without a figure of what the method kept, or the words that none was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from tmbench.choices import choices_of
from tmbench.errors import UserError
from tmbench.groups import FIGURES, MODEL, NOTHING, AgreeGroup, Record, RulerGroup, TtftGroup, grouped, length_name, record
from tmbench.intervals import MARGIN, Difference
from tmbench.json_text import json_text
from tmbench.lengths import by_length
from tmbench.results import AgreeRow, RulerRow, TtftRow, read_all
from tmbench.samples import read_samples
from tmbench.tradeoff import TradeOff, trade_offs


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
        """What a method kept, in words: its worst logit error, and its RULER average at the longest length that has one."""
        rows = [row for row in group.rows if row["label"] == label]
        errors = [(row["logit_error"], length_name(row["length"])) for row in rows if row["logit_error"] is not None]
        # A logit error that is not a number is the worst there is, and compares with nothing.
        worst = max(errors, key=lambda error: (math.isnan(error[0]), error[0]), default=None)
        kept = [f"logit error {worst[0]:.2g} at {worst[1]}"] if worst else []
        same = [other for other in self.ruler if all(other.setting[name] == group.setting[name] for name in MODEL)]
        for other in sorted(same, key=lambda other: (-other.setting["length"], other.setting["older_data"])):
            means, names = other.averages, {(row["method"], row["parameters"]): row["label"] for row in other.rows}
            own, dense = means.get(names.get((rows[0]["method"], rows[0]["parameters"]), "")), means.get("dense")
            if own is not None and dense is not None:
                over = f"{len(other.common_tasks)} tasks at {length_name(other.setting['length'])}"
                found = other.average_differences.get(names[rows[0]["method"], rows[0]["parameters"]])
                words = f": {found.verdict}" if isinstance(found, Difference) else ""
                kept.append(f"RULER {own:.1f} (dense {dense:.1f}, {over}){words}")
                break
        return "; ".join(kept) or "not measured"

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
        frames = []
        for group in self.groups:
            frame = pd.DataFrame([*group.rows, *(group.average_rows() if isinstance(group, RulerGroup) else ())])
            figures = FIGURES[frame["kind"][0]]
            rest = [column for column in frame.columns if column not in figures]
            long = frame.melt(id_vars=rest, value_vars=figures, var_name="figure")
            long.loc[long["figure"] != figures[0], "percent_vs_dense"] = None
            frames.append(long[(long["figure"] == figures[0]) | long["value"].notna()])
        whole = pd.concat(frames, ignore_index=True)
        front = ["kind", *MODEL, "prompt", "threads", "seed", "wording", "method", "label", "parameters", "length", "task"]
        front = [name for name in (*front, "status", "figure", "value", "percent_vs_dense") if name in whole.columns]
        whole = whole[[*front, *whole.columns.difference(front, sort=False)]].convert_dtypes()
        return str(whole.to_csv(index=False, lineterminator="\n"))

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
    cells = table.fillna(NOTHING).astype(str).map(lambda text: text.replace("|", "\\|") or " ")
    words = (
        "method",
        "task",
        "parameters",
        "faster than dense",
        "fidelity",
        "backends",
        "in words",
        "what changes",
        "elsewhere",
    )
    sides = ["left" if name in words else "right" for name in cells.columns]
    return str(cells.to_markdown(index=False, disable_numparse=True, colalign=sides))
