"""Lists made by one kernel against those that torch makes: interpreted without a GPU, as compiled on one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import BlockLists
from tmbench_kernels.block_sparse.lists import _list_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(block_map):
    from tmbench_kernels.block_sparse.triton_lists import list_blocks

    counts, indices = list_blocks(block_map.to(DEVICE))
    expected_counts, expected_indices = _list_blocks(block_map)
    assert (counts.dtype, indices.dtype) == (torch.int32, torch.int32)
    assert counts.is_contiguous()
    assert indices.is_contiguous()
    assert torch.equal(counts.cpu(), expected_counts)
    assert torch.equal(indices.cpu(), expected_indices)


def random_map(batch, heads, blocks, density, seed):
    return torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 24), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_any_map(batch, heads, blocks, density, seed):
    block_map = random_map(batch, heads, blocks, density, seed)
    check(block_map)
    check(block_map[:, :, seed % blocks :])


@pytest.mark.slow
def test_rows_that_are_full_and_rows_that_are_empty():
    block_map = random_map(1, 2, 33, 0.5, 1)
    block_map[0, 0, ::2] = True
    block_map[0, 1, ::3] = False
    check(block_map)


@pytest.mark.slow
def test_maps_that_are_views():
    """One map for all heads, as dense prompts have it, and one whose columns are not neighbours in memory."""
    block_map = random_map(1, 1, 20, 0.5, 2)
    check(block_map.expand(2, 3, 20, 20))
    check(block_map.transpose(2, 3))
    check(torch.stack([block_map, ~block_map], dim=-1)[..., 0])


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 50])
def test_a_count_is_carried_from_tile_to_tile(blocks):
    """With tiles that are small, so that the interpreter has few rows to walk through."""
    from tmbench_kernels.block_sparse.triton_lists import _list

    block_map = random_map(1, 2, blocks, 0.4, blocks)
    counts = torch.empty(1, 2, blocks, dtype=torch.int32, device=DEVICE)
    indices = torch.empty(1, 2, blocks, blocks, dtype=torch.int32, device=DEVICE)
    _list[(2 * blocks,)](block_map.to(DEVICE).view(torch.uint8), counts, indices, blocks, blocks, TILE=16)
    for got, expected in zip((counts, indices), _list_blocks(block_map), strict=True):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.slow
def test_one_block_more_than_a_tile():
    check(random_map(1, 1, 1025, 0.3, 3))


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_compiled_again_and_nothing_waits():
    from tmbench_kernels.block_sparse.triton_lists import _list

    maps = [random_map(1, 1, blocks, 0.3, blocks) for blocks in (1, 2, 16, 100, 1024, 1025, 3000, 8192)]
    on_gpu = [block_map.cuda() for block_map in maps]
    BlockLists.from_map(on_gpu[0], 128)
    variants = len(_list.device_caches[torch.cuda.current_device()][0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [BlockLists.from_map(block_map, 128 * block_map.shape[3]) for block_map in on_gpu]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(_list.device_caches[torch.cuda.current_device()][0]) == variants
    for block_map, lists in zip(maps, made, strict=True):
        for got, expected in zip((lists.counts, lists.indices), _list_blocks(block_map), strict=True):
            assert torch.equal(got.cpu(), expected)
