"""Skip-softmax as an online softmax that skips, written again in float64, against the definition and every backend."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tmbench_kernels import Dense, SkipSoftmax, cuda
from tmbench_kernels.block_sparse.torch_backend import attend_lists
from tmbench_kernels.cuda import missing_hopper
from tmbench_kernels.pattern import new_lse
from tmbench_kernels.reference import masked_lse
from tmbench_kernels.skip_softmax.calibration import Calibration, calibration_json, fit
from tmbench_kernels.skip_softmax.margins import margins

B = 128
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ORDERS = ("ascending", "descending")
CHUNKS = [(1, 0), (128, 0), (129, 0), (600, 0), (512, 256), (600, 133), (390, 389)]
SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@pytest.fixture(scope="session")
def make_uneven_qkv(make_qkv):
    """As ``make_qkv``, with keys whose tiles lie at levels of their own, of which queries want high or low ones."""

    def make(length, *, seed=0, **shape):
        q, k, v = make_qkv(length, seed=seed, **shape)
        random, tiles = torch.Generator().manual_seed(seed), -(-length // B)
        levels = 4.0 * torch.randn(tiles, generator=random).repeat_interleave(B)[:length]
        wanted = torch.tensor([2.0, -1.0, -2.0, 1.0]).repeat(tiles)[:tiles].repeat_interleave(B)[:length]
        q, k = q.clone(), k.clone()
        q[..., 0], k[..., 0] = 2.0 * wanted.to(q), levels.to(k)
        return q, k, v

    return make


def online(q, k, v, scale, threshold, order):
    """One head, q of k's last tokens: output, log-sum-exp, and what was skipped as (query block, key block)."""
    length, start = len(k), len(k) - len(q)
    out, lse, skipped = np.zeros((len(q), v.shape[1])), np.zeros(len(q)), set()
    for block in range(start // B, (length - 1) // B + 1):
        low, high = max(block * B, start), min((block + 1) * B, length)
        rows = slice(low - start, high - start)
        m, total, o = np.full(high - low, -np.inf), np.zeros(high - low), np.zeros((high - low, v.shape[1]))
        sequence = range(block + 1)
        for tile in sequence if order == "ascending" else reversed(sequence):
            keys = np.arange(tile * B, min((tile + 1) * B, length))
            s = q[rows] @ k[keys].T * scale
            s[keys > np.arange(low, high)[:, None]] = -np.inf
            with np.errstate(over="ignore"):
                weights = np.exp(s.max(1) - m)
            if (weights < threshold).all():
                skipped.add((block, tile))
                continue
            higher = np.maximum(m, s.max(1))
            p, fade = np.exp(s - higher[:, None]), np.exp(m - higher)
            m, total, o = higher, total * fade + p.sum(1), o * fade[:, None] + p @ v[keys]
        out[rows], lse[rows] = o / total[:, None], m + np.log(total)
    return out, lse, skipped


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threshold", [1e-4, 0.02, 0.5, 1.0])
@pytest.mark.parametrize(("length", "start"), CHUNKS)
def test_the_published_rule(make_uneven_qkv, make_structured_qkv, length, start, threshold, order):
    pattern = SkipSoftmax(threshold=threshold, order=order)
    for make, scale in ((make_structured_qkv, 2.0), (make_uneven_qkv, 0.3)):
        q, k, v = make(length, heads=2, kv_heads=1, dim=32, seed=length)
        q = q[:, :, start:]
        mask, lists = pattern.mask(q, k, scale=scale), pattern.select(q, k, scale=scale)
        out, lse = pattern.attend_lse(q, k, v, scale=scale)
        first, skipped, tiles = start // B, 0, 0
        for h in range(2):
            qh, kh, vh = (x[0, n].double().numpy() for x, n in ((q, h), (k, 0), (v, 0)))
            exact, sums, left = online(qh, kh, vh, scale, threshold, order)
            np.testing.assert_allclose(out[0, h], exact, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(lse[0, h], sums, rtol=1e-4, atol=1e-4)
            every = {(b, t) for b in range(first, (length - 1) // B + 1) for t in range(b + 1)}
            kept = {(first + b, t) for b, t in lists.to_map()[0, h].nonzero().tolist()}
            assert kept == every - left
            assert {(first + b, t) for b, t in pattern.rule(q[0, h], k[0, 0], scale).nonzero().tolist()} == kept
            skipped, tiles = skipped + len(left), tiles + len(every)
        computed = pattern.computed(q, k, scale=scale)
        assert (computed.tiles, computed.skipped) == (tiles, skipped)
        assert computed.pairs == pattern.pairs(q, k, scale=scale) == (Dense().pairs(q, k) + int(mask.sum())) // 2


def test_the_thresholds_of_these_tests_skip_some_and_orders_differ(make_uneven_qkv):
    q, k, _ = make_uneven_qkv(600, heads=2, kv_heads=1)
    maps = [SkipSoftmax(threshold=0.02, order=order).block_map(q, k, 0.3) for order in ORDERS]
    assert not torch.equal(*maps)
    for pattern in (SkipSoftmax(threshold=0.02), SkipSoftmax(threshold=0.5, order="descending")):
        computed = pattern.computed(q, k, scale=0.3)
        assert 0.1 < computed.skipped / computed.tiles < 0.9


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [130, 600])
def test_a_threshold_below_all_weights_is_dense(make_uneven_qkv, length, order):
    q, k, v = make_uneven_qkv(length, batch=2)
    pattern = SkipSoftmax(threshold=1e-30, order=order)
    assert pattern.computed(q, k, scale=0.3).skipped == 0
    assert pattern.pairs(q, k, scale=0.3) == Dense().pairs(q, k)
    torch.testing.assert_close(pattern.attend(q, k, v, scale=0.3), Dense().attend(q, k, v, scale=0.3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [SkipSoftmax(threshold=0.02), SkipSoftmax(threshold=0.3, order="descending")], ids=repr)
@pytest.mark.parametrize(("length", "start"), [(520, 0), (400, 0), (650, 133)])
def test_attention_and_its_sums_are_exact(make_uneven_qkv, assert_exact, pattern, length, start, dtype):
    q, k, v = make_uneven_qkv(length, dtype=dtype, seed=length)
    q, v = q[:, :, start:], v[..., :24]
    mask = pattern.mask(q, k, scale=0.3)
    out = pattern.attend(q, k, v, scale=0.3)
    assert_exact(out, q, k, v, mask, 0.3)
    assert out.transpose(1, 2).is_contiguous(), "as models want it in memory"
    assert_exact(pattern.last_row(q, k, v, scale=0.3), q[:, :, -1:], k, v, mask[:, :, -1:], 0.3)
    sinks = torch.tensor([0.5, 2.0, -1.0, 1.0])
    assert_exact(pattern.attend(q, k, v, scale=0.3, sinks=sinks), q, k, v, mask, 0.3, sinks=sinks)
    out, lse = pattern.attend_lse(q, k, v, scale=0.3, softcap=4.0)
    assert_exact(out, q, k, v, mask, 0.3, softcap=4.0)
    torch.testing.assert_close(lse.double(), masked_lse(q, k, mask, scale=0.3, softcap=4.0), rtol=1e-5, atol=1e-5)


def test_what_the_last_row_costs_is_its_block(make_uneven_qkv, monkeypatch):
    q, k, v = make_uneven_qkv(400)
    seen = []
    monkeypatch.setattr(SkipSoftmax, "compute", lambda self, q, k, v, scale, **asked: seen.append(q.shape[2]) or q[..., :1])
    SkipSoftmax().last_row(q, k, v)
    SkipSoftmax().last_row(q[:, :, -10:], k, v)
    assert seen == [400 - 384, 10]


def test_in_chunks_that_end_on_blocks_a_threshold_skips_the_same(make_uneven_qkv):
    q, k, _ = make_uneven_qkv(600)
    for order in ORDERS:
        pattern = SkipSoftmax(threshold=0.1, order=order)
        whole = pattern.mask(q, k, scale=0.3)
        parts = [pattern.mask(q[:, :, a:b], k[:, :, :b], scale=0.3) for a, b in ((0, 256), (256, 600))]
        assert torch.equal(parts[0], whole[:, :, :256, :256])
        assert torch.equal(parts[1], whole[:, :, 256:])


def test_the_threshold_is_a_factor_over_the_keys_and_at_most_one():
    assert SkipSoftmax().threshold_scale_factor == 1000
    pattern = SkipSoftmax(threshold_scale_factor=64)
    assert pattern.least(6400) == pytest.approx(math.log(0.01))
    assert pattern.least(32) == 0
    assert SkipSoftmax(threshold=0.01).least(6400) == SkipSoftmax(threshold=0.01).least(7)


def test_a_factor_follows_from_a_calibration(tmp_path):
    file = tmp_path / "skip.json"
    file.write_text(calibration_json(100.0, 5.0, {}))
    pattern = SkipSoftmax(target=0.5, calibration=Calibration.read(file))
    assert pattern.threshold_scale_factor == pytest.approx(100 * math.exp(2.5), rel=1e-3)
    assert str(pattern.calibration) == f"skip:{Calibration.read(file).digest}"
    assert SkipSoftmax(**vars(pattern)) == pattern
    file.write_text(calibration_json(100.0, 5.0, {"order": "descending"}))
    with pytest.raises(ValueError, match=r"order ascending is not the one that .*skip\.json is for: give descending"):
        SkipSoftmax(target=0.5, calibration=Calibration.read(file))
    checkpoint = tmp_path / "config.json"
    group = {"algorithm": "skip_softmax", "threshold_scale_factor": {
        "formula": "a * exp(b * target_sparsity)", "coefficients": {"a": 2142.7, "b": 4.28}}}  # fmt: skip
    checkpoint.write_text(json.dumps({"hidden_size": 1, "sparse_attention_config": {"config_groups": {"group_0": group}}}))
    assert Calibration.read(checkpoint).factor(0.5) == pytest.approx(2142.7 * math.exp(2.14), rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", r"skip\.json is not valid JSON"),
        ("[]", r"skip\.json has no calibration of skip_softmax for prefill"),
        (calibration_json(-1.0, 5.0, {}), "a = -1.0 and b = 5.0, but a must be above 0"),
        (calibration_json(1.0, 5.0, {}).replace("exp", "log"), "only 'a \\* exp\\(b \\* target_sparsity\\)' is known"),
    ],
)
def test_files_that_are_no_calibration_are_refused(tmp_path, text, message):
    file = tmp_path / "skip.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Calibration.read(file)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0}, "threshold must be above 0 and at most 1, not 0"),
        ({"threshold_scale_factor": 0}, "threshold_scale_factor must be above 0, not 0"),
        ({"threshold": 0.1, "threshold_scale_factor": 5}, "threshold and threshold_scale_factor both say what to skip"),
        ({"target": 0.5}, "target takes a calibration beside it: add calibration="),
        ({"calibration": "found"}, "calibration takes a target beside it: add target="),
        ({"threshold": 0.1, "target": 0.5, "calibration": "found"}, "threshold and target both say what to skip"),
        ({"order": "random"}, "order random is unknown: choose from ascending, descending"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(tmp_path, values, message):
    if "calibration" in values:
        file = tmp_path / "skip.json"
        file.write_text(calibration_json(100.0, 5.0, {}))
        values = values | {"calibration": Calibration.read(file)}
    with pytest.raises(ValueError, match=message):
        SkipSoftmax(**values)


def test_a_fit_finds_what_it_was_made_of():
    shares = [0.1, 0.3, 0.5, 0.9]
    assert fit(shares, [20 * math.exp(6 * share) for share in shares]) == pytest.approx((20.0, 6.0))


def triton_attend(pattern, q, k, v, scale, **asked):
    from tmbench_kernels.skip_softmax import triton_backend

    return triton_backend.attend(pattern, q, k, v, scale, **asked)


def check_kernel(attend, measure_errors, pattern, q, k, v, scale, softcap=0.0):
    """Output and log-sum-exp of a kernel against float64, over the tiles that the definition keeps."""
    mask = pattern.mask(q, k, scale=scale)
    lse = new_lse(q)
    asked = {"softcap": softcap} if softcap else {}
    out = attend(pattern, q, k, v, scale, lse=lse, **asked)
    size, error, plain_error = measure_errors(out, q, k, v, mask, scale, softcap=softcap)
    assert error <= max(2 * plain_error, 1e-6 * size)
    sums = masked_lse(q, k, mask, scale=scale, softcap=softcap)
    torch.testing.assert_close(lse.double(), sums, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(attend(pattern, q, k, v, scale, **asked), out, rtol=0.02, atol=0.002)
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("length", "start"), [(1, 0), (300, 0), (512, 0), (390, 133), (512, 256)])
def test_triton(make_uneven_qkv, measure_errors, length, start, order):
    """Interpreted where there is no GPU."""
    q, k, v = (x.to(DEVICE) for x in make_uneven_qkv(length, heads=2, kv_heads=1, dtype=torch.float16, seed=length))
    q, v = q[:, :, start:], v[..., :24]
    for threshold in (0.02, 0.4):
        check_kernel(triton_attend, measure_errors, SkipSoftmax(threshold=threshold, order=order), q, k, v, 0.3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes both sides of a where
def test_triton_votes_before_the_cap(make_uneven_qkv, measure_errors):
    q, k, v = (x.to(DEVICE) for x in make_uneven_qkv(400, heads=2, kv_heads=1, dtype=torch.float16))
    mask = check_kernel(triton_attend, measure_errors, SkipSoftmax(threshold=0.02), q, k, v, 0.3, softcap=3.0)
    assert int(mask.sum()) < Dense().pairs(q, k)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
@pytest.mark.parametrize("order", ORDERS)
def test_margins_in_triton(make_uneven_qkv, order, scale):
    from tmbench_kernels.skip_softmax import triton_backend

    q, k, _ = (x.to(DEVICE) for x in make_uneven_qkv(390, batch=2, dtype=torch.float16))
    q = q[:, :, 133:]
    found = triton_backend.margins(order == "ascending", q, k, scale)
    torch.testing.assert_close(found, margins(order == "ascending", q, k, scale), rtol=1e-3, atol=1e-3)


def hopper_attend(pattern, q, k, v, scale, **asked):
    from tmbench_kernels.skip_softmax import hopper_backend

    return hopper_backend.attend(pattern, q, k, v, scale, **asked)


@pytest.fixture(params=["triton", "hopper"])
def on_gpu(request):
    """A kernel's ``attend``."""
    if request.param == "triton":
        return triton_attend
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("runs on Hopper only")
    if reason := missing_hopper():
        pytest.skip(reason)
    return hopper_attend


@pytest.fixture
def on_capability(monkeypatch):
    """``on_capability(9)``: CUDA devices have this compute capability, Triton and the compiler for Hopper are there."""
    caches = cuda.capability, cuda.refuses_device, cuda.refuses_tensors

    def make(major):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        forget()

    def forget():
        for cached in caches:
            cached.cache_clear()

    yield make
    forget()


@pytest.mark.skipif(bool(missing_hopper()), reason=missing_hopper())
@pytest.mark.parametrize(
    ("major", "shape", "asked", "picked", "hopper"),
    [
        (9, {}, {}, "cuda-hopper", ""),
        (9, {"dim": 192}, {"lse": True}, "cuda-hopper", ""),
        (9, {"queries": 133}, {}, "cuda-hopper", ""),
        (9, {}, {"softcap": 3.0}, "triton", "has no soft-capped logits"),
        (9, {"dim": 256}, {}, "triton", "takes head sizes up to 192, and of values up to 128"),
        (9, {"v_dim": 192}, {}, "triton", "takes head sizes up to 192, and of values up to 128"),
        (9, {"dim": 300}, {}, "torch-blocks", "takes head sizes up to 192, and of values up to 128"),
        (9, {"v_dim": 100}, {}, "triton", "writes outputs of a head size that is a multiple of 8, not 100"),
        (9, {"dtype": torch.float32}, {}, "torch-blocks", "takes float16 or bfloat16, not float32"),
        (8, {}, {}, "triton", "takes a GPU of compute capability 9, not 8"),
    ],
)
def test_the_kernel_for_hopper_comes_first_where_it_serves(on_capability, major, shape, asked, picked, hopper):
    on_capability(major)
    given = {"queries": 600, "dim": 128, "v_dim": 128, "dtype": torch.bfloat16} | shape
    device = torch.device("cuda", 0)

    def tensor(length, dim) -> Any:
        return SimpleNamespace(device=device, dtype=given["dtype"], shape=torch.Size((1, 2, length, dim)))

    qkv = tensor(given["queries"], given["dim"]), tensor(600, given["dim"]), tensor(600, given["v_dim"])
    assert SkipSoftmax.backends[0].obstacle(SkipSoftmax(), *qkv, **asked) == hopper
    assert SkipSoftmax().backend(*qkv, **asked).name == picked


SHAPES = [
    (1, 0, {}),
    (64, 0, {}),
    (129, 0, {"dim": 128}),
    (5000, 0, {"heads": 8, "kv_heads": 2, "dim": 128}),
    (4096, 2048, {"heads": 4, "kv_heads": 4, "dim": 64, "batch": 2}),
    (3001, 1111, {"heads": 6, "kv_heads": 2, "dim": 96}),
    (3000, 1090, {"heads": 6, "kv_heads": 2, "dim": 128, "batch": 2}),
    (2000, 1999, {"heads": 2, "kv_heads": 1, "dim": 128}),
    (2049, 77, {"heads": 2, "kv_heads": 1, "dim": 192, "v_dim": 128}),
    (1500, 0, {"heads": 3, "kv_heads": 3, "dim": 40, "v_dim": 128}),
]


@pytest.mark.gpu
@SIXTEEN_BITS
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("length", "start", "shape"), SHAPES)
def test_kernels_on_a_gpu(make_uneven_qkv, measure_errors, on_gpu, length, start, shape, order, dtype):
    """Tiles of which one row or one half decides, chunks that cut a tile anywhere, and any head size."""
    q, k, v = (x.cuda() for x in make_uneven_qkv(length, dtype=dtype, seed=length, **shape))
    q = q[:, :, start:]
    for threshold in (1e-4, 0.02, 0.3, 1.0):
        pattern = SkipSoftmax(threshold=threshold, order=order)
        mask = check_kernel(on_gpu, measure_errors, pattern, q, k, v, 0.3)
    if length >= 1500:
        assert int(mask.sum()) < 0.9 * Dense().pairs(q, k)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_a_single_row_keeps_a_tile(make_qkv, on_gpu, order):
    """Wherever in the tile it is: every row's vote counts, and no row's outside of the tile."""
    q, k, v = (x.cuda() for x in make_qkv(1024, heads=2, kv_heads=1, dim=128, dtype=torch.float16))
    q, k, v = q.clone() * 0.1, k.clone() * 0.1, v.clone()
    q[..., 0], k[..., 0] = 4.0, 0.0
    first, last, light = (0, 7, 4) if order == "ascending" else (7, 0, 2)
    for tile in (3, light):
        k[:, :, tile * B : (tile + 1) * B, 0] = -200.0
    k[:, :, last * B : (last + 1) * B, 0] = -200.0
    k[:, :, first * B : (first + 1) * B, 0] = 1.0
    for row in (896, 897, 927, 959, 960, 991, 1023):
        one = q.clone()
        # To this row alone the fourth tile is heavier than all others.
        one[:, :, row, 0], one[:, :, row, 1], k[:, :, 3 * B, 1] = 0.0, 8.0, 4.0
        pattern = SkipSoftmax(threshold=0.001, order=order)
        kept = pattern.block_map(one, k, 1.0)[0, :, -1]
        assert kept[:, 3].all()
        assert not kept[:, light].any()
        lse = new_lse(one)
        out = on_gpu(pattern, one, k, v, 1.0, lse=lse)
        mask = pattern.mask(one, k, scale=1.0)
        exact = masked_lse(one, k, mask, scale=1.0)
        torch.testing.assert_close(lse.double(), exact, rtol=2e-3, atol=2e-3)
        assert out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_many_work_tiles_of_a_long_prompt(make_uneven_qkv, on_gpu, order):
    """More work tiles than programs, several times over, against dense attention in lists of the tiles that are kept."""
    q, k, v = (x.cuda() for x in make_uneven_qkv(20000, heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16))
    pattern = SkipSoftmax(threshold=0.01, order=order)
    computed = pattern.computed(q, k, scale=0.3)
    assert 0.1 < computed.skipped / computed.tiles < 0.95
    expected = attend_lists(q, k, v, pattern.select(q, k, scale=0.3), 0.3)
    for _ in range(3):
        out = on_gpu(pattern, q, k, v, 0.3)
        error = (out - expected).double().square().mean().sqrt() / expected.double().square().mean().sqrt()
        assert error < 0.01


@pytest.mark.gpu
def test_nothing_is_compiled_again_for_another_prompt_or_threshold(make_qkv):
    from tmbench_kernels.skip_softmax import triton_backend

    def run(length, threshold):
        q, k, v = (x.cuda() for x in make_qkv(length, heads=4, kv_heads=2, dim=64, dtype=torch.float16))
        SkipSoftmax(threshold=threshold).attend(q, k, v)

    def compiled():
        return sum(len(cache[0]) for cache in triton_backend._walk.device_caches.values())

    run(5000, 0.1)
    before = compiled()
    for length, threshold in ((5001, 0.1), (8192, 0.01), (16384, 1.0)):
        run(length, threshold)
    assert compiled() == before
