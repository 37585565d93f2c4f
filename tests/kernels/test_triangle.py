from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import Dense, Triangle
from tmbench_kernels.reference import masked_attention

counts = st.one_of(st.integers(0, 12), st.integers(13, 400))


@given(st.integers(1, 40), st.integers(0, 45), st.integers(0, 45), st.integers(0, 45))
def test_mask_and_pairs_against_loops(length, n_init, n_local, last_n):
    pattern = Triangle(n_init, n_local, last_n)
    q = torch.zeros(2, 3, length, 4)
    expected = [
        [j <= i and (j < n_init or i - j < n_local or i >= length - last_n) for j in range(length)] for i in range(length)
    ]
    assert pattern.mask(q, q)[0, 0].tolist() == expected
    assert pattern.pairs(q, q) == 6 * sum(map(sum, expected))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 900), n_init=counts, n_local=counts, last_n=counts, seed=st.integers(0, 2**16))
def test_any_sizes_against_masked_softmax(make_qkv, assert_exact, length, n_init, n_local, last_n, seed):
    q, k, v = make_qkv(length, heads=2, kv_heads=1, dim=16, seed=seed)
    pattern = Triangle(n_init, n_local, last_n)
    assert_exact(pattern.attend(q, k, v), q, k, v, pattern.mask(q, k))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "batch"), [(4, 4, 64, 1), (4, 2, 96, 2), (6, 1, 128, 1)])
@pytest.mark.parametrize("length", [1, 129, 645])
def test_shapes_and_types(make_qkv, assert_exact, dtype, heads, kv_heads, dim, batch, length):
    q, k, v = make_qkv(length, heads=heads, kv_heads=kv_heads, dim=dim, batch=batch, dtype=dtype)
    pattern = Triangle(8, 100, 33)
    assert_exact(pattern.attend(q, k, v), q, k, v, pattern.mask(q, k))
    assert_exact(pattern.attend(q, k, v, scale=0.3), q, k, v, pattern.mask(q, k), 0.3)


@pytest.mark.slow
def test_the_wide_windows_of_streaming(make_qkv, assert_exact):
    q, k, v = make_qkv(4100, heads=1, kv_heads=1, dim=16)
    pattern = Triangle(16, 3072, 0)
    assert_exact(pattern.attend(q, k, v), q, k, v, pattern.mask(q, k))


def test_one_softmax_over_sinks_and_window(make_qkv, assert_exact):
    """Logits far apart: a sink that outweighs the window by e^60, and a window that outweighs the sinks."""
    q, k, v = make_qkv(700, dim=64)
    q[..., 0], k[:, :, 3, 0], k[:, 1, :, 1] = 30.0, 16.0, 0.0
    pattern = Triangle(8, 64, 16)
    out = pattern.attend(q, k, v)
    assert_exact(out, q, k, v, pattern.mask(q, k))
    torch.testing.assert_close(out[:, :, 300], v[:, :, 3].repeat_interleave(2, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sizes", [(300, 0, 0), (0, 300, 0), (0, 0, 300), (1000, 1000, 1000)])
def test_a_part_as_long_as_the_prompt_is_dense(make_qkv, sizes):
    q, k, v = make_qkv(300)
    torch.testing.assert_close(Triangle(*sizes).attend(q, k, v), Dense().attend(q, k, v))


def test_queries_without_keys_give_zeros(make_qkv):
    q, k, v = make_qkv(300)
    out = Triangle(0, 0, 20).attend(q, k, v)
    assert not out[:, :, :280].any()
    torch.testing.assert_close(out[:, :, 280:], Dense().attend(q, k, v)[:, :, 280:])


@pytest.mark.parametrize("field", ["n_init", "n_local", "last_n"])
def test_negative_sizes_are_refused_by_name(field):
    with pytest.raises(ValueError, match=f"^{field} must be 0 or more, not -1"):
        Triangle(**dict[str, Any]({field: -1}))


@pytest.mark.slow
def test_length_65536_on_sampled_queries():
    """Too long for anything quadratic: one head's logits alone would take 17 GB."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 65536, 32) for _ in range(3))
    pattern = Triangle()
    out = pattern.attend(q, k, v)
    rows = torch.tensor([0, 7, 519, 520, 711, 712, 30000, 65407, 65408, 65535])
    mask = pattern.attends(rows[:, None], torch.arange(65536), 65536)
    torch.testing.assert_close(out[:, :, rows].double(), masked_attention(q[:, :, rows], k, v, mask), atol=1e-6, rtol=1e-4)
