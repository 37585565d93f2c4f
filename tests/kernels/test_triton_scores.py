"""The fused scores against those that torch works out: interpreted without a GPU, as compiled on one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels.block_sparse.lists import block_count
from tmbench_kernels.flash_prefill import _weights
from tmbench_kernels.scores import _sum_shares, block_means, mean_key_shares
from tmbench_kernels.xattention import _sum_strides

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 127, 128, 129, 700])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (6, 2, 40)])
def test_weights_of_mean_keys(make_qkv, length, heads, kv_heads, dim):
    from tmbench_kernels.flash_prefill.triton_backend import mean_weights

    q, k, _ = (x.to(DEVICE) for x in make_qkv(length, heads=heads, kv_heads=kv_heads, dim=dim, batch=2, dtype=torch.float16))
    blocks = block_count(length)
    means = block_means(k, 128).half()
    expected = _weights(q, means, range(blocks), 0.3)
    got = mean_weights(q, means, 0.3)
    assert got.shape == expected.shape == (2, heads, blocks, blocks)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    for start in {length // 3, length - 1}:
        first = start // 128
        got = mean_weights(q[:, :, start:], means, 0.3, start)
        expected = _weights(q[:, :, start:], means, range(first, blocks), 0.3, start % 128)
        assert got.shape == expected.shape == (2, heads, blocks - first, blocks)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_more_blocks_than_a_tile(make_qkv):
    from tmbench_kernels.flash_prefill.triton_backend import mean_weights

    q, k, _ = (x.to(DEVICE) for x in make_qkv(130 * 128 - 5, heads=1, kv_heads=1, dim=16, dtype=torch.float16))
    means = block_means(k, 128).half()
    torch.testing.assert_close(mean_weights(q, means, 1.0), _weights(q, means, range(130), 1.0), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (128, 128), (128, 4300), (70, 300), (300, 100)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (6, 2, 40)])
def test_shares_of_keys_that_all_queries_see(make_qkv, rows, length, heads, kv_heads, dim):
    from tmbench_kernels.triton_scores import sum_key_shares

    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "batch": 2, "dtype": torch.float16}
    q, k, _ = make_qkv(max(rows, length), **shape)
    q, k = q[:, :, :rows], k[:, :, :length]
    expected = mean_key_shares(q, k, 0.3)
    torch.testing.assert_close(expected.sum(-1), torch.ones(2, heads))
    for scale, keys in ((0.3, k), (-0.3, -k)):
        got = sum_key_shares(q.to(DEVICE), keys.to(DEVICE), scale).cpu() / rows
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def check_sums(q, k, scale):
    from tmbench_kernels.triton_scores import sum_shares

    q, k = q.to(DEVICE), k.to(DEVICE)
    for sums, expected in zip(sum_shares(q, k, scale), _sum_shares(q, k, scale), strict=True):
        assert sums.shape == (*q.shape[:2], k.shape[2])
        torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 400),
    st.sampled_from([1, 40, 64, 65, 100, 128, 130]),
    st.sampled_from([(1, 2, 2, 16), (2, 6, 2, 40)]),
    st.sampled_from([-0.7, 0.0, 0.1, 3.0]),
    st.integers(0, 99),
)
def test_sums_of_the_last_queries_shares(length, last, sizes, scale, seed):
    batch, heads, kv_heads, dim = sizes
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, generator=random).half()[:, :, -last:]
    k = torch.randn(batch, length, kv_heads, dim, generator=random).half().transpose(1, 2)
    check_sums(q, k, scale)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 2049, 4096 + 70])
@pytest.mark.parametrize("rows", [3, 128])
def test_the_last_queries_see_more_keys_than_a_program(make_qkv, length, rows):
    q, k, _ = make_qkv(length, heads=2, kv_heads=1, dim=16, dtype=torch.float16)
    k[:, :, 1500] *= 8
    check_sums(q[:, :, -rows:], k, 0.5)


@pytest.mark.slow
def test_more_programs_than_are_merged_at_a_time(make_qkv, monkeypatch):
    from tmbench_kernels import triton_scores

    monkeypatch.setattr(triton_scores, "KEYS", 64)
    q, k, _ = make_qkv(64 * 66 + 5, heads=1, kv_heads=1, dim=16, dtype=torch.float16)
    check_sums(q[:, :, -70:], k, 0.5)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([1, 2, 8, 16, 128]),
    st.integers(1, 12),
    st.integers(0, 11),
    st.integers(0, 127),
    st.integers(0, 127),
    st.sampled_from([-0.7, 0.1, 2.0]),
    st.integers(0, 99),
)
def test_sums_of_strides(cells, blocks, start, missing, before, scale, seed):
    """The query blocks from any one on, of a prompt whose last block, and a chunk whose first block, may lack strides."""
    from tmbench_kernels.xattention.triton_backend import sum_strides

    start, strides = start % blocks, blocks * cells - missing % cells
    shape = (2, 2, (blocks - start) * cells, blocks * cells)
    logits = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    skipped = start * cells + before % cells
    got = sum_strides(logits, start, cells, strides, scale, skipped)
    expected = _sum_strides(logits.clone(), start, cells, strides, scale, skipped)
    assert (got.sum((2, 3)) - max(strides - skipped, 0)).abs().max() < 1e-2, "every stride that counts gives 1"
    assert got.shape == expected.shape == (2, 2, blocks - start, blocks)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_strides_that_tie_hold_the_same():
    """So that ties between blocks stay ties, over more strides than a tile has."""
    from tmbench_kernels.xattention.triton_backend import sum_strides

    mass = sum_strides(torch.zeros(1, 1, 8, 131 * 8, device=DEVICE), 130, 8, 131 * 8, 1.0)
    torch.testing.assert_close(mass.sum(), mass.new_tensor(8.0))
    assert (mass[..., :-1] == mass[..., :1]).all()
