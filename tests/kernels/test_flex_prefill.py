"""FlexPrefill's rule, written a second time over single keys and queries in float64, against the definition."""

import math

import numpy as np
import pytest
import torch

from tmbench_kernels import FlexPrefill

B = 128


def published_blocks(q, k, scale, pattern, start=0):
    """One head's queries from ``start`` on: (the key blocks of each query block, whether the head is query-aware)."""
    length = len(k)
    blocks, first_block, last = math.ceil(length / B), start // B, min(B, length - start)
    if length <= max(2 * B, math.ceil(pattern.min_budget / B) * B):
        return [set(range(r + 1)) for r in range(first_block, blocks)], False
    keys, distances = np.zeros(length), np.zeros(length)
    for i in range(length - last, length):
        share = softmax(k[: i + 1] @ q[i] * scale)
        for j in range(i + 1):
            keys[j] += share[j] / last
            distances[i - j] += share[j] / last
    diagonals = distances[::-1]
    by_key = [keys[first : first + B].sum() for first in range(0, length, B)]
    by_diagonal = [diagonals[first : first + B].sum() for first in range(0, length, B)]
    key_means = np.stack([k[first : first + B].mean(0) for first in range(0, length, B)])
    query_means = {r: q[max(r * B, start) : (r + 1) * B].mean(0) for r in range(first_block, blocks)}
    estimate = softmax(key_means @ q[length - last :].mean(0) * scale)
    aware = jensen_shannon(estimate, by_key) < pattern.tau
    least = math.ceil(pattern.min_budget / B)
    most = blocks if pattern.max_budget is None else min(math.ceil(pattern.max_budget / B), blocks)
    counts = [least if aware else max(least, min(tokens_for(x, pattern.gamma) // B + 1, most)) for x in (keys, distances)]
    by_key[0] = by_diagonal[-1] = math.inf
    columns = set(sorted(range(blocks), key=lambda n: (-by_key[n], n))[: counts[0]])
    ranked = sorted(range(blocks), key=lambda n: (-by_diagonal[n], -n))[: counts[1]]
    offsets = {blocks - 1 - n for n in ranked}
    chosen = [{c for c in range(r + 1) if c in columns or r - c in offsets} for r in range(first_block, blocks)]
    if aware:
        cells = []
        for r in range(first_block, blocks):
            share = softmax(key_means[: r + 1] @ query_means[r] * scale)
            cells += [(-share[c], r, c) for c in range(r + 1)]
        total = 0.0
        for share, r, c in sorted(cells):
            total -= share
            if total > pattern.gamma * (blocks - first_block):
                break
            chosen[r - first_block].add(c)
    return chosen, aware


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def tokens_for(shares, gamma):
    total, count = 0.0, 0
    for share in sorted(shares, reverse=True):
        total += share
        if total > gamma:
            break
        count += 1
    return count + 1


def jensen_shannon(p, q):
    total = 0.0
    for a, b in zip(p, q, strict=True):
        total += a * math.log(2 * a / (a + b)) / 2 + b * math.log(2 * b / (a + b)) / 2
    return math.sqrt(max(total, 0.0))


CASES = [
    FlexPrefill(gamma=0.5, tau=0.1, min_budget=128),
    FlexPrefill(gamma=0.7, tau=0.3, min_budget=1, max_budget=400),
    FlexPrefill(gamma=0.3, tau=0.5, min_budget=129),
    FlexPrefill(gamma=0.95, tau=0.1, min_budget=256),
]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", CASES, ids=repr)
def test_definition_and_selection_follow_the_published_rule(make_qkv, make_structured_qkv, pattern):
    kinds = set()
    for make, length, scale in (
        (make_structured_qkv, 1100, 0.2),
        (make_structured_qkv, 1280, 0.1),
        (make_qkv, 999, 0.3),
        (make_qkv, 256, 0.3),
        (make_qkv, 257, 0.3),
    ):
        q, k, _ = make(length, heads=4, kv_heads=2, dim=32, seed=length)
        chosen = pattern.select(q, k, scale=scale).to_map()
        for h in range(4):
            head = q[0, h].double().numpy(), k[0, h // 2].double().numpy()
            expected, aware = published_blocks(*head, scale, pattern)
            kinds.add(aware)
            assert [set(row.nonzero().flatten().tolist()) for row in chosen[0, h]] == expected
            rule = pattern.rule(q[0, h], k[0, h // 2], scale)
            assert [set(row.nonzero().flatten().tolist()) for row in rule] == expected
    assert kinds == {True, False}, "both kinds of head must occur"


@pytest.mark.slow
@pytest.mark.parametrize("pattern", CASES, ids=repr)
def test_a_chunk_chooses_by_its_last_queries(make_structured_qkv, pattern):
    kinds = set()
    for length, start, scale in ((1100, 1099, 0.2), (1280, 1200, 0.1), (999, 133, 0.3), (1280, 512, 0.1), (257, 230, 0.3)):
        q, k, _ = make_structured_qkv(length, heads=4, kv_heads=2, dim=32, seed=length)
        chosen = pattern.select(q[:, :, start:], k, scale=scale).to_map()
        for h in range(4):
            head = q[0, h].double().numpy(), k[0, h // 2].double().numpy()
            expected, aware = published_blocks(*head, scale, pattern, start)
            kinds.add(aware)
            assert [set(row.nonzero().flatten().tolist()) for row in chosen[0, h]] == expected
            rule = pattern.rule(q[0, h, start:], k[0, h // 2], scale)
            assert [set(row.nonzero().flatten().tolist()) for row in rule] == expected
    assert kinds == {True, False}, "both kinds of head must occur"


def test_budgets_bound_columns_and_diagonals(make_structured_qkv):
    q, k, _ = make_structured_qkv(2048)
    least = FlexPrefill(gamma=0.01, tau=0, min_budget=300)
    counts = least.select(q, k).counts
    assert counts.max() <= 6, "3 columns and 3 diagonals"
    assert torch.equal(FlexPrefill(gamma=1, tau=0, min_budget=300, max_budget=300).select(q, k).counts, counts)
    chosen = least.select(q, k).to_map()
    assert chosen[..., 0].all(), "the first block"
    assert chosen.diagonal(dim1=2, dim2=3).all(), "the own block"


@pytest.mark.parametrize(
    ("length", "min_budget", "dense"), [(256, 1, True), (257, 1, False), (512, 500, True), (1025, 500, False)]
)
def test_short_prompts_are_dense(make_structured_qkv, length, min_budget, dense):
    q, k, _ = make_structured_qkv(length)
    counts = FlexPrefill(gamma=0.01, min_budget=min_budget).select(q, k).counts
    assert torch.equal(counts[0, 0], torch.arange(1, counts.shape[2] + 1, dtype=torch.int32)) == dense


@pytest.mark.parametrize(("depth", "aware"), [(-20.0, True), (-200.0, False)])
def test_a_distribution_with_a_zero_is_not_query_aware(depth, aware):
    """In float32 e^-200 is 0. Blocks that two distributions agree to be empty make their distance not a number."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1024, 16, generator=random) for _ in range(2))
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 256:512, 0] = depth
    maps = [FlexPrefill(gamma=0.9, tau=tau, min_budget=128).select(q, k, scale=1.0).to_map() for tau in (1, 0)]
    assert torch.equal(*maps) != aware
    assert torch.equal(maps[0][0, 0], FlexPrefill(gamma=0.9, tau=1, min_budget=128).rule(q[0, 0], k[0, 0], 1.0))


def test_ties_go_to_the_earlier_block_and_the_nearer_diagonal():
    """Queries that are all zero give every key the same: columns tie, and so do the diagonals that are as long."""
    q = torch.zeros(1, 1, 1024, 8)
    k = torch.randn(1, 1, 1024, 8, generator=torch.Generator().manual_seed(0))
    chosen = FlexPrefill(gamma=0.01, tau=0, min_budget=300).select(q, k).to_map()[0, 0]
    assert chosen[7].nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7]


@pytest.mark.parametrize("gamma", [0.3, 0.5, 0.77, 0.95])
@pytest.mark.parametrize("length", [1000, 1024, 1408])
def test_ties_among_what_pooled_queries_ask_for_go_to_the_earlier_block(gamma, length):
    """Few kinds of blocks, of small whole numbers, so that means are exact: shares tie within a row and between rows."""
    random = torch.Generator().manual_seed(length)
    kinds = torch.randint(-1, 2, (3, 8), generator=random).float()
    q, k = (kinds[torch.randint(3, (2, 11), generator=random)].repeat_interleave(B, 1)[None, :, :length] for _ in range(2))
    q[:, 1] = 0
    pattern = FlexPrefill(gamma=gamma, tau=1, min_budget=128)
    chosen = pattern.select(q, k, scale=0.5).to_map()
    assert torch.equal(chosen[0], torch.stack([pattern.rule(q[0, h], k[0, h], 0.5) for h in range(2)]))
    assert not torch.equal(chosen, FlexPrefill(gamma=gamma, tau=0, min_budget=128).select(q, k, scale=0.5).to_map())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gamma": 0}, "gamma must be above 0"),
        ({"gamma": 1.01}, "gamma must be above 0 and at most 1, not 1.01"),
        ({"gamma": float("nan")}, "gamma must be"),
        ({"tau": -0.1}, "tau must be between 0 and 1"),
        ({"min_budget": 0}, "min_budget must be 1 or more, not 0"),
        ({"min_budget": 300, "max_budget": 200}, "max_budget must be at least min_budget, 300, not 200"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        FlexPrefill(**values)
