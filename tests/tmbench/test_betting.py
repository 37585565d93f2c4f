"""The test that may be looked at after every sample: how soon it tells, and how often it errs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tmbench.measure.betting import ACCEPTED, REFUSED, UNDECIDED, bounds, fewest, judged

MARGIN, CAP, RISK = 0.1, 1.0, 0.05


def looked(draw, most, margin=MARGIN, cap=CAP):
    """The first verdict of looks after every eight samples, and how many there were."""
    values: list[float] = []
    while len(values) < most:
        values += [draw() for _ in range(8)]
        found = judged(values, margin, cap, RISK, RISK)
        if found != UNDECIDED:
            return found, len(values)
    return UNDECIDED, most


def gauss(mean, spread, seed=0):
    source = random.Random(seed)
    return lambda: source.gauss(mean, spread)


def test_it_tells_as_soon_as_it_can():
    far, near = looked(gauss(1.0, 0.1), 800), looked(gauss(0.13, 0.1), 800)
    assert far == (REFUSED, 8)
    assert near[0] == REFUSED
    assert near[1] > 16
    assert looked(gauss(-1.0, 0.1), 800) == (ACCEPTED, 8)
    same = looked(lambda: 0.0, 800)
    assert same[0] == ACCEPTED
    assert 32 <= same[1] <= 64, "no sample showed a loss, and a rare one of the whole cap is excluded"
    assert looked(gauss(0.1, 0.1), 800) == (UNDECIDED, 800)


def test_a_smaller_cap_asks_for_fewer_samples():
    assert looked(lambda: 0.0, 800, cap=0.3)[1] < looked(lambda: 0.0, 800, cap=1.0)[1] < looked(lambda: 0.0, 800, cap=3.0)[1]


def test_the_fewest_values_that_accept_are_known_before():
    count = fewest(MARGIN, CAP, RISK)
    assert judged([0.0] * count, MARGIN, CAP, RISK, RISK) == ACCEPTED
    assert judged([0.0] * (count - 1), MARGIN, CAP, RISK, RISK) == UNDECIDED


def test_a_value_counts_for_no_more_than_the_cap():
    values = [0.0] * 40
    assert judged([*values, 1e9], MARGIN, CAP, RISK, RISK) == judged([*values, 1.0], MARGIN, CAP, RISK, RISK)


def test_the_interval_agrees_with_the_verdicts():
    source = random.Random(1)
    values = [source.gauss(0.02, 0.2) for _ in range(60)]
    low, high = bounds(values, CAP, RISK)
    assert low < float(np.mean(values)) < high
    assert judged(values, high + 1e-6, CAP, RISK / 2, RISK / 2) == ACCEPTED
    assert judged(values, high - 1e-6, CAP, RISK / 2, RISK / 2) == UNDECIDED
    assert judged(values, low - 1e-6, CAP, RISK / 2, RISK / 2) == REFUSED or low < 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exponential", "rare", "even"])
def test_a_mean_at_the_margin_is_accepted_as_seldom_as_asked_however_often_one_looks(kind):
    def drawn(source):
        if kind == "exponential":
            return min(source.expovariate(10.0), 1.0)
        return float(source.random() < 0.1) if kind == "rare" else source.uniform(0.0, 0.2)

    source = random.Random(0)
    mean = sum(drawn(source) for _ in range(200_000)) / 200_000
    runs, wrong, missed = 600, 0, 0
    for seed in range(runs):
        own = random.Random(seed)
        wrong += looked(lambda own=own: drawn(own), 128, margin=mean)[0] == ACCEPTED
    assert wrong / runs < RISK
    for seed in range(200):
        own = random.Random(seed)
        low, high = bounds([drawn(own) for _ in range(48)], CAP, RISK)
        missed += not low <= mean <= high
    assert missed / 200 < RISK
