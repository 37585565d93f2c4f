"""Rows for tests of reports, the published figures among them, and tables of Markdown read back."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import made_rows
from tmbench.results.rows import RulerRow, TtftRow
from tmbench.results.tables import append

COMMON = made_rows.COMMON | {"driver": "570.1", "method": "dense", "length": 4096, "threads": 2, "commit": "aaaa"}
TTFT = {"prompt": "kv", "repeats": 3, "warmup": 1, "interleaved": "dense tri_mix minference tri_mix_minference"}
RULER = {"samples": 100, "wording": "reference-ruler", "wording_hash": "f00d", "source": "noise", "chat_template": False}
TRIANGLE = {"layers": "16-", "layers_source": "published", "n_init": 8, "n_local": 512, "last_n": 128}
OWN: dict[str, dict[str, Any]] = {
    "tri_mix": TRIANGLE,
    "minference": {"patterns": "default"},
    "tri_mix_minference": {**TRIANGLE, "patterns": "default"},
}


def published_lines(name):
    """The lines of a table that TriangleMix published: see benchmarks/published."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "published" / f"{name}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Llama-3.1-8B on an A100, seconds, by thousands of tokens; and its scores at 128K.
PUBLISHED_SECONDS = {
    line.pop("method"): {1024 * int(thousands): float(seconds) for thousands, seconds in line.items()}
    for line in published_lines("ttft")
}
PUBLISHED_SCORES = {
    method: {line["task"]: float(line[method]) for line in published_lines("ruler")} for method in ("dense", "tri_mix")
}


def add_ttft(root, method="dense", length=4096, seconds=None, **changes):
    times = {} if seconds is None else {"ttft_median_s": seconds, "ttft_min_s": 0.9 * seconds, "ttft_max_s": 1.1 * seconds}
    times |= (
        {}
        if seconds is None
        else {"samples_s": " ".join(f"{part * seconds}" for part in (0.9, 1.0, 1.1)[: changes.get("repeats", 3)])}
    )
    row = COMMON | TTFT | OWN.get(method, {}) | times | {"method": method, "length": length} | changes
    append(root, TtftRow(**made_rows.columns(row)))


def add_ruler(root, method="dense", task="niah_single_1", score=100.0, **changes):
    row = COMMON | RULER | OWN.get(method, {}) | {"method": method, "task": task, "score": score} | changes
    append(root, RulerRow(**made_rows.columns(row)))


def add_published(root):
    for method, times in PUBLISHED_SECONDS.items():
        for length, seconds in times.items():
            add_ttft(root, method, length, seconds)
    for method, scores in PUBLISHED_SCORES.items():
        for task, score in scores.items():
            add_ruler(root, method, task, score, length=131072)


def tables_of(markdown):
    """Every table as lines of {header: cell}; one that goes on below itself, as wide ones do, is one table."""
    tables: list[list[dict[str, str]]] = []
    after = -1
    for found in re.finditer(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        block = found.group()
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert len({len(line) for line in lines}) == 1, f"unequal columns in {block}"
        header, rule, *body = lines
        assert all(re.fullmatch(r":?-+:?", cell) for cell in rule)
        table = [dict(zip(header, line, strict=True)) for line in body]
        if found.start() == after + 1 and tables:
            tables[-1] = [before | more for before, more in zip(tables[-1], table, strict=True)]
        else:
            tables.append(table)
        after = found.end()
    return tables


def table_with(markdown, column):
    """The one table that has a column of that name, by its first column."""
    (table,) = [table for table in tables_of(markdown) if column in table[0]]
    return {next(iter(line.values())): line for line in table}
