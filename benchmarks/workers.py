"""Tells how many samples several workers measure in the time of one, by whole commands; writes a CSV.

    python benchmarks/workers.py OUTPUT.csv --model FOLDER [--workers 1 2] [--executors processes ray] [OPTIONS OF RULER]

``tmbench ruler`` asks one method the same samples with each executor and number of workers, in turns, each time into a
folder of its own. "seconds" is how long the command took, its start and the loading of models included, and
"samples_per_minute" is of that. "begun_samples_per_minute" leaves the start out: it counts from when a quarter of the
samples was kept, by which time every worker should have its model, to the last one. "same_scores" says whether the rows'
scores are those of the first command that came to its end. Options that are not this script's go to ``tmbench ruler``, such
as --offline.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from timing import written

OK, FAILED, TIMED_OUT = "ok", "failed", "timed out"
POLL_S = 0.05
COLUMNS = (
    "time", "device", "torch", "transformers", "tmbench", "commit", "model", "dtype", "method", "length", "tasks", "samples",
    "executor", "workers", "round", "status", "seconds", "samples_per_minute", "begun_samples_per_minute", "same_scores",
)  # fmt: skip
Scores = dict[tuple[str, str, str], str]


class Run(NamedTuple):
    """What a command did."""

    status: str
    seconds: float
    kept: list[tuple[float, int]]
    """How many samples there were, in seconds after its start, whenever there were more than before."""

    def judged(self, whole: bool) -> str:
        """Its status: one that ended well without all that it was asked has failed."""
        return OK if whole else FAILED if self.status == OK else self.status


def main() -> None:
    options, more = _options()
    shown = ("executor", "workers", "round", "status", "seconds", "samples_per_minute", "begun_samples_per_minute")
    told = []
    for row in written(options.output, COLUMNS, measure(options, more)):
        told.append(row)
        print(f"{row['executor']}, {row['workers']} workers: {row['status']} after {row['seconds']} s", flush=True)
    for line in (dict(zip(shown, shown, strict=True)), *told):
        print(*(f"{line[name]:>{len(name)}}" for name in shown))
    if any(row["status"] != OK or row["same_scores"] != "yes" for row in told):
        sys.exit("a command failed, or its scores are not those of the first: there is nothing to compare")


def measure(options: argparse.Namespace, more: Sequence[str]) -> Iterator[dict[str, object]]:
    """A row of every command, all of a round before those of the next."""
    total, first = options.samples * len(options.tasks), None
    asked = ["ruler", "--model", options.model, "--method", options.method, "--length", options.length]
    asked += ["--samples", str(options.samples), *(word for task in options.tasks for word in ("--task", task)), *more]
    for round_ in range(1, options.rounds + 1):
        for executor in options.executors:
            for workers in options.workers:
                with tempfile.TemporaryDirectory() as folder:
                    root = Path(folder, "results")
                    way = ["--executor", executor, "--workers", str(workers), "--output-dir", str(root)]
                    run = watched([sys.executable, "-m", "tmbench", *asked, *way], root, options.timeout)
                    rows = rows_of(root)
                scores = {(row["task"], row["length"], row["method"]): row["score"] for row in rows}
                whole = run.status == OK and bool(run.kept) and run.kept[-1][1] == total and all(scores.values())
                first = scores if first is None and whole else first
                about = rows[0] if rows else {}
                yield {
                    **{
                        name: about.get(name, "") for name in ("time", "torch", "transformers", "tmbench", "commit", "dtype")
                    },
                    "device": about.get("device_name", ""),
                    "model": options.name or options.model,
                    "method": options.method,
                    "length": about.get("length", options.length),
                    "tasks": " ".join(options.tasks),
                    "samples": total,
                    "executor": executor,
                    "workers": workers,
                    "round": round_,
                    "status": run.judged(whole),
                    "seconds": f"{run.seconds:.2f}",
                    "samples_per_minute": f"{60 * total / run.seconds:.2f}" if whole else "",
                    "begun_samples_per_minute": begun_text(run.kept) if whole else "",
                    "same_scores": ("yes" if scores == first else "no") if whole else "",
                }


def watched(command: Sequence[str], root: Path, timeout: float, env: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end, or to the end of its time, and see when the samples below ``root`` came.

    ``env`` is added to this process's own.
    """
    kept: list[tuple[float, int]] = []
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        own = {**os.environ, **(env or {})}
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env=own
        )
        try:
            running = True
            while running:
                running = process.poll() is None
                seconds = time.perf_counter() - start
                count = _samples(root)
                if count > (kept[-1][1] if kept else 0):
                    kept.append((seconds, count))
                if running and seconds > timeout:
                    return Run(TIMED_OUT, seconds, kept)
                time.sleep(POLL_S * running)
        finally:
            # Its workers too, which a command that is killed does not end.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            log.seek(0)
            print(log.read().decode(errors="replace")[-2000:], file=sys.stderr)
        return Run(FAILED if process.returncode else OK, seconds, kept)


def rows_of(root: Path) -> list[dict[str, str]]:
    """The rows that a command left."""
    found = []
    for path in sorted(root.glob("*/ruler/*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            found += list(csv.DictReader(file))
    return found


def begun_rate(kept: Sequence[tuple[float, int]]) -> float | None:
    """Samples per minute from when a quarter was kept to the last; None where these came at once."""
    last, total = kept[-1]
    seconds, count = next(one for one in kept if 4 * one[1] >= total)
    return 60 * (total - count) / (last - seconds) if last > seconds else None


def begun_text(kept: Sequence[tuple[float, int]]) -> str:
    """``begun_rate`` as a CSV has it."""
    rate = begun_rate(kept)
    return "" if rate is None else f"{rate:.2f}"


def _samples(root: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in root.glob("*/ruler/predictions/*/*.jsonl"))


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--name", help="What to call a checkpoint that lies in a folder.")
    parser.add_argument("--method", default="dense")
    parser.add_argument("--length", default="4K")
    parser.add_argument("--tasks", nargs="+", default=["niah_single_1", "vt"])
    parser.add_argument("--samples", type=int, default=40, help="Of each task.")
    parser.add_argument("--executors", nargs="+", default=["processes", *(["ray"] if find_spec("ray") else [])])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, help="Seconds after which a command is ended.")
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
