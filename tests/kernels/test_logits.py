"""Log-sum-exps, soft-capped logits and learned sinks: every backend of every pattern against the definition."""

from __future__ import annotations

import math
import re

import pytest
import torch

from tmbench_kernels import (
    Backend,
    BlockTopK,
    Dense,
    DenseProbe,
    FlashPrefill,
    FlexPrefill,
    HeadPattern,
    MInferenceHeads,
    Triangle,
    VerticalSlash,
    XAttention,
)
from tmbench_kernels.pattern import new_lse
from tmbench_kernels.reference import masked_attention, masked_lse
from tmbench_kernels.sdpa import sdpa, written_out

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HEADS = (HeadPattern("stream_llm", 3, 50), HeadPattern("block_sparse"), HeadPattern("vertical_and_slash", 40, 60))
PATTERNS = [
    Dense(),
    Triangle(8, 50, 20),
    Triangle(20, 70, 0),
    Triangle(0, 0, 20),
    VerticalSlash(((30, 60), (60, 120), (30, 50), (200, 300))),
    MInferenceHeads((*HEADS, HEADS[0])),
    FlexPrefill(gamma=0.6, min_budget=128),
    XAttention(threshold=0.5),
    FlashPrefill(alpha=0.6, sinks=1, window=1, last=1),
    BlockTopK(2),
]
BACKENDS = [(pattern, backend) for pattern in PATTERNS for backend in pattern.backends]
SINKS = torch.tensor([-400.0, 0.7, 6.0, 400.0])


pytestmark = pytest.mark.usefixtures("running_sums_on_a_gpu")


def runs(pattern, backend, *tensors, **asked):
    """Whether a backend runs here, Triton's in the interpreter where there is no GPU."""
    if GPU or backend.name != "triton":
        return not backend.obstacle(pattern, *tensors, **asked)
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "backend"), BACKENDS, ids=lambda given: getattr(given, "name", None))
@pytest.mark.parametrize(("length", "softcap"), [(1, 0.0), (200, 0.0), (200, 3.0)])
def test_every_backend_against_the_definition(make_structured_qkv, assert_exact, pattern, backend, softcap, length):
    q, k, v = (x.to(DEVICE) for x in make_structured_qkv(length, heads=4, kv_heads=2, dtype=torch.float16))
    if not runs(pattern, backend, q, k, v, softcap=softcap, lse=True):
        pytest.skip(f"{backend.name} {backend.obstacle(pattern, q, k, v, softcap=softcap, lse=True)}")
    mask = pattern.mask(q, k, scale=0.3)
    lse = new_lse(q)
    asked = {"softcap": softcap} if softcap else {}
    out = backend.attend(pattern, q, k, v, 0.3, lse=lse, **asked)
    assert_exact(out, q, k, v, mask, 0.3, softcap=softcap)
    exact = masked_lse(q, k, mask, scale=0.3, softcap=softcap)
    torch.testing.assert_close(lse.double(), exact.expand_as(lse), atol=2e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "backend"), BACKENDS, ids=lambda given: getattr(given, "name", None))
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_long_prompts_on_a_gpu(make_structured_qkv, assert_exact, pattern, backend, dim):
    """Splits of the last rows among them; asking for the log-sum-exp does not change the output."""
    q, k, v = (x.cuda() for x in make_structured_qkv(5000, heads=4, kv_heads=2, dim=dim, dtype=torch.bfloat16))
    if not runs(pattern, backend, q, k, v, lse=True):
        pytest.skip(f"{backend.name} {backend.obstacle(pattern, q, k, v, lse=True)}")
    lse = new_lse(q)
    out = backend.attend(pattern, q, k, v, 0.2, lse=lse)
    torch.testing.assert_close(out, backend.attend(pattern, q, k, v, 0.2), atol=1e-2, rtol=2e-2)
    if not pattern.dynamic:
        rows = torch.tensor([0, 7, 63, 64, 600, 4870, 4979, 4980, 4999], device="cuda")
        mask = pattern.mask(q, k)[:, :, rows]
        exact = masked_lse(q[:, :, rows], k, mask, scale=0.2)
        torch.testing.assert_close(lse[:, :, rows].double(), exact.expand(1, 4, -1), atol=2e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch-banded", "triton", pytest.param("cuda-hopper", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_splits_of_the_last_rows(make_qkv, monkeypatch, name, softcap):
    from tmbench_kernels.triangle import splits, triton_backend

    pattern, backend = Triangle(5, 70, 40), {backend.name: backend for backend in Triangle.backends}[name]
    q, k, v = (x.to(DEVICE) for x in make_qkv(230, heads=4, kv_heads=2, dtype=torch.float16, batch=2))
    if not runs(pattern, backend, q, k, v, softcap=softcap, lse=True):
        pytest.skip("does not run here")
    monkeypatch.setattr(splits, "ONE_LAUNCH", 0)
    if not GPU:
        monkeypatch.setattr(triton_backend, "multiprocessors", lambda device: 4)
    splits.schedule_for.cache_clear()
    lse = new_lse(q)
    try:
        backend.attend(pattern, q, k, v, 0.3, lse=lse, **({"softcap": softcap} if softcap else {}))
    finally:
        splits.schedule_for.cache_clear()
    exact = masked_lse(q, k, pattern.mask(q, k), scale=0.3, softcap=softcap)
    torch.testing.assert_close(lse.double(), exact, atol=2e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, 0.0), (torch.float32, 3.0), (torch.bfloat16, 0.0)])
def test_sinks_are_one_more_logit_for_each_head(make_structured_qkv, assert_exact, pattern, dtype, softcap):
    q, k, v = make_structured_qkv(200, heads=4, kv_heads=2, dtype=dtype)
    mask = pattern.mask(q, k, scale=0.3)
    logits = {"softcap": softcap, "sinks": SINKS}
    out = pattern.attend(q, k, v, scale=0.3, **logits)
    assert_exact(out, q, k, v, mask, 0.3, **logits)
    row = pattern.last_row(q, k, v, scale=0.3, **logits)
    assert_exact(row, q[:, :, -1:], k, v, mask[:, :, -1:], 0.3, **logits)
    assert not out[:, 3].any(), "a sink that outweighs all keys leaves nothing"
    if dtype == torch.float32:
        without = pattern.attend(q, k, v, scale=0.3, softcap=softcap)
        torch.testing.assert_close(out[:, 0], without[:, 0], msg="a sink far below all logits changes nothing")


def test_attention_and_its_log_sum_exp(make_qkv):
    q, k, v = make_qkv(90)
    out, lse = Triangle(3, 20, 5).attend_lse(q, k, v, scale=0.4, softcap=2.0)
    mask = Triangle(3, 20, 5).mask(q, k)
    torch.testing.assert_close(lse.double(), masked_lse(q, k, mask, scale=0.4, softcap=2.0), atol=1e-5, rtol=1e-5)
    exact = masked_attention(q, k, v, mask, scale=0.4, softcap=2.0)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    assert (lse.dtype, lse.shape) == (torch.float32, (1, 4, 90))


def test_float64_stays_float64(make_qkv):
    q, k, v = (x.double() for x in make_qkv(90))
    sinks = SINKS / 100
    out = Triangle(3, 20, 5).attend(q, k, v, softcap=2.0, sinks=sinks)
    exact = masked_attention(q, k, v, Triangle(3, 20, 5).mask(q, k), softcap=2.0, sinks=sinks)
    torch.testing.assert_close(out, exact, atol=1e-12, rtol=1e-12)


def test_a_query_without_a_key(make_qkv):
    """Its log-sum-exp is -inf and its output zero, whatever the sink is."""
    q, k, v = make_qkv(60)
    _, lse = Triangle(0, 0, 20).attend_lse(q, k, v)
    assert (lse[:, :, :40] == -torch.inf).all()
    assert lse[:, :, 40:].isfinite().all()
    for pattern in (Triangle(0, 0, 20), Triangle(0, 0, 0)):
        for sink in (-torch.inf, 3.0):
            sinks = torch.full((4,), sink)
            out = pattern.attend(q, k, v, sinks=sinks)
            assert not out[:, :, :40].any()
            assert out.isfinite().all()
            torch.testing.assert_close(pattern.last_row(q, k, v, sinks=sinks), out[:, :, -1:])


def test_the_definition_against_loops():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    mask = torch.rand(1, 4, 5, 5) < 0.5
    mask[0, :, 2] = False
    sinks = torch.tensor([-1.0, 0.0, 2.0, 30.0])
    out = masked_attention(q, k, v, mask, scale=0.9, softcap=1.5, sinks=sinks)
    lse = masked_lse(q, k, mask, scale=0.9, softcap=1.5)
    for h in range(4):
        for i in range(5):
            keys = [j for j in range(5) if mask[0, h, i, j]]
            logits = [0.9 * float(q[0, h, i].double() @ k[0, h // 2, j].double()) for j in keys]
            powers = [math.exp(1.5 * math.tanh(logit / 1.5)) for logit in logits]
            total = sum(powers) + math.exp(float(sinks[h]))
            expected = sum(
                (power / total * v[0, h // 2, j].double() for power, j in zip(powers, keys, strict=True)),
                torch.zeros(6, dtype=torch.float64),
            )
            torch.testing.assert_close(out[0, h, i], expected)
            assert float(lse[0, h, i]) == (pytest.approx(math.log(sum(powers))) if keys else -math.inf)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_logits_written_out_are_those_of_sdpa(make_qkv, monkeypatch, rows):
    q, k, v = make_qkv(61, heads=6, kv_heads=2, batch=2, dim=16)
    monkeypatch.setattr("tmbench_kernels.sdpa._LOGITS", {"cpu": rows * 2 * 6 * 61})
    bias = torch.randn(2, 6, 61, 61)
    for options in (
        {"bias": bias},
        {"bias": bias[:1, :1]},
        {"bias": bias[0, 0]},
        {"bias": bias[:, :1, :1]},
        {"causal": True},
    ):
        torch.testing.assert_close(written_out(q, k, v[..., :9], 0.2, **options), sdpa(q, k, v[..., :9], 0.2, **options))


@pytest.mark.parametrize("cap", [1e-2, 1.0, 50.0, 1e4])
def test_a_cap_in_triton_is_that_of_torch(make_qkv, cap):
    from tmbench_kernels.triangle import triton_backend

    q, k, v = (x.to(DEVICE) for x in make_qkv(40, heads=2, kv_heads=1, dtype=torch.float16))
    lse = new_lse(q)
    triton_backend.attend_dense(Dense(), q, k, v, 1.0, softcap=cap, lse=lse)
    exact = masked_lse(q, k, Dense().mask(q, k), scale=1.0, softcap=cap)
    torch.testing.assert_close(lse.double(), exact, atol=1e-5, rtol=2e-6)


def test_a_backend_without_them_is_passed_over_and_named(make_qkv):
    class Plain(Dense):
        backends = (Backend("plain", ("cpu",), sdpa_only),)

    q, k, v = make_qkv(8)
    assert_close = torch.testing.assert_close
    assert_close(Plain().attend(q, k, v)[:, :, -1:], Plain().last_row(q, k, v))
    for asked, reason in (
        ({"softcap": 2.0}, "has no soft-capped logits"),
        ({"sinks": SINKS}, "gives no log-sum-exp, which learned sinks take"),
    ):
        with pytest.raises(
            ValueError, match=re.escape(f"no backend of the pattern dense serves these tensors: plain {reason}")
        ):
            Plain().attend(q, k, v, **asked)
    assert Dense().backend(q, k, v).name == "sdpa"
    assert Dense().backend(q, k, v, lse=True).name == Dense().backend(q, k, v, softcap=2.0).name == "torch"


def sdpa_only(pattern, q, k, v, scale):
    return sdpa(q, k, v, scale, causal=True)


@pytest.mark.parametrize("pattern", [Dense(), Triangle()])
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"softcap": -1.0}, "softcap must be 0, which caps nothing, or more, not -1.0"),
        ({"softcap": math.nan}, "softcap must be 0, which caps nothing, or more, not nan"),
        ({"sinks": torch.zeros(3)}, "sinks must be one number for each of 4 query heads, not (3,)"),
        ({"sinks": torch.zeros(4, 1)}, "sinks must be one number for each of 4 query heads, not (4, 1)"),
    ],
)
def test_what_is_no_cap_or_no_sinks_is_refused(make_qkv, pattern, asked, reason):
    for attend in (pattern.attend, pattern.last_row):
        with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
            attend(*make_qkv(8), **asked)


def test_the_probe_differentiates_plain_softmax_alone(make_qkv):
    for asked, name in (({"softcap": 2.0}, "soft-capped logits"), ({"sinks": SINKS}, "learned sinks")):
        with pytest.raises(ValueError, match=f"plain softmax attention, not {name}"):
            DenseProbe().attend(*make_qkv(8), **asked)
