"""The tables of docs/decoding.md."""

from __future__ import annotations

from sources import Block, Line, Sources

from tmbench.report.table import Table, columns
from tmbench.report.writers import table_markdown
from tmbench.results.words import length_name

DECODING = "benchmarks/decoding.csv"
RATE = "benchmarks/ruler_rate.csv"


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
    return [
        line["model"], _gpu(line), length_name(int(line["length"])), way, line["batch_size"], f"{own:.3g}", times,
        f"{float(line['prefill_s']):.3g}", f"{float(line['step_ms']):.3g}", f"{float(line['weights_ms']):.3g}", same,
        line["largest_gap"],
    ]  # fmt: skip


def _gpu(line: Line) -> str:
    return line["device"].removeprefix("NVIDIA ").split()[0]


def rate(sources: Sources) -> str:
    """RULER samples a minute of several commits, and how many times the first one's.

    By whole commands once begun, and by what a sample takes in the model. Raises ValueError for a command that failed.
    """
    lines = sources.lines(RATE)
    if failed := [line["commit"] for line in lines if line["status"] != "ok"]:
        raise ValueError(f"{RATE} has commands that failed: {', '.join(failed)}")
    texts = ("commit", "model", "GPU", "tokens")
    heads = ("samples", "command, s", "samples a minute", "times", "in the model, s a sample", "times faster")
    rows = [_rate_cells(line, lines[0]) for line in lines]
    return table_markdown(Table("", columns(*texts, *heads, texts=texts), rows))


def _rate_cells(line: Line, first: Line) -> list[str]:
    begun, model = "begun_samples_per_minute", "model_seconds_per_sample"
    times = [float(line[begun]) / float(first[begun]), float(first[model]) / float(line[model])]
    shown = [f"{value:.1f}" if line is not first else "" for value in times]
    return [
        line["commit"], line["model"], _gpu(line), length_name(int(line["length"])), line["samples"],
        f"{float(line['seconds']):.0f}", f"{float(line[begun]):.0f}", shown[0], f"{float(line[model]):.3g}", shown[1],
    ]  # fmt: skip


DECODING_TABLES: dict[str, Block] = {"decoding": decoding, "ruler-rate": rate}
