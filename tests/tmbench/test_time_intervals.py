"""Intervals of times: worked by hand, held to their level by simulation, and words that follow from them."""

from __future__ import annotations

import math

import numpy as np
import pytest

import made_rows
from tmbench.report.time_intervals import (
    APART,
    FASTER,
    NO_DIFFERENCE,
    ONE_REPEAT,
    SLOWER,
    UNKNOWN_REPEATS,
    TimeDifference,
    _cut,
    compare_rows,
    time_difference,
    time_text,
)
from tmbench.results.rows import TtftRow


def row(samples, interleaved="dense tri_mix", rate=1e12):
    about = {"method": "dense", "length": 2048, "prompt": "kv", "repeats": 2, "warmup": 1}
    told = {"samples_s": samples, "interleaved": interleaved, "matrix_rate_flops": rate}
    return TtftRow(**(made_rows.COMMON | about | told))


def test_three_rounds_by_hand():
    found = time_difference([0.8, 0.9, 1.0], [1.0, 1.0, 1.0])
    logs = [math.log(0.8), math.log(0.9), 0.0]
    mean = sum(logs) / 3
    reach = 4.302653 * math.sqrt(sum((one - mean) ** 2 for one in logs) / 2) / math.sqrt(3)
    assert found.percent == pytest.approx(-10)
    assert found.low == pytest.approx(100 * (math.exp(mean - reach) - 1), rel=1e-4)
    assert found.high == pytest.approx(100 * (math.exp(mean + reach) - 1), rel=1e-4)
    assert found.verdict == NO_DIFFERENCE


@pytest.mark.parametrize(
    ("own", "verdict"),
    [
        ([1.0, 1.0, 1.66], NO_DIFFERENCE),
        ([1.01, 1.02, 1.66], NO_DIFFERENCE),
        ([1.0, 1.0, 1.0], NO_DIFFERENCE),
        ([0.5, 0.51, 0.49], FASTER),
        ([2.0, 2.1, 1.9], SLOWER),
        ([*[0.7, 0.71, 0.72] * 4, 3.0], FASTER),
    ],
)
def test_words(own, verdict):
    assert time_difference(own, [1.0] * len(own)).verdict == verdict


def test_what_changes_both_of_a_round_drops_out():
    """A machine that becomes three times as slow from round to round, and a method that is always 5 % faster."""
    dense = [1.0, 3.0, 9.0]
    found = time_difference([0.95 * 1.001, 0.95 * 3.0, 0.95 * 8.99], dense)
    assert found.verdict == FASTER
    assert -5.5 < found.low < found.percent < found.high < -4.5


def test_ranks_cut_as_many_as_the_published_tables_say():
    """Critical values of the signed-rank test at 5 %, two-sided: Wilcoxon and Wilcox 1964."""
    published = {6: 0, 7: 2, 8: 3, 9: 5, 10: 8, 11: 10, 12: 13, 13: 17, 14: 21, 15: 25, 20: 52, 25: 89, 50: 434}
    assert {rounds: _cut(rounds) for rounds in published} == published


def test_six_rounds_go_from_the_least_to_the_greatest_ratio():
    found = time_difference([0.9, 0.8, 0.7, 0.95, 0.85, 0.75], [1.0] * 6)
    assert (found.low, found.high) == pytest.approx((-30, -5))


def spread(kind, generator, rounds):
    """How much longer than the fastest each repeat takes."""
    if kind == "even":
        return np.exp(0.03 * generator.standard_normal(rounds))
    if kind == "skewed":
        return np.exp(0.3 * np.abs(generator.standard_normal(rounds)))
    return np.exp(0.02 * generator.standard_normal(rounds)) * np.where(generator.random(rounds) < 0.2, 1.7, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["even", "skewed", "slow at times"])
@pytest.mark.parametrize("rounds", [3, 5, 7, 10])
def test_methods_that_take_equally_long_are_told_apart_in_one_case_of_twenty(kind, rounds):
    generator = np.random.default_rng(rounds)
    drift = np.exp(np.cumsum(0.2 * generator.standard_normal((1000, rounds)), axis=1))
    wrong = sum(
        time_difference(list(one * spread(kind, generator, rounds)), list(one * spread(kind, generator, rounds))).verdict
        != NO_DIFFERENCE
        for one in drift
    )
    assert wrong <= 70, "5 % of 1000, and three standard deviations"


def test_rows_are_compared_interleaved_and_more_than_once():
    dense = row("1.0 1.1")
    assert compare_rows(row("1.0 1.1", interleaved="tri_mix"), dense) == APART
    assert compare_rows(row("1.0 1.1", rate=2e12), dense) == APART
    assert compare_rows(row("1.0"), row("2.0")) == ONE_REPEAT
    for text in ("", "1.0", "1.0 x", "1.0 0", "1.0 nan", "1.0 inf"):
        assert compare_rows(row(text), dense) == UNKNOWN_REPEATS
    half = compare_rows(row("0.5 0.55"), dense)
    assert isinstance(half, TimeDifference)
    assert half.percent == pytest.approx(-50)


@pytest.mark.parametrize(("own", "others"), [([], []), ([1.0], [1.0]), ([1.0, 1.0], [1.0]), ([1.0, 0.0], [1.0, 1.0])])
def test_what_cannot_be_compared_is_refused(own, others):
    with pytest.raises(ValueError, match="two or more rounds"):
        time_difference(own, others)


def test_ends_beyond_all_use_are_not_told():
    apart = time_difference([1.0, 9.0], [1.0, 1.0])
    assert apart.high > 1e6
    words = time_text(apart.percent, apart.low, apart.high, apart.verdict)
    assert words == "no measurable difference (-100.0 to over +1000 %)"
    assert time_text(-5.0, -3000.0, -1.0, "slower") == "-5.0 % (below -1000 to -1.0)"
