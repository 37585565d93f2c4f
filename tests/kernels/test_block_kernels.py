"""The kernels over block lists: Triton's in its interpreter where there is no GPU, and every one where there is one."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch

from tmbench_kernels import BlockLists, BlockTopK, FlashPrefill, XAttention
from tmbench_kernels.cuda import missing_hopper
from tmbench_kernels.dense.libraries import FLASH_4, missing_module

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ON_HOPPER: dict[str, Callable[[], str]] = {
    "block_sparse.flash_attn_backend": partial(missing_module, *FLASH_4),
    "block_sparse.hopper_backend": missing_hopper,
}


@pytest.fixture(params=["block_sparse.triton_backend", *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_HOPPER)])
def attend_lists(request):
    if request.param in ON_HOPPER and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("takes these lists on Hopper only")
    if request.param in ON_HOPPER and (reason := ON_HOPPER[request.param]()):
        pytest.skip(reason)
    return importlib.import_module(f"tmbench_kernels.{request.param}").attend_lists


@pytest.fixture
def check(attend_lists, make_qkv, assert_as_torch):
    """``check(block_map, length, block=...)`` attends over the lists of a map and compares with float64."""

    def check(block_map, length, *, block=128, scale=None, change=lambda q, k, v: (q, k, v), **shape):
        q, k, v = change(*(x.to(DEVICE) for x in make_qkv(length, **{"dtype": torch.float16} | shape)))
        lists = BlockLists.from_map(block_map.to(DEVICE).expand(q.shape[0], q.shape[1], -1, -1), length, block)
        out = attend_lists(q, k, v, lists, q.shape[-1] ** -0.5 if scale is None else scale)
        assert_as_torch(out, q, k, v, lists.mask(), scale)
        return out

    return check


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40 if GPU else 8))
def test_any_lists(check, seed):
    """Lists of any budget, empty ones and such without the own block among them, for any shape."""
    draw, random_map = random.Random(seed), torch.Generator().manual_seed(seed)
    block = draw.choice([64, 128])
    length = draw.choice([1, 63, 64, 65, 127, 128, 129, draw.randint(1, 2500 if GPU else 400)])
    groups, kv_heads, batch = draw.choice([1, 2, 3, 5]), draw.choice([1, 2]), draw.choice([1, 2])
    blocks = -(-length // block)
    block_map = torch.rand(batch, groups * kv_heads, blocks, blocks, generator=random_map) < draw.choice([0.1, 0.5, 0.9])
    dim = draw.choice([16, 40, 64, 96, 128])
    check(block_map, length, block=block, heads=groups * kv_heads, kv_heads=kv_heads, batch=batch, dim=dim, seed=seed)


def test_a_head_with_an_empty_list_gets_zeros(check):
    block_map = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    block_map[0, 1] = True
    out = check(block_map, 200, heads=2, kv_heads=1)
    assert not out[0, 0].any()
    assert out[0, 1].any()


WIDE = ["block_sparse.triton_backend", pytest.param("block_sparse.hopper_backend", marks=pytest.mark.gpu)]


@pytest.mark.slow
@pytest.mark.parametrize("attend_lists", WIDE, indirect=True)
@pytest.mark.parametrize(("dim", "v_dim"), [(192, 192), (256, 256), (192, 128), (64, 256)])
def test_wide_heads(check, dim, v_dim):
    check(torch.ones(1, 1, 2, 2, dtype=torch.bool), 150, heads=2, kv_heads=1, dim=dim, v_dim=v_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("attend_lists", WIDE, indirect=True)
@pytest.mark.parametrize(("dim", "v_dim"), [(192, 128), (256, 256), (136, 200)])
@pytest.mark.parametrize("seed", range(8))
def test_any_lists_of_wide_heads(check, dim, v_dim, seed):
    """Where a program has few stages, which it fills and empties in turn."""
    draw, random_map = random.Random(seed), torch.Generator().manual_seed(seed)
    length, block = draw.randint(1, 3000), draw.choice([64, 128])
    blocks = -(-length // block)
    block_map = torch.rand(2, 6, blocks, blocks, generator=random_map) < draw.choice([0.1, 0.5, 0.9])
    check(block_map, length, block=block, heads=6, kv_heads=2, batch=2, dim=dim, v_dim=v_dim, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(check, scale):
    check(torch.ones(1, 1, 2, 2, dtype=torch.bool), 150, scale=scale)


@pytest.mark.slow
def test_strides(check):
    def columns_first(*tensors):
        return tuple(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors)

    check(torch.ones(1, 1, 2, 2, dtype=torch.bool), 150, change=columns_first)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [XAttention(threshold=0.5), FlashPrefill(alpha=0.5), BlockTopK(2)], ids=repr)
def test_what_patterns_select(attend_lists, make_structured_qkv, measure_errors, pattern):
    q, k, v = (x.to(DEVICE) for x in make_structured_qkv(500, heads=2, kv_heads=1, dtype=torch.float16))
    lists = pattern.select(q, k)
    out = attend_lists(q, k, v, lists, q.shape[-1] ** -0.5)
    _, error, plain_error = measure_errors(out, q, k, v, lists.mask(), None)
    assert error <= 2 * plain_error


@pytest.mark.gpu
def test_nothing_is_compiled_again_for_another_prompt_or_other_lists(attend_lists, make_qkv, monkeypatch):
    from tmbench_kernels import hopper
    from tmbench_kernels.block_sparse import triton_backend

    def run(length, share):
        q, k, v = (x.cuda() for x in make_qkv(length, heads=4, kv_heads=2, dim=64, dtype=torch.float16))
        blocks = -(-length // 128)
        chosen = torch.rand(1, 4, blocks, blocks, device="cuda") < share
        return attend_lists(q, k, v, BlockLists.from_map(chosen, length, 128), 0.125)

    def compiled():
        return sum(
            len(cache[0]) for cache in triton_backend._walk.device_caches.values()
        ), hopper.load_kernel.cache_info().misses

    def refuse(*given, **options):
        raise AssertionError("compiled again")

    run(5000, 0.3)
    before = compiled()
    if "flash_attn" in attend_lists.__module__:
        monkeypatch.setattr("cutlass.cute.compile", refuse)
    for length, share in ((5001, 0.3), (8192, 0.05), (16384, 1.0)):
        run(length, share)
    assert compiled() == before
