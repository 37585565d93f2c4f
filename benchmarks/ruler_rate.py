"""Tells how many RULER samples a minute several commits of tmbench measure, each by a whole command; writes a CSV.

    python benchmarks/ruler_rate.py OUTPUT.csv --checkout 7f4cb21=/tmp/before --samples 3 --checkout now=. --samples 40 \\
        --model FOLDER [OPTIONS OF RULER]

A checkout is a folder with the code of a commit, from which its packages can be imported. ``--samples``, given as often,
is how many of each task its command asks: a slow one needs fewer. All of RULER's tasks are asked. "seconds" is how long
the command took, start and loading included. "begun_samples_per_minute" counts from when a quarter of the samples was kept
to the last one, as ``workers.py`` does. "model_seconds_per_sample" is the mean of what rows say that a sample took in the
model: making prompts is not in it. Options that are not this script's go to ``tmbench ruler``, such as --offline and
--dtype.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from timing import written
from workers import OK, begun_text, rows_of, watched

COLUMNS = (
    "time", "device", "torch", "transformers", "commit", "model", "dtype", "method", "length", "tasks", "samples", "status",
    "seconds", "begun_samples_per_minute", "model_seconds_per_sample",
)  # fmt: skip
RUN = "from tmbench.cli import main; main()"
"""What every commit's command is, whatever it is called there."""


def main() -> None:
    options, more = _options()
    told = list(written(options.output, COLUMNS, measure(options, more)))
    for row in told:
        print(row["commit"], row["status"], row["seconds"], row["begun_samples_per_minute"], row["model_seconds_per_sample"])
    if any(row["status"] != OK for row in told):
        sys.exit("a command failed: there is nothing to compare")


def measure(options: argparse.Namespace, more: Sequence[str]) -> Iterator[dict[str, object]]:
    """A row of every commit's command."""
    for (commit, folder), samples in zip(options.checkout, options.samples, strict=True):
        asked = ["ruler", "--model", options.model, "--method", options.method, "--length", options.length]
        asked += ["--samples", str(samples), *more]
        paths = [str(folder), str(folder / "kernels"), os.environ.get("PYTHONPATH", "")]
        with tempfile.TemporaryDirectory() as output:
            root = Path(output, "results")
            command = [sys.executable, "-P", "-c", RUN, *asked, "--output-dir", str(root)]
            run = watched(command, root, options.timeout, {"PYTHONPATH": os.pathsep.join(filter(None, paths))})
            rows = rows_of(root)
        total = sum(int(row["samples"]) for row in rows if row["score"])
        whole = run.status == OK and bool(rows) and total == samples * len(rows)
        about = rows[0] if rows else {}
        yield {
            **{name: about.get(name, "") for name in ("time", "torch", "transformers", "dtype")},
            "device": about.get("device_name", ""),
            "commit": commit,
            "model": options.name or options.model,
            "method": options.method,
            "length": about.get("length", options.length),
            "tasks": len(rows),
            "samples": total,
            "status": run.judged(whole),
            "seconds": f"{run.seconds:.2f}",
            "begun_samples_per_minute": begun_text(run.kept) if whole else "",
            "model_seconds_per_sample": f"{_mean(rows):.5f}" if whole else "",
        }


def _mean(rows: Sequence[dict[str, str]]) -> float:
    counts = [int(row["samples"]) for row in rows]
    return sum(count * float(row["seconds_per_sample"]) for count, row in zip(counts, rows, strict=True)) / sum(counts)


def _checkout(text: str) -> tuple[str, Path]:
    commit, _, folder = text.partition("=")
    path = Path(folder).resolve()
    if not (path / "tmbench").is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not COMMIT=FOLDER, where the folder has tmbench's code")
    return commit, path


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--checkout", type=_checkout, action="append", required=True, metavar="COMMIT=FOLDER")
    parser.add_argument("--samples", type=int, action="append", required=True, help="Of each task; once for each checkout.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--name", help="What to call a checkpoint that lies in a folder.")
    parser.add_argument("--method", default="dense")
    parser.add_argument("--length", default="4K")
    parser.add_argument("--timeout", type=float, default=1800, help="Seconds after which a command is ended.")
    options, more = parser.parse_known_args()
    if len(options.samples) != len(options.checkout):
        parser.error("--samples is given once for each --checkout")
    return options, more


if __name__ == "__main__":
    main()
