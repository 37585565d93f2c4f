"""Head sizes of newer models: values narrower than queries under latent attention, and heads of 256 and 512."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tmbench_kernels import Dense, HeadPattern, MInferenceHeads, Triangle, VerticalSlash, XAttention, cuda
from tmbench_kernels.decode import attend_with_kvcache
from tmbench_kernels.pattern import new_lse
from tmbench_kernels.reference import masked_attention, masked_lse

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HEADS = (HeadPattern("stream_llm", 3, 50), HeadPattern("block_sparse"))
PATTERNS = [Dense(), Triangle(8, 50, 20), VerticalSlash(((30, 50),)), MInferenceHeads(HEADS), XAttention(threshold=0.5)]
BACKENDS = [(pattern, backend) for pattern in PATTERNS for backend in pattern.backends]
SIZES = [(192, 128), (24, 16), (48, 80), (256, 256), (512, 512)]


pytestmark = pytest.mark.usefixtures("running_sums_on_a_gpu")


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "backend"), BACKENDS, ids=lambda given: getattr(given, "name", None))
@pytest.mark.parametrize(("dim", "v_dim"), SIZES)
def test_every_backend_against_the_definition(make_qkv, assert_exact, pattern, backend, dim, v_dim):
    shape = {"heads": 2, "kv_heads": 1, "dim": dim, "v_dim": v_dim, "dtype": torch.float16}
    q, k, v = (x.to(DEVICE) for x in make_qkv(2100 if GPU else 150, **shape))
    if (GPU or backend.name != "triton") and (reason := backend.obstacle(pattern, q, k, v, lse=backend.lse)):
        pytest.skip(f"{backend.name} {reason}")
    mask = pattern.mask(q, k)
    lse = new_lse(q) if backend.lse else None
    out = backend.attend(pattern, q, k, v, dim**-0.5, **({} if lse is None else {"lse": lse}))
    assert_exact(out, q, k, v, mask)
    if lse is not None:
        torch.testing.assert_close(lse.double(), masked_lse(q, k, mask).expand_as(lse), atol=2e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, 3.0])], ids=["plain", "sinks"])
def test_the_last_row_of_latent_attention(make_qkv, assert_exact, pattern, sinks):
    q, k, v = make_qkv(150, heads=2, kv_heads=2, dim=192, v_dim=128)
    mask = pattern.mask(q, k)[:, :, -1:]
    assert_exact(pattern.last_row(q, k, v, sinks=sinks), q[:, :, -1:], k, v, mask, sinks=sinks)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "v_dim"), SIZES)
@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_a_new_token_over_a_cache(make_qkv, dim, v_dim, triton):
    from tmbench_kernels.decode import triton_backend

    shape = {"heads": 4, "kv_heads": 2, "dim": dim, "v_dim": v_dim, "dtype": torch.float16}
    q, k, v = (x.to(DEVICE) for x in make_qkv(71, **shape))
    k_cache, v_cache = (torch.cat([x[:, :, :70], torch.zeros_like(x[:, :, :9])], dim=2) for x in (k, v))
    new_q, new_k, new_v = (x[:, :, 70:] for x in (q, k, v))
    attend = triton_backend.attend if triton else attend_with_kvcache
    places = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    out = attend(new_q, new_k, new_v, k_cache, v_cache, places, dim**-0.5)
    exact = masked_attention(q[:, :, 70:], k, v, torch.ones(1, 71, dtype=torch.bool, device=DEVICE)).transpose(1, 2)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("major", "largest"), [(8, 256), (9, 512), (10, 512), (12, 256)])
def test_how_wide_the_kernels_in_triton_go(monkeypatch, major, largest):
    """On a GPU whose multiprocessors have the shared memory for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    caches = cuda.capability, cuda.refuses_device, cuda.refuses_tensors

    def reason(dim):
        for cached in caches:
            cached.cache_clear()
        shape = torch.Size((1, 2, 64, dim))
        x: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=shape)
        return cuda.refuses_triton(None, x, x, x)

    try:
        assert not reason(largest)
        assert reason(largest + 1) == f"takes head sizes up to {largest}, not {largest + 1}"
    finally:
        for cached in caches:
            cached.cache_clear()
