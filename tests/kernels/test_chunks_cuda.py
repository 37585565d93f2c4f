"""The kernels for CUDA over chunks: Triton's interpreted without a GPU, all that take chunks as compiled on one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tmbench_kernels import (
    BlockTopK,
    Dense,
    FlashPrefill,
    FlexPrefill,
    HeadPattern,
    MInferenceHeads,
    Triangle,
    VerticalSlash,
    XAttention,
)
from tmbench_kernels.pattern import new_lse
from tmbench_kernels.reference import masked_lse

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HEADS = (HeadPattern("stream_llm", 3, 50), HeadPattern("block_sparse"), HeadPattern("vertical_and_slash", 40, 60))
PATTERNS = [
    Dense(),
    Triangle(3, 50, 0),
    Triangle(8, 100, 70),
    Triangle(20, 30, 5000),
    Triangle(0, 0, 30),
    VerticalSlash(((40, 60), (60, 100), (30, 50), (500, 20))),
    MInferenceHeads((*HEADS, HEADS[0])),
    FlexPrefill(gamma=0.6, min_budget=128),
    XAttention(stride=16, threshold=0.6),
    FlashPrefill(alpha=0.6, sinks=1, window=1, last=1),
    BlockTopK(3),
]


OVER_LISTS = {True: "flash-attn-4", False: None}
"""A library's kernel that takes whole prompts alone, by whether the pattern is dynamic."""


pytestmark = pytest.mark.usefixtures("running_sums_on_a_gpu")


@pytest.fixture
def check(assert_as_torch):
    """``check(pattern, q, k, v)`` attends by every kernel that serves, and checks outputs and log-sum-exps."""

    def serves(backend, pattern, *tensors):
        if not GPU:
            return backend.name == "triton"
        return not backend.obstacle(pattern, *tensors)

    def check(pattern, *tensors):
        q, k, v = (x.to(DEVICE) for x in tensors)
        scale, mask = q.shape[-1] ** -0.5, pattern.mask(q, k)
        kernels = [backend for backend in pattern.backends if serves(backend, pattern, q, k, v)]
        assert "triton" in [backend.name for backend in kernels]
        for backend in kernels:
            lse = new_lse(q) if backend.lse else None
            out = backend.attend(pattern, q, k, v, scale, **({} if lse is None else {"lse": lse}))
            assert_as_torch(out, q, k, v, mask, note=backend.name)
            if lse is not None:
                torch.testing.assert_close(lse.double(), masked_lse(q, k, mask), rtol=1e-3, atol=1e-3)

    return check


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize(("queries", "length"), [(1, 300), (64, 320), (100, 300), (130, 131)])
def test_any_chunk(check, make_structured_qkv, monkeypatch, pattern, queries, length):
    """The last rows' keys are split, as those of long prompts are."""
    from tmbench_kernels.triangle import splits

    monkeypatch.setattr(splits, "ONE_LAUNCH", 0)
    splits.schedule_for.cache_clear()
    q, k, v = make_structured_qkv(length, batch=2, dtype=torch.float16)
    check(pattern, q[:, :, -queries:], k, v)
    splits.schedule_for.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("queries", [1, 64, 100, 2048, 8192])
def test_chunks_as_engines_feed_them(check, make_structured_qkv, pattern, queries):
    q, k, v = make_structured_qkv(9001, heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16)
    check(pattern, q[:, :, -queries:], k, v)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_kernels_of_libraries_that_take_whole_prompts_alone_are_passed_over(make_qkv, pattern):
    """FlashAttention 4's over lists, too, whose mask compares positions within the tensors."""
    x = torch.zeros(1, 4, 64, 16, device="meta")
    for backend in pattern.backends:
        assert backend.chunks == (backend.name != "cudnn" and backend.name != OVER_LISTS[pattern.dynamic])
        on_meta = replace(backend, devices=("meta",))
        if not backend.chunks:
            assert on_meta.obstacle(pattern, x[:, :, :9], x, x) == "takes as many queries as keys, not 9 and 64"


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 1, 64, 100, 299])
def test_pairs_of_an_index(start):
    from tmbench_kernels.vertical_slash import Selection, selection_mask
    from tmbench_kernels.vertical_slash.triton_index import build_index, count_pairs

    chance = torch.Generator().manual_seed(start)
    columns, distances = ((torch.rand(2, 3, 300, generator=chance) < 0.05).to(DEVICE) for _ in range(2))
    distances[..., 0] = True
    index = build_index(columns, distances, int(columns.sum(2).max()), int(distances.sum(2).max()), start)
    assert count_pairs(index, 300, start) == int(selection_mask(Selection(columns.cpu(), distances.cpu()), start).sum())
