"""The last query alone, against masked softmax: exact, and blind to the queries before it where the pattern is static."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import (
    PBS,
    BlockTopK,
    Dense,
    FlashPrefill,
    FlexPrefill,
    HeadPattern,
    MInferenceHeads,
    OracleBlocks,
    Triangle,
    VerticalSlash,
    XAttention,
)
from tmbench_kernels.pattern import Pattern
from tmbench_kernels.sdpa import without_plans

GPU = torch.cuda.is_available()
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


DYNAMIC = [
    VerticalSlash(((100, 200), (40, 60), (60, 300), (30, 900))),
    MInferenceHeads(
        tuple(HeadPattern(kind, 70, 150) for kind in ("block_sparse", "vertical_and_slash", "stream_llm") * 2)[:4]
    ),
    FlexPrefill(gamma=0.6, tau=0.5, min_budget=256),
    XAttention(threshold=0.5),
    FlashPrefill(0.9, 1, 1, 0),
    BlockTopK(5),
    PBS(score=0.5),
    OracleBlocks(p=0.6),
]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", DYNAMIC, ids=repr)
@pytest.mark.parametrize(("queries", "length"), [(1100, 1100), (1152, 1152), (300, 1030), (50, 1100), (1, 1025)])
def test_a_dynamic_pattern_attends_for_few_queries(make_structured_qkv, assert_exact, monkeypatch, pattern, queries, length):
    """Of a chunk too. Whatever it selects by, no torch backend is given more queries than the last two blocks hold."""
    given = []
    for module in ("vertical_slash.torch_backend", "block_sparse.torch_backend", "triangle.torch_backend"):
        name = f"tmbench_kernels.{module}.attention"
        attention = importlib.import_module(f"tmbench_kernels.{module}").attention

        def attend(q, *rest, attention=attention, **asked):
            given.append(q.shape[0] * q.shape[2])
            return attention(q, *rest, **asked)

        monkeypatch.setattr(name, attend)
    q, k, v = make_structured_qkv(length)
    check(pattern, q[:, :, length - queries :], k, v, assert_exact)
    assert sum(given) <= 4 * 256


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(("device", "queries", "planned"), [("cuda", 1, False), ("cuda", 2, True), ("cpu", 1, True)])
def test_cudnn_is_switched_off_for_one_query_on_a_gpu_and_put_back(enabled, device, queries, planned):
    now = torch.backends.cuda.cudnn_sdp_enabled
    before = now()
    try:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        q: Any = SimpleNamespace(device=torch.device(device), shape=torch.Size((1, 4, queries, 64)))
        with without_plans(q):
            assert now() == (enabled and planned)
        assert now() == enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("pattern", [Dense(), Triangle(4, 64), Triangle(4, 64, 0)], ids=str)
def test_on_a_gpu_it_takes_no_plan(make_qkv, pattern):
    q, k, v = (x.to("cuda") for x in make_qkv(300, heads=9, kv_heads=3, dtype=torch.bfloat16))
    torch.use_deterministic_algorithms(False)
    try:
        with torch.profiler.profile() as seen:
            pattern.last_row(q, k, v)
    finally:
        torch.use_deterministic_algorithms(True)
    ran = {event.key for event in seen.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention" in ran
    assert not any("cudnn" in name for name in ran)
