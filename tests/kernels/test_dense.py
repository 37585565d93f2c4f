import pytest
import torch

from tmbench_kernels import Dense
from tmbench_kernels.sdpa import sdpa

BACKENDS = {backend.name: backend for backend in Dense.backends}


def test_mask_and_pairs(make_qkv):
    q, k, _ = make_qkv(7, heads=6, batch=2)
    mask = Dense().mask(q, k)
    assert mask[0, 0].tolist() == [[j <= i for j in range(7)] for i in range(7)]
    assert Dense().pairs(q, k) == 2 * 6 * int(mask.sum())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "batch"), [(4, 4, 64, 1), (4, 2, 96, 2), (6, 1, 128, 1)])
@pytest.mark.parametrize("length", [1, 63, 300])
def test_against_masked_softmax(make_qkv, assert_exact, dtype, heads, kv_heads, dim, batch, length):
    q, k, v = make_qkv(length, heads=heads, kv_heads=kv_heads, dim=dim, batch=batch, dtype=dtype)
    assert_exact(Dense().attend(q, k, v), q, k, v, Dense().mask(q, k))
    assert_exact(Dense().attend(q, k, v, scale=0.3), q, k, v, Dense().mask(q, k), 0.3)


@pytest.mark.parametrize("v_dim", [16, 48])
def test_v_of_another_width(make_qkv, assert_exact, v_dim):
    q, k, _ = make_qkv(50, dim=32)
    v = torch.randn(1, 2, 50, v_dim)
    assert_exact(Dense().attend(q, k, v), q, k, v, Dense().mask(q, k))


def test_groups_one_member_at_a_time(make_qkv, monkeypatch):
    """The path that CUDA takes where no fused kernel knows grouped heads."""
    q, k, v = make_qkv(40, heads=6, kv_heads=2, batch=2)
    bias = torch.randn(2, 6, 40, 40)
    expected = sdpa(q, k, v, 0.2, bias=bias), sdpa(q, k, v, 0.2, causal=True)
    monkeypatch.setattr("tmbench_kernels.sdpa._fuses_groups", lambda q, bias: False)
    torch.testing.assert_close(sdpa(q, k, v, 0.2, bias=bias), expected[0])
    torch.testing.assert_close(sdpa(q, k, v, 0.2, causal=True), expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("length", [1, 129, 1000])
@pytest.mark.parametrize("name", BACKENDS)
def test_on_a_gpu_against_masked_softmax(make_qkv, assert_exact, name, length, dim, heads, kv_heads, dtype):
    torch.use_deterministic_algorithms(False)
    try:
        q, k, v = (x.cuda() for x in make_qkv(length, heads=heads, kv_heads=kv_heads, dim=dim, batch=2, dtype=dtype))
        if reason := BACKENDS[name].obstacle(Dense(), q, k, v):
            pytest.skip(f"{name} {reason}")
        for scale in (None, 0.3):
            assert_exact(Dense(name).attend(q, k, v, scale=scale), q, k, v, Dense().mask(q, k), scale)
    finally:
        torch.use_deterministic_algorithms(True)
