"""Pages of Markdown that are rendered whole, each from the CSV of one benchmark."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

SOURCE = "Rendered by `make figures` from [benchmarks/{0}](../benchmarks/{0}); do not edit."


def page(source: Path) -> str:
    """The page that a benchmark's CSV makes."""
    rows = pd.read_csv(source, keep_default_na=False, dtype=str)
    pages = {"select_ms": dynamic_page, "false_gain": coverage_page}
    heading, *parts = next((make(rows) for column, make in pages.items() if column in rows), None) or attention_page(rows)
    return "\n\n".join([heading, SOURCE.format(source.name), *parts]) + "\n"


def attention_page(rows: pd.DataFrame) -> list[str]:
    """Of benchmarks/attention.py: milliseconds a layer, times the fastest dense attention, errors."""
    first = rows.iloc[0]
    parts = [
        "# Attention kernels beside their peers",
        f"{first.device}, torch {first.torch}, Triton {first.triton}; {first.heads} heads, {first.kv_heads} key heads, head "
        f"size {first.head_dim}, {first['dtype']}, batch of one, causal. The triangle has {_triangle(rows)}. Median of "
        f"{rows.launches[rows.ms_median != ''].astype(int).min()} or more launches, all implementations interleaved.",
        "## Milliseconds for one layer",
        _table(rows, "ms_median", milliseconds),
        "## Times faster than the fastest dense attention of the same run",
        _table(rows[rows.pattern == "triangle"], "times_dense", lambda x: f"{float(x):.1f}"),
        "## Throughput on the pairs of the pattern, TFLOP/s",
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
        parts += [f"- {row.implementation}, {_tokens(str(row.length))}: {row.note}" for row in failed.itertuples()]
    return parts


def dynamic_page(rows: pd.DataFrame) -> list[str]:
    """Of benchmarks/dynamic_attention.py: milliseconds of selection and attention, and the kernels' throughput."""
    first = rows.iloc[0]
    blocks = rows.pattern == "random_blocks"
    patterns, drawn = rows[~blocks].rename(columns={"backend": "implementation"}), rows[blocks]
    drawn = drawn.assign(pattern=drawn.parameters.map("{} of the blocks".format), implementation=drawn.backend)
    selected = patterns[patterns.select_ms != ""].drop_duplicates(["pattern", "length"]).assign(implementation="selection")
    shares = (float(str(row.select_ms)) / _fastest(patterns, row) for row in selected.itertuples())
    share = selected.assign(share=[f"{part:.2f}" for part in shares])
    given = "; ".join(f"{row.pattern}: {row.parameters}" for row in selected.drop_duplicates("pattern").itertuples())
    return [
        "# Dynamic patterns, selection and attention",
        f"{first.device}, torch {first.torch}; {first.heads} heads, {first.kv_heads} key heads, head size {first.head_dim}, "
        f"batch of one, on the tensors of benchmarks/structured_qkv.py. Medians, all interleaved. {given}.",
        "## Milliseconds for one layer, selection included",
        _table(patterns, "ms_median", milliseconds),
        "## Milliseconds of the selection alone",
        _table(selected, "select_ms", milliseconds),
        "## The selection's share of the fastest implementation's time",
        _table(share, "share", lambda x: f"{float(x):.0%}"),
        "## Density: the share of the causal pairs that was selected",
        _table(selected, "density", lambda x: f"{float(x):.1%}"),
        "## Throughput on the selected pairs, TFLOP/s",
        "Attention alone, over selections and over blocks at random, in the last rows of another share in each head.",
        _table(pd.concat([patterns, drawn]), "tflops", lambda x: f"{float(x):.0f}"),
        "## Times faster than the fastest dense attention of the same run",
        _table(patterns[patterns.pattern != "dense"], "times_dense", lambda x: f"{float(x):.1f}"),
        "## Error",
        "Relative RMS difference from softmax in float32 over the same pairs, on sampled queries.",
        _table(pd.concat([patterns, drawn]), "error", lambda x: f"{float(x):.1e}"),
    ]


def coverage_page(rows: pd.DataFrame) -> list[str]:
    """Of benchmarks/interval_coverage.py: how often intervals hold the truth, how wide they are, which words are said."""
    percent = {"covered": "Interval holds the truth", "no measurable loss": "No measurable loss is said"}
    percent |= {"loss": "A loss is said", "gain": "A gain is said", "too few samples": "Too few samples is said"}
    tables = [(f"## {title}", _by_samples(rows, name, lambda x: f"{x:.1%}")) for name, title in percent.items()]
    return [
        "# What intervals and words are worth",
        f"Paired differences drawn from {rows.differences.nunique()} known distributions, {rows.experiments.iloc[0]} "
        "experiments each: [benchmarks/interval_coverage.py](../benchmarks/interval_coverage.py). Differences are in points "
        "from -100 to 100, samples are those of a task, and the margin is one point.",
        coverage_in_words(rows),
        *(part for table in tables for part in table),
        "## Mean width of the interval, points",
        _by_samples(rows, "width", lambda x: f"{x:.3g}"),
    ]


def coverage_in_words(rows: pd.DataFrame) -> str:
    """The worst of all rows, in a sentence for prose."""
    worst = {name: rows[name].astype(float) for name in ("covered", "false_gain", "false_loss", "loss_missed")}
    return (
        f"The interval holds the truth in {worst['covered'].min():.1%} of the experiments or more. A gain is said where "
        f"there is none in {worst['false_gain'].max():.1%} at most, a loss where there is none in "
        f"{worst['false_loss'].max():.1%} at most, and no measurable loss where a point or more is lost in "
        f"{worst['loss_missed'].max():.1%} at most."
    )


def _by_samples(rows: pd.DataFrame, column: str, text) -> str:  # type: ignore[no-untyped-def]
    samples = sorted(set(rows.samples), key=int)
    lines = [["differences", "tasks", "true mean", *samples], ["---", "---:", "---:", *["---:"] * len(samples)]]
    for (tasks, name), group in rows.groupby(["tasks", "differences"], sort=False):
        cells = dict(zip(group.samples, group[column].astype(float).map(text), strict=True))
        lines.append([name, tasks, f"{float(group['mean'].iloc[0]):g}", *(cells[count] for count in samples)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fastest(rows: pd.DataFrame, row) -> float:  # type: ignore[no-untyped-def]
    of_same = rows[(rows.pattern == row.pattern) & (rows.length == row.length)]
    return float(of_same.ms_median.astype(float).min())


def milliseconds(ms: str) -> str:
    return f"{float(ms):#.3g}" if float(ms) < 100 else f"{float(ms):.0f}"


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
