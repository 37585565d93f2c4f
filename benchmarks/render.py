"""Renders the CSV of benchmarks/attention.py into markdown tables: python benchmarks/render.py INPUT OUTPUT."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

SOURCE = "Rendered by `make figures` from [benchmarks/attention.csv](../benchmarks/attention.csv); do not edit."


def main(source: Path, target: Path) -> None:
    rows = pd.read_csv(source, keep_default_na=False, dtype=str)
    target.write_text(render(rows), encoding="utf-8")


def render(rows: pd.DataFrame) -> str:
    """A page of tables: milliseconds a layer, times the fastest dense attention, errors."""
    first = rows.iloc[0]
    parts = [
        "# Attention kernels beside their peers",
        SOURCE,
        f"{first.device}, torch {first.torch}, Triton {first.triton}; {first.heads} heads, {first.kv_heads} key heads, head "
        f"size {first.head_dim}, {first['dtype']}, batch of one, causal. The triangle has {_triangle(rows)}. Median of "
        f"{rows.launches[rows.ms_median != ''].astype(int).min()} or more launches, all implementations in turns.",
        "## Milliseconds for one layer",
        _table(rows, "ms_median", lambda ms: f"{float(ms):#.3g}" if float(ms) < 100 else f"{float(ms):.0f}"),
        "## Times faster than the fastest dense attention of the same run",
        _table(rows[rows.pattern == "triangle"], "times_dense", lambda x: f"{float(x):.1f}"),
        "## Rate on the pairs of the pattern, TFLOP/s",
        _table(rows, "tflops", lambda x: f"{float(x):.0f}"),
        "## Error, and that of plain torch in the same type",
        "Relative RMS difference from softmax in float32 on sampled queries.",
        _table(rows, "error", lambda x: f"{float(x):.1e}", beside="error_of_torch"),
        "## Memory at the peak beyond q, k, v and the output, MiB",
        _table(rows, "extra_mib", lambda x: f"{float(x):.1f}"),
    ]
    failed = rows[(rows.note != "") & (rows.ms_median == "")]
    if len(failed):
        parts.append("## Not timed")
        parts += [f"- {row.implementation}, {_tokens(row.length)}: {row.note}" for row in failed.itertuples()]
    return "\n\n".join(parts) + "\n"


def _triangle(rows: pd.DataFrame) -> str:
    row = rows[rows.pattern == "triangle"].iloc[0]
    return f"{row.n_init} sinks, a window of {row.n_local} and {row.last_n} last rows"


def _table(rows: pd.DataFrame, column: str, text, beside: str = "") -> str:  # type: ignore[no-untyped-def]
    rows = rows[rows[column] != ""]
    lengths = sorted(set(rows.length), key=int)
    shown = []
    for (pattern, name), group in rows.groupby(["pattern", "implementation"], sort=False):
        cells = dict(zip(group.length, group[column].map(text), strict=True))
        shown.append([pattern, name, *(cells.get(length, "") for length in lengths)])
    if beside:
        for pattern, group in rows.groupby("pattern", sort=False):
            cells = dict(zip(group.length, group[beside].map(text), strict=True))
            shown.append([pattern, "plain torch", *(cells.get(length, "") for length in lengths)])
    header = ["pattern", "implementation", *map(_tokens, lengths)]
    rule = ["---", "---", *["---:"] * len(lengths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *shown))


def _tokens(length: str) -> str:
    n = int(length)
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
