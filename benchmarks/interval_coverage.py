"""How often the intervals of tmbench.report.intervals hold the truth, and how often its words are wrong.

It takes minutes on one core:

    .venv/bin/python benchmarks/interval_coverage.py > benchmarks/interval_coverage.csv

Experiments draw paired differences from known distributions, in points, with as many samples a task and as many tasks as
RULER runs have: no difference at all, rare losses of everything, skewed distributions whose gains hide a rare loss, shares
of an answer as aggregation tasks score them, a loss in one task alone. One line of CSV for each distribution, number of
tasks and number of samples; rates are over the experiments. A false gain is a "gain" where the true mean is 0 or less, a
false loss a "loss" where it is 0 or more, and a loss missed is "no measurable loss" where the margin or more is lost.
"""

from __future__ import annotations

import csv
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tmbench.report.intervals import GAIN, LOSS, MARGIN, NO_LOSS, TOO_FEW, Difference, differences

SAMPLES, TASKS, EXPERIMENTS = (10, 25, 50, 100, 200, 500), (1, 13), 2000
AT_ONCE = 250

Distribution = dict[float, float]
"""Probabilities of differences in points; what is missing to 1 belongs to 0."""
SAME: Distribution = {}
SHARES: Distribution = {-20: 0.1, -10: 0.25, 10: 0.15}
UNLIKE: Sequence[Distribution] = (
    *([SAME] * 6),
    {-100: 0.84},
    {-100: 0.1, 100: 0.06},
    {-25: 0.4, -50: 0.4, 25: 0.1},
    {-20: 0.2, -60: 0.2, -100: 0.1, 20: 0.1},
    SHARES,
    {-33: 0.05, 33: 0.03},
    {-100: 0.02},
)
"""Tasks as streaming attention leaves them: most the same, some lost."""

EVERYWHERE: dict[str, Distribution] = {
    "no sample differs": SAME,
    "1 % lose 100": {-100: 0.01},
    "2 % lose 100": {-100: 0.02},
    "5 % lose 100": {-100: 0.05},
    "2 % lose 100, 2 % gain 100": {-100: 0.02, 100: 0.02},
    "mean 0: 1 % lose 100, 10 % gain 10": {-100: 0.01, 10: 0.1},
    "mean 0: 2 % lose 100, all others gain 2.04": {-100: 0.02, 100 * 0.02 / 0.98: 0.98},
    "mean 0: 2 % gain 100, all others lose 2.04": {100: 0.02, -100 * 0.02 / 0.98: 0.98},
    "mean 0: 5 % lose 40, 20 % gain 10": {-40: 0.05, 10: 0.2},
    "shares of 10: mean -3": SHARES,
    "shares of 25: mean 0": {-50: 0.02, -25: 0.06, 25: 0.1},
    "half lose 100": {-100: 0.5},
}
"""The same distribution in every task."""
ALONE: dict[str, Distribution] = {
    "one point of the average, 13 % of one task lose 100": {-100: 0.13},
    "one point of the average, half of one task lose 26": {-26: 0.5},
}
"""One task of thirteen has this distribution; in the others no sample differs."""


def cases(tasks: int) -> dict[str, Sequence[Distribution]]:
    """Names and each task's distribution."""
    found: dict[str, Sequence[Distribution]] = {name: [one] * tasks for name, one in EVERYWHERE.items()}
    if tasks == len(UNLIKE):
        found |= {name: [one, *[SAME] * (tasks - 1)] for name, one in ALONE.items()}
        found["tasks unlike each other"] = UNLIKE
    return found


def mean(distributions: Sequence[Distribution]) -> float:
    """The true average over tasks, in points."""
    return sum(value * part for one in distributions for value, part in one.items()) / len(distributions)


def measured(distributions: Sequence[Distribution], samples: int, experiments: int, seed: int) -> Iterator[Difference]:
    """What each experiment finds, drawn by this seed."""
    generator = np.random.default_rng(seed)
    for start in range(0, experiments, AT_ONCE):
        count = min(AT_ONCE, experiments - start)
        tasks = []
        for one in distributions:
            values, parts = [*one, 0.0], [*one.values(), 1 - sum(one.values())]
            tasks.append(generator.choice(values, (count, samples), p=parts))
        yield from differences(list(zip(*tasks, strict=True)))


def rates(distributions: Sequence[Distribution], samples: int, experiments: int, seed: int) -> dict[str, float]:
    """Parts of the experiments in which the interval holds the truth, a word is wrong, and each word is said."""
    truth = mean(distributions)
    truth = 0.0 if abs(truth) < 1e-9 else truth
    found = list(measured(distributions, samples, experiments, seed))
    said = {words: sum(one.verdict == words for one in found) / experiments for words in (LOSS, GAIN, NO_LOSS, TOO_FEW)}
    return {
        "mean": truth,
        # Ends are rounded: an interval of one point alone must not miss it by a rounding.
        "covered": sum(one.low - 1e-6 <= truth <= one.high + 1e-6 for one in found) / experiments,
        "width": sum(one.high - one.low for one in found) / experiments,
        "false_gain": said[GAIN] if truth <= 0 else 0.0,
        "false_loss": said[LOSS] if truth >= 0 else 0.0,
        "loss_missed": said[NO_LOSS] if truth <= -MARGIN else 0.0,
        **said,
    }


def seed(name: str, tasks: int, samples: int) -> int:
    """Of the experiments of one line."""
    return zlib.crc32(f"{name}, {tasks} tasks of {samples}".encode())


def main() -> None:
    writer: Any = None
    for tasks in TASKS:
        for name, distributions in cases(tasks).items():
            for samples in SAMPLES:
                measured_rates = rates(distributions, samples, EXPERIMENTS, seed(name, tasks, samples))
                found = {key: f"{value:.4g}" for key, value in measured_rates.items()}
                line = {"differences": name, "tasks": tasks, "samples": samples, "experiments": EXPERIMENTS, **found}
                if writer is None:
                    writer = csv.DictWriter(sys.stdout, line, lineterminator="\n")
                    writer.writeheader()
                writer.writerow(line)
                sys.stdout.flush()


if __name__ == "__main__":
    main()
