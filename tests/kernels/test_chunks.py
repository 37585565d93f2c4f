"""Fewer queries than keys: what each pattern computes for a chunk of a prompt, as its module's first lines define it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right

from tmbench_kernels import (
    Backend,
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
from tmbench_kernels.reference import masked_attention, masked_lse
from tmbench_kernels.sdpa import sdpa

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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("queries", CHUNKS)
def test_attention_is_exact(make_structured_qkv, assert_exact, pattern, queries, dtype):
    for length in (queries, 901, 1024):
        q, k, v = make_structured_qkv(length, batch=2, dtype=dtype, seed=length)
        q = q[:, :, -queries:]
        mask = pattern.mask(q, k, scale=0.3)
        out = pattern.attend(q, k, v, scale=0.3)
        assert_exact(out, q, k, v, mask, 0.3)
        assert out.transpose(1, 2).is_contiguous(), "as models want it in memory"
        assert_exact(pattern.last_row(q, k, v, scale=0.3), q[:, :, -1:], k, v, mask[:, :, -1:], 0.3)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([Dense(), Triangle(3, 50, 0), Triangle(3, 50, 70), Triangle(0, 0, 300), Triangle(200, 1, 1)]),
    st.integers(1, 700),
    st.sets(st.integers(1, 699)),
    st.integers(0, 99),
)
def test_chunks_of_any_sizes_give_what_one_piece_gives(make_qkv, pattern, length, cuts, seed):
    """Where the prompt's length is known, in float64."""
    q, k, v = make_qkv(length, dim=16, dtype=torch.float64, seed=seed)
    edges = [0, *sorted(cut for cut in cuts if cut < length), length]
    parts = [
        pattern.of_chunk(end, length).attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end])
        for start, end in pairwise(edges)
    ]
    exact = masked_attention(q, k, v, pattern.mask(q, k))
    torch.testing.assert_close(torch.cat(parts, dim=2), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [*PATTERNS, Triangle(0, 0, 20)], ids=repr)
@pytest.mark.parametrize("queries", [1, 100])
def test_capped_logits_and_their_sums(make_structured_qkv, assert_exact, pattern, queries):
    q, k, v = make_structured_qkv(700)
    q = q[:, :, -queries:]
    mask = pattern.mask(q, k)
    out, lse = pattern.attend_lse(q, k, v, softcap=3.0)
    assert_exact(out, q, k, v, mask, softcap=3.0)
    torch.testing.assert_close(lse.double(), masked_lse(q, k, mask, softcap=3.0), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    [
        Dense(),
        Triangle(),
        VerticalSlash(((100, 300),)),
        FlexPrefill(min_budget=256),
        XAttention(),
        FlashPrefill(),
        BlockTopK(9),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("queries", "length"), [(2048, 5000), (8192, 9000)])
def test_long_chunks_on_sampled_queries(make_structured_qkv, assert_exact, pattern, queries, length):
    q, k, v = make_structured_qkv(length, heads=1, kv_heads=1, dim=16)
    q = q[:, :, -queries:]
    rows = torch.tensor([0, 1, 63, 64, 700, queries // 2, queries - 200, queries - 1])
    out = pattern.attend(q, k, v)
    assert_exact(out[:, :, rows], q[:, :, rows], k, v, pattern.mask(q, k)[:, :, rows])


@pytest.mark.parametrize("fused", [True, False])
def test_dense_by_a_mask_that_kernels_know(make_qkv, assert_exact, monkeypatch, fused):
    """The path that CUDA takes, with heads of a group together and one after the other."""
    q, k, v = make_qkv(500, heads=4, kv_heads=2)
    q = q[:, :, -130:]
    monkeypatch.setattr("tmbench_kernels.sdpa._fuses_groups", lambda q, bias: fused)
    assert_exact(sdpa(q, k, v, 0.3, bias=causal_lower_right(130, 500)), q, k, v, Dense().mask(q, k), 0.3)


@pytest.mark.parametrize("v_dim", [16, 48])
def test_dense_takes_any_strides_and_values_of_another_width(make_qkv, assert_exact, v_dim):
    q, k, v = make_qkv(90, heads=6, kv_heads=2, dim=32, v_dim=v_dim, batch=2)
    q = q[:, :, -50:]
    k[:, :, 3] *= 40  # so that either part can hold all of a query's attention
    for tensors in ((q, k, v), tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))):
        assert_exact(Dense().attend(*tensors), q, k, v, Dense().mask(q, k))


def test_a_backend_without_chunks_says_so(make_qkv):
    q, k, v = make_qkv(64)
    backend = Backend("whole", ("cpu",), lambda *tensors: v)
    assert backend.obstacle(Dense(), q, k, v) == ""
    assert backend.obstacle(Dense(), q[:, :, -10:], k, v) == "takes as many queries as keys, not 10 and 64"
