"""XAttention's rule, written a second time from single products in float64, against the definition."""

import math

import numpy as np
import pytest
import torch

from tmbench_kernels import XAttention

B = 128


def published_mass(q, k, scale, stride, start=0):
    """What the block of queries r gives to the block of keys c, ``[blocks, blocks]``; q has zeros before ``start``."""
    length = len(k)
    blocks = math.ceil(length / B)
    q, k = (np.concatenate([x, np.zeros((blocks * B - length, x.shape[1]))]) for x in (q, k))
    tiles = blocks * B // stride
    logits = np.zeros((tiles, tiles))
    for step in range(stride):
        backwards = np.arange(tiles) * stride + stride - 1 - step
        forwards = np.arange(tiles) * stride + step
        logits += np.einsum("rd,cd->rc", q[backwards], k[forwards])
    mass = np.zeros((blocks, blocks))
    for row in range(start // stride, math.ceil(length / stride)):
        weights = np.exp((logits[row, : row + 1] - logits[row, : row + 1].max()) * scale / stride)
        for column, share in enumerate(weights / weights.sum()):
            mass[row * stride // B, column * stride // B] += share
    return mass


def minimal_cover(mass, r, threshold):
    chosen = {0, r}
    held = sum(mass[r, c] for c in chosen)
    for c in sorted(set(range(r + 1)) - chosen, key=lambda n: (-mass[r, n], n)):
        if held >= threshold * mass[r].sum():
            break
        chosen.add(c)
        held += mass[r, c]
    return chosen


def first_chunk_cover(mass, r, threshold):
    """Over all blocks, the future ones included, with prefix sums that lag one place behind."""
    order = [r, *sorted((c for c in range(len(mass)) if c != r), key=lambda n: (-mass[r, n], n))]
    prefix = [0.0, 0.0]
    for c in order:
        prefix.append(prefix[-1] + mass[r, c])
    flags = [prefix[place] < threshold * mass[r].sum() for place in range(len(order))]
    # A block that is not taken leaves its place to block 0.
    return {c if taken else 0 for c, taken in zip(order, flags, strict=True)} & set(range(r + 1))


CASES = [
    XAttention(stride=16, threshold=0.5),
    XAttention(stride=8, threshold=0.9),
    XAttention(stride=4, threshold=0.7, first_chunk=512),
    XAttention(stride=16, threshold=0.6, first_chunk=2048),
    XAttention(stride=128, threshold=0.4),
    XAttention(stride=1, threshold=0.8),
]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", CASES, ids=repr)
@pytest.mark.parametrize(("length", "start"), [(1100, 1099), (1100, 1000), (777, 133), (1100, 512), (300, 260)])
def test_a_chunk_has_strides_of_its_own_queries(make_structured_qkv, pattern, length, start):
    q, k, _ = make_structured_qkv(length, heads=2, kv_heads=1, dim=32, seed=length)
    q[:, :, :start] = 0
    chosen = pattern.select(q[:, :, start:], k, scale=0.2).to_map()
    for h in range(2):
        mass = published_mass(q[0, h].double().numpy(), k[0, 0].double().numpy(), 0.2, pattern.stride, start)
        covers = [
            (first_chunk_cover if r * B < pattern.first_chunk else minimal_cover)(mass, r, pattern.threshold)
            for r in range(start // B, len(mass))
        ]
        assert [set(row.nonzero().flatten().tolist()) for row in chosen[0, h]] == covers
        rule = pattern.rule(q[0, h, start:], k[0, 0], 0.2)
        assert [set(row.nonzero().flatten().tolist()) for row in rule] == covers


@pytest.mark.slow
@pytest.mark.parametrize("pattern", CASES, ids=repr)
def test_definition_and_selection_follow_the_published_rule(make_qkv, make_structured_qkv, pattern):
    for make, length, scale in (
        (make_structured_qkv, 1100, 0.2),
        (make_structured_qkv, 1024, 0.5),
        (make_qkv, 777, 0.9),
        (make_qkv, 3, 0.3),
    ):
        q, k, _ = make(length, heads=2, kv_heads=1, dim=32, seed=length)
        chosen = pattern.select(q, k, scale=scale).to_map()
        for h in range(2):
            mass = published_mass(q[0, h].double().numpy(), k[0, 0].double().numpy(), scale, pattern.stride)
            covers = [
                (first_chunk_cover if r * B < pattern.first_chunk else minimal_cover)(mass, r, pattern.threshold)
                for r in range(len(mass))
            ]
            assert [set(row.nonzero().flatten().tolist()) for row in chosen[0, h]] == covers
            rule = pattern.rule(q[0, h], k[0, 0], scale)
            assert [set(row.nonzero().flatten().tolist()) for row in rule] == covers


def test_a_cover_holds_the_threshold_and_no_block_too_many(make_structured_qkv):
    q, k, _ = make_structured_qkv(1300, heads=1, kv_heads=1)
    mass = published_mass(q[0, 0].double().numpy(), k[0, 0].double().numpy(), 0.2, 16)
    for row, kept in enumerate(XAttention(threshold=0.8).select(q, k, scale=0.2).to_map()[0, 0]):
        held = sorted(mass[row, c] for c in range(row + 1) if kept[c] and c not in (0, row))
        total = mass[row][kept.numpy()].sum()
        assert total >= 0.8 * mass[row].sum()
        assert not held or total - held[0] < 0.8 * mass[row].sum()


def test_the_first_chunk_takes_more(make_structured_qkv):
    q, k, _ = make_structured_qkv(1536)
    without, with_chunk = (XAttention(threshold=0.5, first_chunk=n).select(q, k).counts for n in (0, 1024))
    assert (with_chunk[:, :, :8] >= without[:, :, :8]).all()
    assert (with_chunk[:, :, 3:8] > without[:, :, 3:8]).any()
    assert torch.equal(with_chunk[:, :, 8:], without[:, :, 8:])


def test_ties_go_to_the_earlier_block():
    """With queries of zeros every block of a row holds the same, but for its own."""
    x = torch.zeros(1, 1, 1024, 8)
    chosen = XAttention(threshold=0.5).select(x, x).to_map()[0, 0]
    assert chosen[7].nonzero().flatten().tolist() == [0, 1, 2, 3, 7]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stride": 0}, "stride must divide 128, so that blocks hold whole strides, but it is 0"),
        ({"stride": 24}, "stride must divide 128, so that blocks hold whole strides, but it is 24"),
        ({"stride": 256}, "stride must divide"),
        ({"threshold": 0}, "threshold must be above 0"),
        ({"threshold": 1.5}, "threshold must be above 0 and at most 1, not 1.5"),
        ({"first_chunk": 100}, "first_chunk must be 0 or a multiple of 128, not 100"),
        ({"first_chunk": -128}, "first_chunk must be 0 or a multiple of 128, not -128"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        XAttention(**values)
