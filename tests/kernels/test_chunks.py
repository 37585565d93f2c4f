"""Fewer queries than keys: what each pattern computes for a chunk of a prompt, as its module's first lines define it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import (
    BlockTopK,
    Dense,
    DenseProbe,
    FlashPrefill,
    FlexPrefill,
    HeadPattern,
    MInferenceHeads,
    Sections,
    Triangle,
    VerticalSlash,
    XAttention,
)

BY_POSITION = [Dense(), Triangle(3, 50, 0), Triangle(0, 200, 0), Triangle.streaming(130, 1)]
BY_OWN_BLOCK = [
    XAttention(stride=16, threshold=0.6),
    XAttention(stride=8, threshold=0.7, first_chunk=256),
    FlashPrefill(alpha=0.6, sinks=1, window=1, last=0),
    FlashPrefill(alpha=0.9, sinks=0, window=2, last=0, min_budget=300),
    BlockTopK(3),
]
BY_LAST_QUERIES = [
    Triangle(3, 50, 70),
    Triangle(3, 50, 2000),
    FlashPrefill(alpha=0.6, sinks=1, window=1, last=2),
    FlexPrefill(gamma=0.6, min_budget=128),
    FlexPrefill(gamma=0.4, tau=0.7, min_budget=100, max_budget=300),
    VerticalSlash(((40, 60),)),
    MInferenceHeads(
        (
            HeadPattern("stream_llm", 3, 50),
            HeadPattern("block_sparse"),
            HeadPattern("vertical_and_slash", 40, 60),
            HeadPattern("stream_llm", 3, 50),
        )
    ),
]
PATTERNS = BY_POSITION + BY_OWN_BLOCK + BY_LAST_QUERIES
CHUNKS = [1, 64, 100, 300]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("queries", CHUNKS)
def test_selection_and_pairs_are_those_of_the_definition(make_structured_qkv, pattern, queries):
    for length in (queries, 901, 1024):
        q, k, _ = make_structured_qkv(length, batch=2, seed=length)
        q = q[:, :, -queries:]
        mask = pattern.mask(q, k, scale=0.3)
        assert mask.shape[2:] == (queries, length)
        assert mask.any(3).all(), "no query is without a key"
        assert not (mask & ~Dense().mask(q, k)).any(), "no query sees a later key"
        assert pattern.pairs(q, k, scale=0.3) == int(mask.expand(2, 4, -1, -1).sum())
        if hasattr(pattern, "block_map"):
            assert torch.equal(pattern.select(q, k, scale=0.3).mask(), mask)


@pytest.mark.parametrize("pattern", BY_POSITION, ids=repr)
def test_positions_alone_give_the_rows_of_one_piece(pattern):
    q = torch.zeros(1, 4, 300, 8)
    whole = pattern.mask(q, q)
    for start in (1, 100, 299):
        assert torch.equal(pattern.mask(q[:, :, start:], q), whole[:, :, start:])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", BY_OWN_BLOCK, ids=repr)
def test_blocks_that_choose_for_themselves_give_the_rows_of_one_piece(make_structured_qkv, pattern):
    """In chunks that end on the edges of blocks, whatever comes after them."""
    q, k, _ = make_structured_qkv(1000)
    whole = pattern.mask(q, k, scale=0.3)
    for start, end in ((0, 384), (384, 512), (512, 1000)):
        part = pattern.mask(q[:, :, start:end], k[:, :, :end], scale=0.3)
        assert torch.equal(part, whole[:, :, start:end, :end])


@pytest.mark.parametrize(
    "pattern", [Triangle(3, 20, 70), Triangle(0, 9, 0), FlashPrefill(alpha=1, sinks=0, window=1, last=2)]
)
@pytest.mark.parametrize("length", [300, 384, 500])
def test_a_known_length_keeps_the_last_queries_for_the_prompts_end(make_structured_qkv, pattern, length):
    q, k, _ = make_structured_qkv(length)
    whole = pattern.mask(q, k)
    for start, end in ((0, 128), (128, 256), (256, length)):
        part = pattern.of_chunk(end, length).mask(q[:, :, start:end], k[:, :, :end])
        assert torch.equal(part, whole[:, :, start:end, :end])


def test_an_unknown_length_lets_the_last_queries_of_every_chunk_see_all():
    q = torch.zeros(1, 1, 300, 8)
    mask = Triangle(3, 20, 70).mask(q[:, :, 100:200], q[:, :, :200])[0, 0]
    assert mask[30:].equal(Dense().mask(q[:, :, 130:200], q[:, :, :200])[0, 0])
    assert mask[29].sum() == 23


@pytest.mark.parametrize("pattern", [VerticalSlash(), FlexPrefill(), XAttention(), BlockTopK(), Dense()])
def test_a_known_length_changes_no_other_rule(pattern):
    assert pattern.of_chunk(100, 1000) == pattern


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 45), st.integers(0, 45), st.integers(0, 45))
@settings(deadline=None)
def test_triangle_against_loops(length, queries, n_init, n_local, last_n):
    queries = min(queries, length)
    pattern = Triangle(n_init, n_local, last_n)
    q, k = torch.zeros(2, 3, queries, 4), torch.zeros(2, 3, length, 4)
    expected = [
        [j <= i and (j < n_init or i - j < n_local or i >= length - last_n) for j in range(length)]
        for i in range(length - queries, length)
    ]
    assert pattern.mask(q, k)[0, 0].tolist() == expected
    assert pattern.pairs(q, k) == 6 * sum(map(sum, expected))


def test_the_probe_refuses_a_chunk(make_qkv):
    q, k, v = make_qkv(64)
    with pytest.raises(ValueError, match="the probe differentiates whole prompts, not 10 queries over 64 keys"):
        DenseProbe(sections=Sections()).attend(q[:, :, -10:], k, v)
