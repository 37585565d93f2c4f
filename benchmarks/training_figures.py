"""Figures within sentences and tables about how the embedded model was trained, for training/README.md."""

from __future__ import annotations

import statistics

from sources import Block, Sources

from ruler_tasks import TASKS

RUNS = {"muon": "training/accuracy.csv", "adamw": "training/accuracy-adamw.csv"}
LOG = "training/log.csv"


def trained(sources: Sources, run: str, length: str, what: str) -> str:
    """Of a run's accuracies at a length: a task's, the range over the needle tasks, or the mean over all tasks."""
    found = {line["task"]: float(line["accuracy"]) for line in sources.lines(RUNS[run]) if line["length"] == length}
    if what == "needles":
        needles = [found[task] for task in TASKS if task.startswith("niah")]
        return f"{min(needles):g}-{max(needles):g}"
    value = statistics.fmean(found.values()) if what == "mean" else found[what]
    return "100" if value == 100 else f"{value:.1f}"


def log(sources: Sources, what: str, opened: str = "") -> str:
    """Of the log: seconds and tokens when a length had opened; steps, tokens and tokens a second at the end."""
    lines = sources.lines(LOG)
    line = next(line for line in lines if line["top"] == opened) if opened else lines[-1]
    seconds, tokens = float(line["seconds"]), int(line["tokens"])
    texts = {
        "steps": line["step"],
        "seconds": f"{seconds:.0f} s",
        "tokens": f"{tokens / 1e9:.1f} billion" if tokens >= 5e8 else f"{tokens / 1e6:.0f} M",
        "speed": f"{tokens / seconds / 1e6:.1f} M tokens/s",
    }
    return texts[what]


TRAINING: dict[str, Block] = {"trained": trained, "log": log}
