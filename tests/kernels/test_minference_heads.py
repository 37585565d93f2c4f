"""Heads of different kinds in one layer: each as if it were alone, whatever the others are and however they share keys."""

import random
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import BlockTopK, HeadPattern, MInferenceHeads, VerticalSlash
from tmbench_kernels.cuda import missing_hopper, refuses_hopper
from tmbench_kernels.minference import layer_pattern

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

KINDS = {
    "vertical_and_slash": st.tuples(st.integers(0, 60), st.integers(0, 150)),
    "stream_llm": st.tuples(st.integers(0, 40), st.integers(1, 90)),
    "block_sparse": st.tuples(st.integers(0, 9), st.integers(0, 9)),
}
entries = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: KINDS[kind].map(lambda budget: HeadPattern(kind, *budget, score=0.5))
)


def mask_of_one_head(head, q, k, scale):
    """A head alone, by the published rules; streaming is written out, the other two have tests of their own."""
    if head.type == "stream_llm":
        distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
        return ((distance < head.slash) | (torch.arange(len(k)) < head.vertical)) & (distance >= 0)
    alone = VerticalSlash(((head.vertical, head.slash),)) if head.type == "vertical_and_slash" else BlockTopK(100)
    return alone.mask(q[None, None], k[None, None], scale=scale)[0, 0]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    heads=st.lists(entries, min_size=6, max_size=6),
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    length=st.sampled_from([1, 70, 200]),
    batch=st.integers(1, 2),
)
def test_each_head_is_what_it_is_alone(make_qkv, assert_exact, heads, kv_heads, length, batch):
    q, k, v = make_qkv(length, heads=6, kv_heads=kv_heads, dim=16, batch=batch, seed=length)
    pattern = MInferenceHeads(tuple(heads))
    expected = torch.stack(
        [
            torch.stack([mask_of_one_head(head, q[b, n], k[b, n * kv_heads // 6], 0.4) for n, head in enumerate(heads)])
            for b in range(batch)
        ]
    )
    assert torch.equal(pattern.mask(q, k, scale=0.4), expected)
    assert pattern.pairs(q, k, scale=0.4) == int(expected.sum())
    assert_exact(pattern.attend(q, k, v, scale=0.4), q, k, v, expected, 0.4)


@pytest.mark.slow
def test_block_sparse_heads_leave_blocks_out_of_long_prompts_only(make_qkv, assert_exact):
    heads = (HeadPattern("block_sparse"), HeadPattern("stream_llm", 8, 64))
    q, k, v = make_qkv(101 * 64 + 5, heads=2, kv_heads=2, dim=8)
    pattern = MInferenceHeads(heads)
    seen = pattern.mask(q, k)[0, 0].sum(1)
    assert seen[6399] == 6400, "100 blocks are all that there are"
    assert seen[6463] == 6400, "and of 101 one is left out"
    rows = slice(6380, None)
    assert_exact(pattern.attend(q, k, v)[:, :, rows], q[:, :, rows], k, v, pattern.mask(q, k)[:, :, rows])


def test_a_cpu_runs_kind_by_kind(make_qkv):
    q, k, v = make_qkv(50)
    heads = (HeadPattern(), HeadPattern("stream_llm", 8, 64), HeadPattern("block_sparse"), HeadPattern())
    assert MInferenceHeads(heads).backend(q, k, v).name == "torch-by-kind"
    meta = (x.to("meta") for x in (q, k, v))
    with pytest.raises(ValueError, match="no backend of the pattern .* serves these tensors"):
        MInferenceHeads(heads).backend(*meta)


@pytest.fixture(
    params=["vertical_slash.triton_backend", pytest.param("vertical_slash.hopper_backend", marks=pytest.mark.gpu)]
)
def check_one_launch(request, make_structured_qkv, measure_errors):
    """``check(heads, length, ...)`` attends by a vertical-slash kernel over the index of all heads."""
    attend_index = import_module(f"tmbench_kernels.{request.param}").attend_index
    torch.use_deterministic_algorithms(not GPU)

    def check(heads, length, rows=slice(None), **shape):
        shape = {"heads": len(heads), "kv_heads": 2, "dim": 32, "dtype": torch.float16} | shape
        q, k, v = (x.to(DEVICE) for x in make_structured_qkv(length, **shape))
        if request.param == "vertical_slash.hopper_backend" and (
            reason := missing_hopper() or refuses_hopper(None, q, k, v)
        ):
            pytest.skip(reason)
        pattern, scale = MInferenceHeads(tuple(heads)), q.shape[3] ** -0.5
        out = attend_index(q, k, v, pattern.index(q, k, scale), scale)
        mask = pattern.mask(q, k)
        _, error, plain_error = measure_errors(out[:, :, rows], q[:, :, rows], k, v, mask[:, :, rows], None)
        assert error <= 2 * plain_error
        return mask

    yield check
    torch.use_deterministic_algorithms(True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30 if GPU else 6))
def test_one_launch_serves_all_kinds(check_one_launch, seed):
    draw = random.Random(seed)
    length = draw.choice([1, 64, 65, draw.randint(2, 2500 if GPU else 500)])
    heads = [
        draw.choice(
            [
                HeadPattern("vertical_and_slash", draw.randint(0, 60), draw.randint(0, 150)),
                HeadPattern("stream_llm", draw.choice([0, 1, 70, 3000]), draw.choice([0, 1, 63, 64, 200, 3000])),
                HeadPattern("block_sparse"),
            ][: draw.randint(1, 3)]
        )
        for _ in range(8)
    ]
    check_one_launch(heads, length, batch=draw.choice([1, 2]), kv_heads=draw.choice([1, 2, 8]), seed=seed)


@pytest.mark.gpu
def test_one_launch_leaves_blocks_out_of_long_prompts(check_one_launch):
    heads = [HeadPattern("block_sparse"), HeadPattern("stream_llm", 8, 64), HeadPattern("block_sparse"), HeadPattern()]
    mask = check_one_launch(heads, 8000, rows=slice(7000, None, 7))
    assert not mask[0, 0, 7999].all()


@pytest.mark.gpu
def test_the_last_row_is_that_of_one_launch_and_waits_for_nothing(make_structured_qkv):
    pattern = MInferenceHeads((HeadPattern("block_sparse"), HeadPattern("stream_llm", 8, 64), HeadPattern(), HeadPattern()))
    q, k, v = (x.cuda() for x in make_structured_qkv(3001, heads=4, kv_heads=2, dim=64, dtype=torch.bfloat16))
    torch.use_deterministic_algorithms(False)  # running sums have no other implementation there
    whole = pattern.attend(q, k, v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        row = pattern.last_row(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(True)
    torch.testing.assert_close(row, whole[:, :, -1:])


def test_heads_of_one_kind_need_no_division():
    heads = [HeadPattern("vertical_and_slash", 30, 100), HeadPattern("vertical_and_slash", 40, 200)]
    assert layer_pattern(heads) == VerticalSlash(((30, 100), (40, 200)))
    heads[1] = HeadPattern("stream_llm", 40, 200)
    assert layer_pattern(heads) == MInferenceHeads(tuple(heads))


def test_heads_that_do_not_fit_are_refused(make_qkv):
    with pytest.raises(ValueError, match="at least one head"):
        MInferenceHeads(())
    with pytest.raises(ValueError, match="the pattern is for 3 heads, but q has 4"):
        MInferenceHeads((HeadPattern("stream_llm", 1, 1),) * 3).attend(*make_qkv(10))


def test_a_part_of_the_heads_computes_what_they_do_among_all():
    pattern = MInferenceHeads(tuple(HeadPattern("stream_llm", 4 + head, 30 + head) for head in range(4)))
    slashes = VerticalSlash(tuple((40 + head, 60 + head) for head in range(4)))
    q, k, v = (torch.randn(1, heads, 200, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    for whole in (pattern, slashes):
        part = whole.of_heads(range(2, 4)).attend(q[:, 2:], k[:, 1:], v[:, 1:])
        torch.testing.assert_close(part, whole.attend(q, k, v)[:, 2:])
    assert VerticalSlash().of_heads(range(2, 4)) == VerticalSlash()
