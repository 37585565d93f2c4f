"""The fused scores against those that torch works out: interpreted without a GPU, as compiled on one."""

from __future__ import annotations

import pytest
import torch

from tmbench_kernels.block_lists import block_count
from tmbench_kernels.block_scores import block_means
from tmbench_kernels.flash_prefill import _weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("length", [1, 127, 128, 129, 700])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (6, 2, 40)])
def test_weights_of_mean_keys(make_qkv, length, heads, kv_heads, dim):
    from tmbench_kernels.triton_scores import mean_weights

    q, k, _ = (x.to(DEVICE) for x in make_qkv(length, heads=heads, kv_heads=kv_heads, dim=dim, batch=2, dtype=torch.float16))
    blocks = block_count(length)
    means = block_means(k, 128).half()
    expected = _weights(q, means, range(blocks), 0.3)
    got = mean_weights(q, means, 0.3)
    assert got.shape == expected.shape == (2, heads, blocks, blocks)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_more_blocks_than_a_tile(make_qkv):
    from tmbench_kernels.triton_scores import mean_weights

    q, k, _ = (x.to(DEVICE) for x in make_qkv(66 * 128 - 5, heads=1, kv_heads=1, dim=16, dtype=torch.float16))
    means = block_means(k, 128).half()
    torch.testing.assert_close(mean_weights(q, means, 1.0), _weights(q, means, range(66), 1.0), rtol=1e-4, atol=1e-3)
