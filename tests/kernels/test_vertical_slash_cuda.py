"""The kernels for CUDA over a vertical-slash selection: Triton's interpreted without a GPU, all as compiled on one."""

from __future__ import annotations

import random
from importlib import import_module

import pytest
import torch

from tmbench_kernels import VerticalSlash
from tmbench_kernels.cuda import missing_hopper, refuses_hopper
from tmbench_kernels.vertical_slash import Selection, selection_mask

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


pytestmark = pytest.mark.usefixtures("running_sums_on_a_gpu")


@pytest.fixture(
    params=["vertical_slash.triton_backend", pytest.param("vertical_slash.hopper_backend", marks=pytest.mark.gpu)]
)
def attend_index(request):
    if request.param == "vertical_slash.hopper_backend" and (reason := missing_hopper()):
        pytest.skip(reason)
    return import_module(f"tmbench_kernels.{request.param}").attend_index


@pytest.fixture
def check(attend_index, make_qkv, assert_as_torch):
    """``check(columns, distances, ...)`` attends over two sets ``[batch, heads, length]`` and compares with float64."""
    from tmbench_kernels.vertical_slash.triton_index import build_index

    on_hopper = "hopper" in attend_index.__module__

    def check(columns, distances, *, scale=None, most=None, change=lambda q, k, v: (q, k, v), **shape):
        batch, heads, length = columns.shape
        shape = {"dtype": torch.float16, "batch": batch, "heads": heads, "kv_heads": 1} | shape
        q, k, v = change(*(x.to(DEVICE) for x in make_qkv(length, **shape)))
        if on_hopper and (reason := refuses_hopper(None, q, k, v)):
            pytest.skip(reason)
        if on_hopper and not distances[..., 0].all():
            pytest.skip("takes selections with distance 0")
        columns, distances = columns.to(DEVICE), distances.to(DEVICE)
        bounds = most or (int(columns.sum(2).max()), int(distances.sum(2).max()))
        index = build_index(columns, distances, *bounds)
        out = attend_index(q, k, v, index, q.shape[-1] ** -0.5 if scale is None else scale)
        mask = selection_mask(Selection(columns.cpu(), distances.cpu())).to(DEVICE)
        assert_as_torch(out, q, k, v, mask, scale)
        return out, mask

    return check


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40 if GPU else 8))
def test_any_selection(check, seed):
    """Few and many columns and distances, runs that join and runs that do not, and heads that differ."""
    draw, chance = random.Random(seed), torch.Generator().manual_seed(seed)
    length = draw.choice([1, 63, 64, 65, 129, draw.randint(1, 3000 if GPU else 700)])
    groups, kv_heads, batch = draw.choice([1, 2, 3]), draw.choice([1, 2]), draw.choice([1, 2])
    shape = (batch, groups * kv_heads, length)
    share = torch.tensor([draw.choice([0.0, 0.002, 0.01, 0.1]) for _ in range(shape[1])])[:, None]
    columns = torch.rand(shape, generator=chance) < share
    distances = torch.rand(shape, generator=chance) < share.flip(0)
    distances[..., 0] |= draw.random() < 0.8
    check(columns, distances, kv_heads=kv_heads, dim=draw.choice([16, 40, 64, 128]), seed=seed)


@pytest.mark.slow
def test_columns_between_runs_and_beyond(check):
    columns, distances = (torch.zeros(1, 1, 700, dtype=torch.bool) for _ in range(2))
    columns[..., [0, 100, 101, 299, 300, 301, 555, 699]] = True
    distances[..., [0, 200, 263, 264, 265, 500]] = True
    _, mask = check(columns, distances)
    assert 0.2 < mask.float().mean() < 0.4


@pytest.mark.slow
def test_more_columns_than_a_tile_between_two_runs(check):
    columns, distances = (torch.zeros(1, 1, 700, dtype=torch.bool) for _ in range(2))
    columns[..., 5:400] = True
    distances[..., 0] = True
    check(columns, distances)


def test_a_query_without_a_key_gets_zeros(check):
    columns, distances = (torch.zeros(1, 2, 150, dtype=torch.bool) for _ in range(2))
    columns[:, 1, 3] = True
    out, _ = check(columns, distances, kv_heads=2)
    assert not out[0, 0].any()
    assert not out[0, 1, :3].any()
    assert out[0, 1, 3:].any()


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "scale"), [(192, None), (256, None), (64, 0.0), (64, -0.3)])
def test_widths_and_scales(check, dim, scale):
    columns, distances = (torch.zeros(1, 2, 200, dtype=torch.bool) for _ in range(2))
    columns[..., ::13] = True
    distances[..., [0, 90]] = True
    check(columns, distances, dim=dim, scale=scale)


@pytest.mark.slow
def test_strides(check):
    columns, distances = (torch.zeros(1, 2, 200, dtype=torch.bool) for _ in range(2))
    columns[..., ::13] = True
    distances[..., [0, 90]] = True
    check(
        columns,
        distances,
        change=lambda *tensors: tuple(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors),
    )


@pytest.mark.slow
def test_what_the_pattern_selects(attend_index, make_structured_qkv, measure_errors):
    """By way of the pattern, whose budgets bound the index."""
    pattern = VerticalSlash(((30, 50), (200, 120)))
    q, k, v = (x.to(DEVICE) for x in make_structured_qkv(600, heads=2, kv_heads=1, dtype=torch.float16))
    chosen = pattern.select(q, k)
    columns, distances = pattern.counts(2, 600)
    assert (chosen.columns.sum(2).tolist(), chosen.distances.sum(2).tolist()) == ([list(columns)], [list(distances)])
    scale = q.shape[-1] ** -0.5
    out = attend_index(q, k, v, pattern.index(q, k, scale), scale)
    _, error, plain_error = measure_errors(out, q, k, v, selection_mask(chosen), None)
    assert error <= 2 * plain_error


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_pairs_of_an_index(seed):
    from tmbench_kernels.vertical_slash.triton_index import build_index, count_pairs

    draw, chance = random.Random(seed), torch.Generator().manual_seed(seed)
    length = draw.choice([1, 63, 64, 65, draw.randint(1, 700)])
    columns, distances = (
        (torch.rand(2, 3, length, generator=chance) < draw.choice([0.0, 0.01, 0.2])).to(DEVICE) for _ in range(2)
    )
    distances[..., 0] = True
    index = build_index(columns, distances, int(columns.sum(2).max()), int(distances.sum(2).max()))
    mask = selection_mask(Selection(columns.cpu(), distances.cpu()))
    assert count_pairs(index, length) == int(mask.sum())


@pytest.mark.gpu
def test_many_blocks_for_every_program(check):
    """Programs that stay on the GPU go from block to block, and what they count by runs around several times."""
    chance = torch.Generator().manual_seed(0)
    shares = torch.linspace(0, 0.1, 64)[:, None]
    columns, distances = (torch.rand(4, 64, 1100, generator=chance) < share for share in (shares, shares.flip(0)))
    distances[..., 0] = True
    check(columns, distances, kv_heads=16, dim=64)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", VerticalSlash.backends[:2], ids=lambda backend: backend.name)
def test_nothing_waits_for_the_gpu(make_structured_qkv, backend):
    pattern = VerticalSlash(((100, 800),))
    q, k, v = (x.cuda() for x in make_structured_qkv(3001, heads=8, kv_heads=2, dtype=torch.bfloat16))
    if reason := backend.obstacle(pattern, q, k, v):
        pytest.skip(reason)
    backend.attend(pattern, q, k, v, 0.125)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = backend.attend(pattern, q, k, v, 0.125)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()
