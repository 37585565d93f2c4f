"""Intervals against a likelihood written out, exact bounds and known distributions, and the words they lead to."""

from __future__ import annotations

import importlib.util
import math
import random
import statistics
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest

from tmbench.report.intervals import (
    GAIN,
    LOSS,
    NO_LOSS,
    TOO_FEW,
    difference,
    differences,
    in_words,
    interval,
    unseen_samples,
)

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_likelihood_lost(task, mean):
    """How much less likely the best distribution on [-1, 1] of at most this mean makes the samples: its dual, by a grid."""
    bets = np.linspace(0, 1 / (1 + mean), 2_000, endpoint=False)
    return max(np.log1p(bets[:, None] * (task - mean)).sum(axis=1).max(), 0.0)


@pytest.mark.parametrize(
    "task",
    [
        [-100.0] * 4 + [0.0] * 36 + [100.0] * 2,
        [-20.0, 0.0, 0.0, -40.0, 20.0, 0.0, -60.0, 0.0, 0.0, -100.0],
        [-100.0] * 12 + [0.0] * 130 + [50.0] * 3,
        [2.04] * 50,
        [0.0] * 12,
        [random.Random(3).gauss(-3, 12) for _ in range(50)],
    ],
)
def test_both_ends_are_where_the_samples_become_forty_times_less_likely(task):
    found = difference([task])
    scaled = np.array(task) / 100
    assert log_likelihood_lost(scaled, found.low / 100) == pytest.approx(math.log(40), rel=1e-3)
    assert log_likelihood_lost(-scaled, -found.high / 100) == pytest.approx(math.log(40), rel=1e-3)
    assert found.mean == pytest.approx(statistics.fmean(task))
    assert (found.pairs, found.differing) == (len(task), sum(value != 0 for value in task))


@pytest.mark.slow
def test_the_ends_over_tasks_are_the_best_split_of_the_mean_among_them():
    # Unequal tasks: each has the mean of its best candidate, and any other split of the same average costs as much or more.
    tasks = [[0.0] * 50 + [40.0] * 10, [-100.0] * 5 + [0.0] * 5, [-20.0] * 10 + [0.0] * 20]
    found = difference(tasks)
    scaled = [np.array(task) / 100 for task in tasks]
    # One sample of each task goes into its own mean.
    parts = [(len(task) - 1) / len(task) for task in tasks]
    grids = [np.linspace(task.mean() - 0.7 * (1 + task.mean()), task.mean(), 500) for task in scaled]
    costs = [
        np.array([part * log_likelihood_lost(task, mean) for mean in grid])
        for grid, task, part in zip(grids, scaled, parts, strict=True)
    ]
    means, together = grids[0][:, None] + grids[1], costs[0][:, None] + costs[1]
    lowest = min(
        (means[together + cost <= math.log(40)].min(initial=1) + mean) / 3
        for mean, cost in zip(grids[2], costs[2], strict=True)
    )
    assert found.low / 100 == pytest.approx(lowest, abs=0.002)
    assert found.mean == pytest.approx(statistics.fmean(statistics.fmean(task) for task in tasks))
    assert (found.pairs, found.tasks) == (100, 3)


@pytest.mark.parametrize("n", [1, 3, 50, 368, 5000])
def test_samples_without_a_difference_bound_what_may_have_been_missed(n):
    found = difference([[0.0] * n])
    assert -found.low == found.high == pytest.approx(100 * (1 - 0.025 ** (1 / n)), abs=1e-6)


def test_many_samples_make_a_normal_interval():
    task = np.random.default_rng(2).choice([-100.0, 0.0, 100.0], 40_000, p=[0.2, 0.7, 0.1])
    found = difference([task, task])
    error = task.std() / math.sqrt(2 * len(task))
    assert found.high - found.mean == pytest.approx(2.716 * error, rel=0.02)
    assert found.mean - found.low == pytest.approx(2.716 * error, rel=0.02)


def test_tasks_of_one_sample_tell_nothing_and_samples_at_the_bound_leave_no_room_beyond_it():
    assert (difference([[0.0]] * 13).low, difference([[0.0]] * 13).high) == (-100, 100)
    all_lost = difference([[-100.0] * 7] * 2)
    assert (all_lost.low, all_lost.verdict) == (-100, LOSS)
    assert interval([np.array([1.0, 1.0, 1.0])], 0.0, 1.0) == (cast(float, pytest.approx(0.025 ** (1 / 3))), 1.0)


def test_the_search_ends_where_a_task_reaches_the_bound():
    # Newton's steps alone go to and fro here.
    tasks = [[100.0] * 10, [0] * 3 + [2.0] * 7, [-2.0] * 8 + [0] * 2, [2.0] * 10, [-100.0] * 10, [-20.0] * 10, [5.0] * 10]
    tasks += [[20.0] * 10, [-20.0] * 4 + [2.0] * 6, [5.0] * 7 + [20.0] * 3, [-5.0] * 10, [-20.0] * 9 + [-5.0]]
    tasks += [[-100.0] + [0.0] * 9]
    assert difference(tasks).low == pytest.approx(-7.4707, abs=1e-3)


def test_a_comparison_says_the_same_alone_and_among_others():
    draw = np.random.default_rng(4)
    tasks = [[draw.choice([-100.0, 0.0, 25.0, 3.3], int(n)) for n in (5, 60)] for _ in range(40)]
    assert differences(tasks) == [difference(strata) for strata in tasks]
    assert differences([]) == []


CASES = [
    # (differences, tasks, samples a task)
    ("2 % lose 100", 1, 50),
    ("2 % lose 100", 1, 100),
    ("1 % lose 100", 1, 50),
    ("1 % lose 100", 1, 100),
    ("mean 0: 2 % lose 100, all others gain 2.04", 1, 50),
    ("mean 0: 2 % lose 100, all others gain 2.04", 1, 200),
    ("mean 0: 2 % gain 100, all others lose 2.04", 1, 50),
    ("mean 0: 1 % lose 100, 10 % gain 10", 13, 50),
    ("1 % lose 100", 13, 25),
    ("one point of the average, 13 % of one task lose 100", 13, 25),
    ("one point of the average, 13 % of one task lose 100", 13, 50),
    ("shares of 25: mean 0", 1, 500),
    ("half lose 100", 1, 10),
    ("half lose 100", 13, 10),
    ("tasks unlike each other", 13, 25),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tasks", "samples"), CASES)
def test_the_interval_holds_and_no_word_is_wrong_where_losses_are_rare(name, tasks, samples):
    coverage = script("interval_coverage")
    found = coverage.rates(coverage.cases(tasks)[name], samples, 500, seed=17)
    assert found["covered"] >= 0.95
    # 2.5 % and two standard errors of 500 experiments.
    assert max(found["false_gain"], found["false_loss"], found["loss_missed"]) <= 0.039


@pytest.mark.slow
def test_a_loss_of_a_point_is_seen_by_500_samples_of_13_tasks():
    coverage = script("interval_coverage")
    for name in ("1 % lose 100", "one point of the average, half of one task lose 26"):
        assert coverage.rates(coverage.cases(13)[name], 500, 100, seed=18)[LOSS] >= 0.99


def test_the_page_and_the_sentence_in_the_docs_are_those_of_the_simulation():
    render, source = script("kernel_pages"), ROOT / "benchmarks" / "interval_coverage.csv"
    assert render.page(source) == (ROOT / "docs" / "interval-coverage.md").read_text()
    rows = pd.read_csv(source, dtype=str)
    words = " ".join((ROOT / "docs" / "accuracy.md").read_text().split())
    assert render.coverage_in_words(rows) in words
    assert rows.covered.astype(float).min() >= 0.95
    assert rows[["false_gain", "false_loss", "loss_missed"]].astype(float).to_numpy().max() <= 0.025


@pytest.mark.slow
def test_lines_of_the_simulation_are_made_again_by_its_seeds():
    coverage = script("interval_coverage")
    rows = pd.read_csv(ROOT / "benchmarks" / "interval_coverage.csv")
    for name, tasks, samples in (("2 % lose 100", 1, 50), ("1 % lose 100", 13, 25)):
        found = coverage.rates(
            coverage.cases(tasks)[name], samples, coverage.EXPERIMENTS, coverage.seed(name, tasks, samples)
        )
        (row,) = rows[(rows.differences == name) & (rows.tasks == tasks) & (rows.samples == samples)].to_dict("records")
        assert {key: row[key] for key in found} == pytest.approx(found, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mean", "draw"),
    [
        (-2.0, lambda rng, n: rng.normal(-2.0, 10.0, n)),
        (-8.0, lambda rng, n: rng.choice([-100.0, 0.0, 100.0], n, p=[0.12, 0.84, 0.04])),
        # Skewed as aggregation tasks are: most samples lose a little, some nothing.
        (-10.0, lambda rng, n: -rng.exponential(10.0, n)),
    ],
)
def test_the_interval_holds_the_truth_in_95_of_100_experiments(mean, draw):
    rng = np.random.default_rng(11)
    experiments = 400
    found = [difference([draw(rng, 60)]) for _ in range(experiments)]
    held = sum(one.low <= mean <= one.high for one in found)
    assert held / experiments >= 0.95


@pytest.mark.slow
def test_the_interval_of_an_average_over_tasks_holds_the_truth():
    rng = np.random.default_rng(12)
    rates = [0.0, 0.02, 0.3, 0.5]
    experiments = 400
    found = [difference([-100.0 * (rng.random(40) < rate).astype(float) for rate in rates]) for _ in range(experiments)]
    held = sum(one.low <= -100 * np.mean(rates) <= one.high for one in found)
    assert held / experiments >= 0.95


@pytest.mark.parametrize(
    ("low", "high", "margin", "words"),
    [
        (-3.0, -0.1, 1.0, LOSS),
        (-0.6, -0.1, 1.0, LOSS),  # smaller than the margin, and still measured
        (0.1, 3.0, 1.0, GAIN),
        (-3.0, 0.0, 1.0, TOO_FEW),
        (-3.0, 0.0, 5.0, NO_LOSS),
        (-0.9, 0.0, 1.0, NO_LOSS),
        (-0.9, 4.0, 1.0, NO_LOSS),  # a gain is possible, a loss of the margin is not
        (-1.0, 1.0, 1.0, TOO_FEW),
    ],
)
def test_words(low, high, margin, words):
    assert in_words(low, high, margin) == words


@pytest.mark.parametrize("n", [6, 20, 100, 3000])
def test_fewer_than_six_samples_that_differ_make_no_loss(n):
    assert difference([[-100.0] * 5 + [0.0] * (n - 5)]).high > 0, "five on one side happen by chance"
    assert difference([[-100.0] * 6 + [0.0] * (n - 6)]).verdict == LOSS
    assert difference([[100.0] * 5 + [0.0] * (n - 5), [0.0] * n]).low < 0
    assert difference([[-100.0] * 3]).verdict == TOO_FEW


def test_more_samples_must_differ_where_each_loses_little():
    assert difference([[-20.0] * 20 + [0.0] * 100]).high > 0
    assert difference([[-20.0] * 21 + [0.0] * 100]).verdict == LOSS


@pytest.mark.slow
@pytest.mark.parametrize("margin", [0.1, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("tasks", [1, 2, 13])
def test_as_many_samples_without_a_difference_exclude_a_loss_and_no_fewer(margin, tasks):
    least = unseen_samples(margin, tasks)
    assert difference([[0.0] * least] * tasks, margin).verdict == NO_LOSS
    assert least == 1 or difference([[0.0] * (least - 1)] * tasks, margin).verdict == TOO_FEW


@pytest.mark.slow
def test_so_many_samples_as_needed_tell_a_method_that_loses_nothing_in_four_of_five_measurements():
    rng = np.random.default_rng(13)

    def measure(n):
        return [rng.choice([-100.0, 0.0, 100.0], n, p=[0.02, 0.96, 0.02]) for _ in range(3)]

    # From many samples, so that the spread is known: p(1) = p(-1) = 2 % has the variance 400.
    needed = difference(measure(100_000), margin=4.0).needed
    assert needed is not None
    assert needed == pytest.approx((3.5579 / 4) ** 2 * 400 / 3 + 1, rel=0.03)
    told = sum(difference(measure(needed), margin=4.0).verdict == NO_LOSS for _ in range(400))
    few = sum(difference(measure(needed // 4), margin=4.0).verdict == NO_LOSS for _ in range(400))
    assert 0.73 <= told / 400 <= 0.87
    assert few / 400 < 0.5


def test_samples_needed():
    assert difference([[0.0] * 50]).needed == 368, "no spread: what may have been missed alone"
    assert difference([[0.0] * 50] * 13).needed == 30, "368 in all, and one more each"
    assert difference([[0.0] * 50], margin=100).needed == 2
    assert difference([[-100.0]]).needed is None
    assert difference([[-10.0, 10.0] * 50]).needed == math.ceil(
        (math.sqrt(2 * math.log(40)) + 0.841621) ** 2 * 100 * 100 / 99
    )


def test_the_same_samples_in_any_order_make_the_same_interval():
    values = [float(value) for value in range(-30, 20)]
    shuffled = random.Random(5).sample(values, len(values))
    assert difference([values, [0.0, 1.0]]) == difference([shuffled, [1.0, 0.0]])


@pytest.mark.parametrize("tasks", [[], [[]], [[1.0], []]])
def test_nothing_to_compare_is_refused(tasks):
    with pytest.raises(ValueError, match="at least one"):
        difference(tasks)


@pytest.mark.parametrize("margin", [0.0, -1.0, 101.0, math.nan])
def test_a_margin_that_is_none_is_refused(margin):
    with pytest.raises(ValueError, match="the margin must be above 0 and at most 100"):
        difference([[1.0]], margin)


@pytest.mark.parametrize("value", [100.5, -101.0, math.nan])
def test_a_difference_that_no_score_can_have_is_refused(value):
    with pytest.raises(ValueError, match="are not all from -100 to 100"):
        difference([[0.0, value]])
