"""Intervals against a bootstrap written out sample by sample, against known distributions, and the words they lead to."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from tmbench.intervals import GAIN, LOSS, NO_LOSS, TOO_FEW, bootstrap_means, difference, in_words, unseen_samples


def brute_force(tasks, draws=3000, seed=7):
    """The ends of the interval, each sample drawn by itself: another generator, another program, the same definition."""
    draw = random.Random(seed)
    means = sorted(
        statistics.fmean(statistics.fmean(draw.choices(task, k=len(task))) for task in tasks) for _ in range(draws)
    )
    return means[round(0.025 * draws)], means[round(0.975 * draws)]


@pytest.mark.parametrize(
    "tasks",
    [
        [[-100.0] * 4 + [0.0] * 36 + [100.0] * 2],
        [[-20.0, 0.0, 0.0, -40.0, 20.0, 0.0, -60.0, 0.0, 0.0, -100.0]],
        # So few different values among many samples that their counts are drawn.
        [[-100.0] * 12 + [0.0] * 130 + [50.0] * 3],
        # Strata: a task of 60 samples that gains a little, one of 10 that loses much, one that never differs.
        [[0.0] * 50 + [100.0] * 10, [-100.0] * 5 + [0.0] * 5, [0.0] * 30],
        [[random.Random(3).gauss(-3, 12) for _ in range(50)], [random.Random(4).gauss(1, 30) for _ in range(25)]],
    ],
)
def test_the_interval_is_that_of_a_bootstrap_written_out(tasks):
    found = difference(tasks)
    low, high = brute_force(tasks)
    # Both ends wander by the draws: the density at a 2.5 % quantile of a normal is 0.058 / s, so for 3000 draws 0.05 s.
    spread = math.sqrt(sum(statistics.pvariance(task) / len(task) for task in tasks)) / len(tasks)
    assert found.low == pytest.approx(low, abs=0.2 * spread)
    assert found.high == pytest.approx(high, abs=0.2 * spread)
    assert found.mean == pytest.approx(statistics.fmean(statistics.fmean(task) for task in tasks))
    assert (found.pairs, found.tasks) == (sum(map(len, tasks)), len(tasks))
    assert found.differing == sum(value != 0 for task in tasks for value in task)


def test_bootstrap_means_have_the_moments_of_the_sampling_distribution():
    tasks = [np.array([-100.0] * 3 + [0.0] * 17), np.array([5.0, -5.0, 0.0, 40.0])]
    means = bootstrap_means(tasks)
    assert means.mean() == pytest.approx(np.mean([task.mean() for task in tasks]), abs=0.3)
    assert means.std() == pytest.approx(math.sqrt(sum(task.var() / len(task) for task in tasks)) / 2, rel=0.03)


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
    # Five in a hundred miss, give or take three standard errors of 400 experiments, and a percent for the small sample.
    assert 0.91 <= held / experiments <= 0.98


def test_the_interval_of_an_average_over_tasks_holds_the_truth():
    rng = np.random.default_rng(12)
    rates = [0.0, 0.02, 0.3, 0.5]
    experiments = 400
    found = [difference([-100.0 * (rng.random(40) < rate) for rate in rates]) for _ in range(experiments)]
    held = sum(one.low <= -100 * np.mean(rates) <= one.high for one in found)
    assert 0.91 <= held / experiments <= 0.98


@pytest.mark.parametrize(
    ("low", "high", "pairs", "differing", "margin", "words"),
    [
        (-3.0, -0.1, 100, 6, 1.0, LOSS),
        (-0.6, -0.1, 1000, 20, 1.0, LOSS),  # smaller than the margin, and still measured
        (0.1, 3.0, 100, 6, 1.0, GAIN),
        (-3.0, -0.1, 100, 5, 1.0, TOO_FEW),  # five on one side happen by chance
        (-100.0, -100.0, 3, 3, 1.0, TOO_FEW),
        (-3.0, 0.0, 5000, 50, 1.0, TOO_FEW),
        (-3.0, 0.0, 5000, 50, 5.0, NO_LOSS),
        (-0.9, 0.0, 299, 5, 1.0, NO_LOSS),
        (-0.9, 4.0, 299, 50, 1.0, NO_LOSS),  # a gain is possible, a loss of the margin is not
        (-1.0, 1.0, 5000, 50, 1.0, TOO_FEW),
        (0.0, 0.0, 298, 0, 1.0, TOO_FEW),  # nothing differs, and still a rare loss may have been missed
        (0.0, 0.0, 299, 0, 1.0, NO_LOSS),
        (-0.4, -0.1, 5000, 2, 1.0, NO_LOSS),
    ],
)
def test_words(low, high, pairs, differing, margin, words):
    assert in_words(low, high, pairs, differing, margin) == words


@pytest.mark.parametrize("margin", [0.1, 1.0, 5.0, 50.0, 100.0])
def test_as_many_samples_show_a_rare_loss_and_no_fewer(margin):
    least = unseen_samples(margin)
    assert (1 - margin / 100) ** least <= 0.05
    assert least == 1 or (1 - margin / 100) ** (least - 1) > 0.05


def test_so_many_samples_as_needed_tell_a_method_that_loses_nothing_in_four_of_five_measurements():
    rng = np.random.default_rng(13)

    def measure(n):
        return [rng.choice([-100.0, 0.0, 100.0], n, p=[0.02, 0.96, 0.02]) for _ in range(3)]

    # From many samples, so that the spread is known: p(1) = p(-1) = 2 % has the variance 400.
    needed = difference(measure(100_000), margin=4.0).needed
    assert needed == pytest.approx((2.8016 / 4) ** 2 * 400 / 3, rel=0.03)
    told = sum(difference(measure(needed), margin=4.0).verdict == NO_LOSS for _ in range(400))
    few = sum(difference(measure(needed // 4), margin=4.0).verdict == NO_LOSS for _ in range(400))
    assert 0.73 <= told / 400 <= 0.87
    assert few / 400 < 0.5


def test_samples_needed():
    assert difference([[0.0] * 50]).needed == 299, "no spread: the rule of three alone"
    assert difference([[0.0] * 50] * 13).needed == 23, "299 in all"
    assert difference([[0.0] * 50], margin=100).needed == 2
    assert difference([[-100.0]]).needed is None
    assert difference([[-10.0, 10.0] * 50]).needed == math.ceil(2.801585**2 * 100 * 100 / 99)


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
