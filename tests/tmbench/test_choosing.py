"""The search for a set of layers, on losses that are made up: what it finds, and how many sets it tries."""

from __future__ import annotations

import pytest

from tmbench.measure.choosing import Search


def searched(order, accepts, *, empty=False):
    """The search at its end, and the sets that it tried."""
    search, tried = Search(order), []
    steps = search.run(empty=empty)
    try:
        layers = next(steps)
        while True:
            tried.append(layers)
            layers = steps.send(accepts(layers))
    except StopIteration:
        return search, tried


def costing(costs, margin=0.1):
    return lambda layers: sum(costs.get(layer, 0.0) for layer in layers) <= margin


def test_layers_that_cost_nothing_are_all_found_wherever_they_are():
    costs = {0: 1.0, 1: 0.5, 9: 0.4, 20: 0.3}
    order = sorted(range(32), key=lambda layer: (layer < 8, -layer))
    search, tried = searched(order, costing(costs))
    assert set(search.best) == set(range(32)) - set(costs)
    assert len(tried) < 32
    assert len(set(tried)) == len(tried)


@pytest.mark.parametrize("bad", [(0, 1), (3, 12), (14, 15)])
def test_a_wrong_order_costs_trials_and_finds_as_much(bad):
    order = [*bad, *(layer for layer in range(16) if layer not in bad)]
    search, tried = searched(order, costing(dict.fromkeys(bad, 1.0)))
    assert set(search.best) == set(range(16)) - set(bad)
    for place, layers in enumerate(tried):
        before = [set(one) for one in tried[:place] if not costing(dict.fromkeys(bad, 1.0))(one)]
        assert not any(one <= set(layers) for one in before), "what holds a refused set is not tried"


def test_all_layers_are_one_trial_where_they_cost_nothing():
    search, tried = searched(range(4), lambda layers: True)
    assert tried == [(0, 1, 2, 3)]
    assert search.best == (0, 1, 2, 3)


def test_no_layer_is_chosen_where_each_costs_too_much():
    search, _ = searched(range(4), lambda layers: False)
    assert search.best == ()
    assert search.accepted == []


def test_a_method_that_is_refused_without_any_layer_is_not_searched_further():
    search, tried = searched(range(4), lambda layers: False, empty=True)
    assert (tried, search.accepted) == ([()], [])
    search, tried = searched(range(2), lambda layers: not layers, empty=True)
    assert tried[0] == ()
    assert search.accepted == [()]
