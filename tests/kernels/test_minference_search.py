"""The search's objective against the released rule written out: the whole matrix, one mask per candidate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import HeadPattern
from tmbench_kernels.minference import search

SMALL = (
    HeadPattern("stream_llm", 5, 20),
    HeadPattern("vertical_and_slash", 3, 40),
    HeadPattern("vertical_and_slash", 50, 31),
    HeadPattern("block_sparse", 0, 0),
)


def probabilities(q, k, scale):
    logits = q @ k.T * scale
    logits[np.triu_indices(len(k), 1)] = -np.inf
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def mask_of(entry, attention):
    length = len(attention)
    i, j = np.indices(attention.shape)
    if entry.type == "stream_llm":
        return (j < entry.vertical) | (i - j <= entry.slash)
    if entry.type == "vertical_and_slash":
        last = attention[max(length - 64, 0) :]
        first_row = length - len(last)
        columns = last.sum(0)
        distances = [sum(last[r, first_row + r - d] for r in range(len(last)) if first_row + r >= d) for d in range(length)]
        columns[:30], distances[:30] = np.inf, [np.inf] * len(distances[:30])
        best = (
            np.argsort(-np.array(x), kind="stable")[:n] for x, n in ((columns, entry.vertical), (distances, entry.slash))
        )
        top_columns, top_distances = best
        return np.isin(j, top_columns) | np.isin(i - j, top_distances)
    blocks = -(-length // 32)
    mask = np.zeros_like(attention, dtype=bool)
    for row in range(blocks):
        rows = slice(32 * row, 32 * row + 32)
        weights = [attention[rows, 32 * c : 32 * c + 32].sum() for c in range(blocks)]
        for c in np.argsort(-np.array(weights), kind="stable")[: max(1, blocks // 8)]:
            mask[rows, 32 * c : 32 * c + 32] = True
    return mask


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(2, 500),
    part=st.floats(0, 0.99),
    elements=st.sampled_from([1, 2**14, 2**30]),
    seed=st.integers(0, 99),
)
def test_what_candidates_keep_is_what_their_masks_keep(make_qkv, length, part, elements, seed):
    first_row = int(part * length)
    q, k, _ = make_qkv(length, heads=3, kv_heads=1, dim=16, seed=seed)
    parts: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(search._ELEMENTS, "cpu", elements)
        kept = search.kept_attention(q[0], k[0, 0], scale=0.6, candidates=SMALL, first_row=first_row, advance=parts.append)
    for h in range(3):
        attention = probabilities(q[0, h].double().numpy(), k[0, 0].double().numpy(), 0.6)
        expected = [(attention * mask_of(entry, attention))[first_row:].sum(1).mean() for entry in SMALL]
        assert kept[h].tolist() == pytest.approx(expected, abs=2e-6)
    assert sum(parts) == pytest.approx(1)


def test_the_candidates_are_the_published_ones_in_their_order():
    assert [(entry.type, entry.vertical, entry.slash) for entry in search.CANDIDATES] == [
        ("stream_llm", 100, 800),
        ("vertical_and_slash", 30, 800),
        ("vertical_and_slash", 100, 750),
        ("vertical_and_slash", 500, 700),
        ("vertical_and_slash", 3500, 100),
        ("block_sparse", 1000, 6096),
    ]
    assert search.FIRST_ROW == 2500


@pytest.mark.slow
def test_heads_of_a_known_kind_are_found():
    """A window, many columns, and blocks that differ from query block to query block: each has its own winner."""
    length, random = 6144, torch.Generator().manual_seed(0)
    positions = torch.arange(length).double()
    q, k = torch.zeros(1, length, 8), torch.zeros(length, 8)

    def circle(angle, size):
        return size * torch.stack([angle.cos(), angle.sin()], dim=1).float()

    def best():
        return search.best_pattern(search.kept_attention(q, k, scale=1.0)[0].tolist())

    # Less than one turn over the whole prompt: attention falls off with distance, half a Gaussian 300 tokens wide.
    q[0, :, :2] = k[:, :2] = circle(positions / 2000, 2000 / 300)
    assert best().type == "stream_llm"
    assert best().score == pytest.approx(math.erf(800 / 300 / 2**0.5), abs=2e-3)
    q[0, :, :2], k[:, :2] = 0, 0

    q[0, :, 2] = 1
    k[torch.randperm(length, generator=random)[:3000], 2] = 12
    assert (best().vertical, best().slash) == (3500, 100)
    q[0, :, 2], k[:, 2] = 0, 0

    # Every block of queries has one block of keys, somewhere.
    q[0, :, :2] = circle((positions // 32) * 2.4, 400)
    k[:, :2] = circle(torch.randperm(192, generator=random)[(positions // 32).long()] * 2.4, 400)
    assert best().type == "block_sparse"
    assert best().score > 0.9


def test_the_first_of_equals_wins():
    assert search.best_pattern([0.5, 0.7, 0.7, 0.1, 0.7, 0.7]) == HeadPattern("vertical_and_slash", 30, 800, 0.7)


def test_the_published_files_hold_vertical_slash_heads():
    assert search.published_remapping(HeadPattern("stream_llm", 100, 800, 0.9)) == HeadPattern(
        "vertical_and_slash", 100, 800, 0.9
    )
    assert search.published_remapping(HeadPattern("block_sparse", 7, 8, 0.9)) == HeadPattern(
        "vertical_and_slash", 1000, 6096, 0.9
    )
    same = HeadPattern("vertical_and_slash", 500, 700, 0.9)
    assert search.published_remapping(same) == same


def test_no_query_that_counts_is_an_error(make_qkv):
    q, k, _ = make_qkv(100, heads=2, kv_heads=1)
    with pytest.raises(ValueError, match="counts queries from 2500 on, but there are 100"):
        search.kept_attention(q[0], k[0, 0], scale=1.0)
