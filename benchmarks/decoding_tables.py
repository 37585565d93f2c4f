"""The table of docs/decoding.md."""

from __future__ import annotations

from sources import Block, Line, Sources

from tmbench.report.table import Table, columns
from tmbench.report.writers import table_markdown
from tmbench.results.words import length_name

DECODING = "benchmarks/decoding.csv"


def decoding(sources: Sources) -> str:
    """Seconds of a sample and milliseconds of a step, one by one and together, of each model and length."""
    texts = ("model", "GPU", "tokens", "decoded")
    figures = ("texts", "s a sample", "times", "of it prefill", "ms a step", "weights, ms", "same choice", "by units")
    lines = sources.lines(DECODING)
    rows = [_cells(line, _alone(lines, line)) for line in lines]
    return table_markdown(Table("", columns(*texts, *figures, texts=texts), rows))


def _alone(lines: list[Line], line: Line) -> Line | None:
    """The same prompts decoded one by one, in the same run."""
    about = ("device", "model", "length", "method", "run")
    found = [one for one in lines if one["way"] == "plain" and all(one[name] == line[name] for name in about)]
    return found[0] if found else None


def _cells(line: Line, alone: Line | None) -> list[str]:
    own = float(line["seconds_per_sample"])
    times = "" if alone is None or alone is line else f"{float(alone['seconds_per_sample']) / own:.1f}"
    way = "one by one" if line["way"] == "plain" else line["way"]
    same = f"{float(line['same_choices']):.1%}" if line["same_choices"] else ""
    gpu = line["device"].removeprefix("NVIDIA ").split()[0]
    return [
        line["model"], gpu, length_name(int(line["length"])), way, line["batch_size"], f"{own:.3g}", times,
        f"{float(line['prefill_s']):.3g}", f"{float(line['step_ms']):.3g}", f"{float(line['weights_ms']):.3g}", same,
        line["largest_gap"],
    ]  # fmt: skip


DECODING_TABLES: dict[str, Block] = {"decoding": decoding}
