"""FlashPrefill's rule, written a second time query by query in float64, against the definition."""

import math

import numpy as np
import pytest
import torch

from tmbench_kernels import FlashPrefill

B = 128


def published_blocks(q, k, scale, pattern, start=0):
    """The key blocks of every query block, chosen by the queries from ``start`` on."""
    length = len(k)
    blocks = math.ceil(length / B)
    means = [k[first : first + B].mean(0) for first in range(0, length, B)]
    chosen = []
    for r in range(blocks):
        weights = [0.0] * (r + 1)
        for i in range(max(r * B, start), min((r + 1) * B, length)):
            for c in range(r + 1):
                if i >= (c + 1) * B - 1:
                    weights[c] += math.exp(q[i] @ means[c] * scale)
        total = sum(weights)
        shares = [weight / total if total else 0.0 for weight in weights]
        heaviest = sorted(range(r + 1), key=lambda n: (-shares[n], n))[: math.ceil(pattern.min_budget / B)]
        chosen.append(
            {
                c
                for c in range(r + 1)
                if shares[c] >= pattern.alpha * max(shares)
                or c < pattern.sinks
                or r - c < pattern.window
                or r >= blocks - pattern.last
                or c in heaviest
            }
        )
    return chosen


CASES = [
    FlashPrefill(alpha=0.5, sinks=0, window=1, last=0),
    FlashPrefill(alpha=0.1, sinks=2, window=2, last=2),
    FlashPrefill(alpha=0.8, sinks=1, window=1, last=1, min_budget=257),
    FlashPrefill(alpha=1, sinks=0, window=3, last=0),
]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", CASES, ids=repr)
@pytest.mark.parametrize(("length", "start"), [(1100, 1099), (1100, 1000), (777, 133), (1024, 512), (300, 260)])
def test_a_chunk_chooses_by_its_own_queries(make_structured_qkv, pattern, length, start):
    q, k, _ = make_structured_qkv(length, heads=2, kv_heads=1, dim=32, seed=length)
    chosen = pattern.select(q[:, :, start:], k, scale=0.2).to_map()
    for h in range(2):
        expected = published_blocks(q[0, h].double().numpy(), k[0, 0].double().numpy(), 0.2, pattern, start)[start // B :]
        assert [set(row.nonzero().flatten().tolist()) for row in chosen[0, h]] == expected
        rule = pattern.rule(q[0, h, start:], k[0, 0], 0.2)
        assert [set(row.nonzero().flatten().tolist()) for row in rule.tril(start // B)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("pattern", CASES, ids=repr)
def test_definition_and_selection_follow_the_published_rule(make_qkv, make_structured_qkv, pattern):
    for make, length, scale in (
        (make_structured_qkv, 1100, 0.2),
        (make_structured_qkv, 1024, 0.5),
        (make_qkv, 777, 4.0),
        (make_qkv, 100, 0.3),
    ):
        q, k, _ = make(length, heads=2, kv_heads=1, dim=32, seed=length)
        chosen = pattern.select(q, k, scale=scale).to_map()
        for h in range(2):
            expected = published_blocks(q[0, h].double().numpy(), k[0, 0].double().numpy(), scale, pattern)
            assert [set(row.nonzero().flatten().tolist()) for row in chosen[0, h]] == expected
            rule = pattern.rule(q[0, h], k[0, 0], scale).tril()
            assert [set(row.nonzero().flatten().tolist()) for row in rule] == expected


def test_large_logits_do_not_overflow(make_structured_qkv):
    """e^500 does not fit into float32; only differences of logits matter, and a constant added to all keys is none."""
    q, k, _ = make_structured_qkv(1100)
    pattern = FlashPrefill(alpha=0.5, sinks=0, window=1, last=0)
    q, k = (torch.cat([x, torch.zeros(*x.shape[:3], 1)], dim=3) for x in (q, k))
    expected = pattern.select(q, k, scale=0.2).to_map()
    q[..., -1], k[..., -1] = 50.0, 50.0
    assert torch.equal(pattern.select(q, k, scale=0.2).to_map(), expected)


def test_what_is_always_kept(make_structured_qkv):
    q, k, _ = make_structured_qkv(2000)
    row, column = np.indices((16, 16))
    expected = (column <= row) & ((column < 3) | (row - column < 2) | (row >= 15))
    chosen = FlashPrefill(alpha=1, sinks=3, window=2, last=1).select(q, k).to_map()
    assert chosen[0, 0][torch.from_numpy(expected)].all()
    assert (chosen.sum((2, 3)) <= int(expected.sum()) + 16).all(), "and of the others one a row at most"


@pytest.mark.parametrize("budget", [1, 128, 129, 1000])
def test_a_budget_is_a_least_number_of_blocks(make_structured_qkv, budget):
    q, k, _ = make_structured_qkv(1500)
    counts = FlashPrefill(alpha=1, sinks=0, window=1, last=0, min_budget=budget).select(q, k).counts
    least = math.ceil(budget / B)
    assert (counts >= torch.arange(1, 13).clamp(max=least)).all()
    assert counts.max() <= least + 1, "the own block joins"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -0.1}, "alpha must be between 0 and 1"),
        ({"alpha": 2}, "alpha must be between 0 and 1, not 2"),
        ({"window": 0}, "window must be at least 1"),
        ({"sinks": -1}, "sinks must not be negative, but it is -1"),
        ({"last": -1}, "last must not be negative"),
        ({"min_budget": -1}, "min_budget must not be negative"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        FlashPrefill(**values)
