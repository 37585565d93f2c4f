"""The last query alone, against masked softmax: exact, and blind to the queries before it where the pattern is static."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import Dense, FlashPrefill, HeadPattern, MInferenceHeads, Triangle, VerticalSlash, XAttention
from tmbench_kernels.pattern import Pattern

counts = st.one_of(st.integers(0, 12), st.integers(13, 300))


def check(pattern: Pattern, q, k, v, assert_exact, scale=None):
    mask = pattern.mask(q, k, scale=scale)[:, :, -1:]
    if not pattern.dynamic:
        q = torch.cat([torch.full_like(q[:, :, :-1], torch.nan), q[:, :, -1:]], dim=2)
    row = pattern.last_row(q, k, v, scale=scale)
    assert row.shape == (*q.shape[:2], 1, v.shape[3])
    assert_exact(row, q[:, :, -1:], k, v, mask, scale)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 400), n_init=counts, n_local=counts, last_n=st.integers(0, 2))
def test_triangle(make_qkv, assert_exact, length, n_init, n_local, last_n):
    q, k, v = make_qkv(length, heads=4, kv_heads=2, dim=16)
    check(Triangle(n_init, n_local, last_n), q, k, v, assert_exact)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "pattern",
    [
        Dense(),
        Triangle(3, 50, 0),
        Triangle(),
        VerticalSlash(((40, 60),)),
        XAttention(threshold=0.5),
        FlashPrefill(1, 1, 1, 0),
        MInferenceHeads(
            (
                HeadPattern("stream_llm", 3, 50),
                HeadPattern("block_sparse"),
                HeadPattern("vertical_and_slash", 40, 60),
                HeadPattern("stream_llm", 3, 50),
            )
        ),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 63, 131, 700])
def test_types_batches_and_scales(make_qkv, assert_exact, pattern, dtype, length):
    q, k, v = make_qkv(length, dim=32, batch=2, dtype=dtype)
    check(pattern, q, k, v, assert_exact)
    check(pattern, q, k, v, assert_exact, 0.3)


def test_values_of_another_width(make_qkv, assert_exact):
    q, k, v = make_qkv(90)
    for pattern in (Dense(), Triangle(2, 9, 0), Triangle(0, 0, 0)):
        check(pattern, q, k, v[..., :24], assert_exact)


@pytest.mark.parametrize("pattern", [Dense(), Triangle(8, 64, 16), VerticalSlash(((40, 60),)), XAttention()])
def test_outputs_lie_in_memory_as_models_want_them(make_qkv, pattern):
    q, k, v = make_qkv(700, dim=32)
    assert pattern.attend(q, k, v).transpose(1, 2).is_contiguous()
