"""Many comparisons at once: chance alone makes hardly any loss of them, and clear losses stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tmbench.report.intervals import (
    GAIN,
    LOSS,
    NO_LOSS,
    POSSIBLE,
    TOO_FEW,
    by_chance,
    difference,
    differences,
    family,
    intervals,
)

ALL_LOST = [[-100.0] * 40]
NOTHING = [[0.0] * 40]
SIX_LOST = [[-100.0] * 6 + [0.0] * 34]
"""The fewest that make a loss alone."""


def said(*comparisons):
    return [one.verdict for one in family(comparisons)]


def test_alone_a_comparison_is_what_it_was():
    for one in (ALL_LOST, NOTHING, SIX_LOST):
        assert family([one]) == [difference(one)]
    assert family([]) == []


def test_a_loss_that_chance_may_have_made_is_a_possible_one():
    assert said(SIX_LOST) == [LOSS]
    assert said(SIX_LOST, NOTHING) == [POSSIBLE[LOSS], TOO_FEW]
    assert said(*[NOTHING] * 129, ALL_LOST)[-1] == LOSS
    mirrored = [[-value for value in SIX_LOST[0]]]
    assert said(mirrored, NOTHING) == [POSSIBLE[GAIN], TOO_FEW]
    assert said(*[[[0.0] * 400]] * 5) == [NO_LOSS] * 5


def test_what_is_confirmed_makes_it_easier_for_the_rest():
    """Holm's steps: of two that are left after ten confirmed ones, each is held against two and not against twelve."""
    close = [[-100.0] * 8 + [0.0] * 32]
    alone = intervals([[np.array(close[0])]], allowance=float(np.log(12 / 0.025)))
    assert alone[0][1] > 0, "Bonferroni's bound would not confirm it"
    assert said(*[ALL_LOST] * 10, close, NOTHING) == [LOSS] * 11 + [TOO_FEW]
    assert said(*[NOTHING] * 11, close) == [TOO_FEW] * 11 + [POSSIBLE[LOSS]]


def test_only_words_change():
    comparisons = [SIX_LOST, NOTHING, ALL_LOST]
    for one, plain in zip(family(comparisons), differences(comparisons), strict=True):
        assert replace(one, verdict=plain.verdict) == plain


@pytest.mark.slow
def test_chance_alone_makes_a_loss_of_hardly_any_table():
    """13 tasks and ten methods of 50 samples, of which none differs from dense in truth: 130 differences a table.

    The verdicts of each comparison alone have a loss somewhere in more than a quarter of such tables.
    """
    rng = np.random.default_rng(7)
    tables, cells = 60, 130
    drawn = rng.choice([-100.0, 0.0, 100.0], size=(tables, cells, 50), p=[0.1, 0.8, 0.1])
    alone = [sum(one.verdict == LOSS for one in differences([[cell] for cell in table])) for table in drawn]
    together = [sum(one.verdict == LOSS for one in family([[cell] for cell in table])) for table in drawn]
    assert sum(map(bool, alone)) > 0.25 * tables
    assert by_chance(cells) == pytest.approx(3.25)
    assert np.mean(alone) <= by_chance(cells)
    assert sum(map(bool, together)) <= 4, "2.5 % of 60 are 1.5, and more than 4 come once in 70 times where it is so"
