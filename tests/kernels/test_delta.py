"""Delta correction: the rule written row by row in float64, its pairs, chunks, and the kernels for its dense rows."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import Dense, Triangle
from tmbench_kernels.cuda import missing_hopper
from tmbench_kernels.reference import masked_attention, masked_lse
from tmbench_kernels.triangle import delta as correction
from tmbench_kernels.triangle.delta import attend_rows_in_torch, carry_in_torch, rows_of

GPU = torch.cuda.is_available()
needs_hopper_host = pytest.mark.skipif(bool(missing_hopper()), reason=missing_hopper())
MODES = st.sampled_from(["carry", "recompute"])


def corrected(pattern, q, k, v, **logits):
    """The publication's rule, row by row in float64."""
    keys, delta = k.shape[2], pattern.delta
    start = keys - q.shape[2]
    tail = max(keys - keys % delta - max(pattern.last_n, delta, 128), 0)
    base = masked_attention(q, k, v, Triangle(pattern.n_init, pattern.n_local, keys - tail).mask(q, k), **logits)
    dense = masked_attention(q, k, v, Dense().mask(q, k), **logits)
    out = base.clone()
    for i in range(start, tail):
        source = i // delta * delta
        if pattern.mode == "recompute":
            out[:, :, i - start] = (dense if i == source else base)[:, :, i - start]
        else:
            source = max(source, start) - start
            out[:, :, i - start] += dense[:, :, source] - base[:, :, source]
    return out


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 600), st.integers(1, 600), st.integers(0, 40), st.integers(0, 200), st.integers(0, 200),
    st.sampled_from([1, 7, 64, 100]), MODES,
)  # fmt: skip
def test_rule_and_pairs(make_structured_qkv, length, queries, n_init, n_local, last_n, delta, mode):
    """Whole prompts and chunks: as many pairs as the mask has, and the last row alone is that of all rows."""
    q, k, v = (x.double() for x in make_structured_qkv(length, dim=16, seed=length))
    q = q[:, :, -queries:]
    pattern = Triangle(n_init, n_local, last_n, delta, mode)
    expected = corrected(pattern, q, k, v)
    torch.testing.assert_close(pattern.attend(q, k, v), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pattern.last_row(q, k, v), expected[:, :, -1:], rtol=1e-9, atol=1e-9)
    mask = pattern.mask(q, k)
    assert pattern.pairs(q, k) == 4 * int(mask.sum())
    rows = set(range(length - q.shape[2], length))
    assert {i for i in rows if i % delta == 0} <= {i for i in rows if mask[0, 0, i - length].sum() == i + 1}


@pytest.mark.parametrize("mode", ["carry", "recompute"])
def test_every_query_dense_is_dense(make_structured_qkv, mode):
    q, k, v = make_structured_qkv(300)
    torch.testing.assert_close(Triangle(4, 32, delta=1, mode=mode).attend(q, k, v), Dense().attend(q, k, v))


def test_carried_on_and_recomputed_differ(make_structured_qkv):
    """And either from the triangle alone; otherwise the tests would show nothing."""
    q, k, v = make_structured_qkv(600)
    dense = Dense().attend(q, k, v)
    outs = [pattern.attend(q, k, v) for pattern in (Triangle(4, 32), Triangle(4, 32, delta=64, mode="recompute"))]
    outs.append(Triangle(4, 32, delta=64).attend(q, k, v))
    assert all((a - b).abs().max() > 0.05 for a, b in pairwise(outs))
    rows = torch.arange(0, 448, 64)
    for out in outs[1:]:
        torch.testing.assert_close(out[:, :, rows], dense[:, :, rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[:, :, 448:], dense[:, :, 448:], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["carry", "recompute"])
def test_what_models_ask_of_the_logits(make_structured_qkv, mode):
    """Caps, learned sinks, values of another width; 16 bits within their rounding; memory as models want it."""
    q, k, v = make_structured_qkv(500, heads=4, kv_heads=2)
    v = v[..., :24]
    asked: dict[str, Any] = {"softcap": 3.0, "sinks": torch.tensor([0.5, 4.0, -1.0, 2.0]), "scale": 0.3}
    pattern = Triangle(4, 32, delta=64, mode=mode)
    expected = corrected(pattern, q, k, v, **asked)
    torch.testing.assert_close(pattern.attend(q, k, v, **asked).double(), expected, rtol=1e-4, atol=1e-5)
    assert pattern.attend(q, k, v).transpose(1, 2).is_contiguous()
    q, k, v = (x.bfloat16() for x in (q, k, v))
    expected = corrected(pattern, q, k, v)
    error = (pattern.attend(q, k, v) - expected).square().mean().sqrt()
    assert error < 0.01 * expected.square().mean().sqrt()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 500), st.sets(st.integers(1, 30)), MODES)
def test_chunks_that_end_before_dense_rows_give_what_one_piece_gives(make_qkv, length, cuts, mode):
    """Where the prompt's length is known: its last rows may lie in several chunks. Recomputed rows ask for no such edges."""
    q, k, v = make_qkv(length, dim=16, dtype=torch.float64, heads=2, kv_heads=1)
    pattern = Triangle(3, 20, 9, 16, mode)
    step = 16 if mode == "carry" else 13
    edges = [0, *sorted(step * cut for cut in cuts if step * cut < length), length]
    parts = [
        pattern.of_chunk(end, length).attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end])
        for start, end in pairwise(edges)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), corrected(pattern, q, k, v), rtol=1e-9, atol=1e-9)


def test_at_128k_it_costs_less_than_2_percent_of_dense():
    x = torch.empty(1, 1, 131072, 1, device="meta")
    for base in (Triangle(), Triangle.streaming(8, 512), Triangle.streaming(8, 2048)):
        for mode in ("carry", "recompute"):
            added = replace(base, delta=64, mode=mode).pairs(x, x) - base.pairs(x, x)
            assert 0.015 < added / Dense().pairs(x, x) < 0.018


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60 if GPU else 12))
def test_the_kernel_for_dense_rows(make_qkv, measure_errors, monkeypatch, seed):
    """Interpreted where there is no GPU: any lengths, chunks, distances, shapes, caps and sums, keys split and whole."""
    from tmbench_kernels.triangle import splits
    from tmbench_kernels.triangle.delta.triton_backend import attend_rows

    draw = random.Random(seed)
    monkeypatch.setattr(splits, "ONE_LAUNCH", draw.choice([0, 4096]))
    if not GPU:
        processors = draw.choice([1, 64])
        monkeypatch.setattr("tmbench_kernels.triangle.delta.triton_backend.multiprocessors", lambda device: processors)
    length = draw.choice([1, 129, 301, 400, draw.randint(1, 3000 if GPU else 300)])
    queries, delta = draw.choice([length, draw.randint(1, length)]), draw.choice([1, 7, 16, 64])
    groups, kv_heads = draw.choice([1, 3, 4]), draw.choice([1, 2])
    shape = {
        "heads": groups * kv_heads,
        "kv_heads": kv_heads,
        "dim": draw.choice([64, 96, 256]),
        "batch": draw.choice([1, 2]),
    }
    q, k, v = (x.to("cuda" if GPU else "cpu") for x in make_qkv(length, dtype=torch.float16, seed=seed, **shape))
    q = q[:, :, length - queries :]
    rows = Triangle(delta=delta, mode=draw.choice(["carry", "recompute"])).rows(length - queries, length)
    if not rows.count:
        pytest.skip("no dense row in this chunk")
    check_rows(measure_errors, attend_rows, rows, q, k, v, 0.2, softcap=draw.choice([0.0, 3.0]))


def check_rows(measure_errors, attend_rows, rows, q, k, v, scale, **logits):
    """Output and log-sum-exp of a kernel for dense rows against float64, and against torch's."""
    lse = q.new_empty(*q.shape[:2], rows.count, dtype=torch.float32)
    out = attend_rows(rows, q, k, v, scale, lse=lse, **logits)
    positions = torch.tensor(rows.positions(), device=q.device)
    mask = (torch.arange(k.shape[2], device=q.device) <= positions[:, None])[None, None]
    size, error, plain_error = measure_errors(out, rows.take(q), k, v, mask, scale, **logits)
    assert error <= max(2 * plain_error, 1e-6 * size)
    exact = masked_lse(rows.take(q), k, mask, scale=scale, **logits)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-4, atol=1e-3)
    sums = torch.empty_like(lse)
    plain = attend_rows_in_torch(rows, q, k, v, scale, lse=sums, **logits)
    tolerance = 1e-2 if q.dtype == torch.float16 else 3e-2
    torch.testing.assert_close(plain, out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sums, lse, rtol=1e-4, atol=1e-3)
    assert out.transpose(1, 2).is_contiguous()
    return out


@pytest.fixture
def on_hopper():
    """The kernel for Hopper, where there is one."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("takes a Hopper GPU")
    from tmbench_kernels.triangle.delta import hopper_backend

    hopper_backend._table.cache_clear()
    yield hopper_backend
    hopper_backend._table.cache_clear()


@pytest.mark.gpu
@needs_hopper_host
@pytest.mark.parametrize("seed", range(60))
def test_the_kernel_for_dense_rows_on_hopper(make_qkv, measure_errors, monkeypatch, on_hopper, seed):
    """Any lengths, chunks, distances, grouped heads and head sizes, in few and in many pieces."""
    draw = random.Random(seed)
    monkeypatch.setattr(on_hopper, "LEAST_KEYS", draw.choice([64, 192, 1024]))
    monkeypatch.setattr(on_hopper, "PIECES", draw.choice([1, 4, 100]))
    delta = draw.choice([1, 7, 16, 64, 64, 100])
    length = draw.choice([1, 64, 129, draw.randint(1, 600), draw.randint(1, 9000 if delta > 7 else 1500)])
    queries = draw.choice([length, draw.randint(1, length)])
    groups, kv_heads = draw.choice([1, 2, 3, 4, 5]), draw.choice([1, 2])
    dim, v_dim = draw.choice([(64, 64), (96, 96), (128, 128), (80, 40), (192, 128), (256, 256), (64, 200)])
    shape = {"heads": groups * kv_heads, "kv_heads": kv_heads, "dim": dim, "v_dim": v_dim, "batch": draw.choice([1, 2])}
    dtype = draw.choice([torch.float16, torch.bfloat16])
    q, k, v = (x.cuda() for x in make_qkv(length, dtype=dtype, seed=seed, **shape))
    q = q[:, :, length - queries :]
    rows = rows_of(length - queries, length, delta, draw.choice(["carry", "recompute"]))
    if not rows.count:
        pytest.skip("no dense row in this chunk")
    check_rows(measure_errors, on_hopper.attend_rows, rows, q, k, v, draw.choice([0.2, dim**-0.5, -0.1]))


@pytest.mark.gpu
@needs_hopper_host
def test_long_prompts_and_their_chunks_on_hopper(make_structured_qkv, measure_errors, on_hopper):
    """Whole, and by a last chunk whose few rows see many keys: pieces as they are cut for a whole GPU."""
    q, k, v = (x.cuda() for x in make_structured_qkv(32768 + 40, heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16))
    length = k.shape[2]
    for start in (0, length - 8192, length - 100):
        rows = rows_of(start, length - 40, 64, "carry")
        check_rows(measure_errors, on_hopper.attend_rows, rows, q[:, :, start:], k, v, 128**-0.5)


@pytest.mark.gpu
@needs_hopper_host
def test_on_hopper_the_host_waits_for_nothing_and_compiles_nothing_for_another_length(make_qkv, on_hopper):
    from tmbench_kernels import hopper

    prompts = [tuple(x.cuda() for x in make_qkv(length, dtype=torch.float16)) for length in (3000, 5000, 9001)]
    pattern = Triangle(8, 512, delta=64)
    pattern.attend(*prompts[0])
    before = hopper.load_kernel.cache_info().misses
    torch.cuda.set_sync_debug_mode("error")
    try:
        for q, k, v in prompts[1:]:
            pattern.attend(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hopper.load_kernel.cache_info().misses == before


@pytest.mark.gpu
@needs_hopper_host
@pytest.mark.parametrize("mode", ["carry", "recompute"])
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_the_whole_correction_on_hopper(make_structured_qkv, on_hopper, mode, dim, v_dim):
    """Triangle, dense rows and what they change, with and without learned sinks, in one piece and in a chunk."""
    q, k, v = (x.cuda() for x in make_structured_qkv(1500, heads=6, kv_heads=2, dim=dim, dtype=torch.bfloat16))
    v = v[..., :v_dim]
    pattern = Triangle(8, 100, 50, 64, mode)
    assert pattern.backend(q, k, v).name == "cuda-hopper"
    assert pattern.backend(q, k, v, softcap=3.0).name == "triton"
    for sinks in (None, torch.linspace(-1.0, 4.0, 6, device="cuda")):
        for start in (0, 333):
            expected = corrected(pattern, q[:, :, start:], k, v, sinks=sinks)
            out = pattern.attend(q[:, :, start:], k, v, sinks=sinks)
            assert (out - expected).square().mean().sqrt() < 0.01 * expected.square().mean().sqrt()


@needs_hopper_host
@pytest.mark.parametrize("seed", range(40))
def test_pieces_hold_every_key_of_every_row_once(seed):
    from tmbench_kernels.hopper import KEYS, WARPGROUP_ROWS
    from tmbench_kernels.triangle.delta.hopper_backend import pieces

    draw = random.Random(seed)
    length = draw.randint(1, 20000)
    rows = rows_of(draw.randrange(length), length, draw.choice([1, 16, 64, 100]), draw.choice(["carry", "recompute"]))
    groups, workers = draw.choice([1, 3, 4]), draw.choice([2, 3])
    if not rows.count:
        pytest.skip("no dense row in this chunk")
    taken: Counter[tuple[int, int]] = Counter()
    found = pieces(rows, groups, draw.choice([1, 8]), workers, draw.choice([1, 132]))
    for piece in found:
        assert piece.low % KEYS == 0
        for unit in range(max(piece.unit - workers + 1, 0), piece.unit + 1):
            last = rows.position(min((unit // groups + 1) * WARPGROUP_ROWS, rows.count) - 1)
            taken.update((unit, tile) for tile in range(piece.low // KEYS, -(-min(piece.high, last + 1) // KEYS)))
    expected = {
        (row // WARPGROUP_ROWS * groups + head, tile)
        for row in range(rows.count) for head in range(groups) for tile in range(rows.position(row) // KEYS + 1)
    }  # fmt: skip
    assert taken == Counter(expected)
    assert len({(piece.unit, piece.split) for piece in found}) == len(found)
    assert [piece.high - piece.low for piece in found] == sorted((one.high - one.low for one in found), reverse=True)


@needs_hopper_host
@pytest.mark.parametrize(("length", "start"), [(131072, 0), (65536, 0), (32768, 0), (131072, 122880), (65536, 57344)])
def test_pieces_keep_all_multiprocessors_of_an_h200_busy(length, start):
    """32 heads of which 4 share a key head, whole and by the chunk: the last multiprocessor is done soon after the first."""
    from tmbench_kernels.triangle.delta.hopper_backend import pieces

    ends = [0] * 132
    for piece in pieces(rows_of(start, length - 128, 64, "carry"), 4, 8, 3, 132):
        for _ in range(8):
            heapq.heapreplace(ends, ends[0] + piece.high - piece.low)
    assert max(ends) < 1.05 * sum(ends) / 132


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40 if GPU else 8))
def test_differences_are_carried_in_triton_as_in_torch(make_qkv, seed):
    from tmbench_kernels.triangle.delta.triton_backend import carry

    draw = random.Random(seed)
    length, v_dim = draw.randint(1, 500), draw.choice([16, 40, 64])
    start, delta = draw.choice([0, draw.randint(0, 300)]), draw.choice([1, 7, 64, 100])
    rows = rows_of(start, start + length, delta, "carry")
    device = "cuda" if GPU else "cpu"
    x, _, _ = make_qkv(length + 9, heads=3, kv_heads=1, dim=v_dim, batch=2, dtype=torch.float16, seed=seed)
    differences, _, _ = make_qkv(rows.count, heads=3, kv_heads=1, dim=v_dim, batch=2, seed=seed + 100)
    x, differences = x.to(device), differences.to(device)
    expected = x.clone()
    carry_in_torch(expected[:, :, :length], differences, rows)
    carry(x[:, :, :length], differences, rows)
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_what_no_split_has_written_is_not_combined(make_qkv):
    from tmbench_kernels.triangle.combine import combine

    device = "cuda" if GPU else "cpu"
    out = torch.randn(2, 1, 5, 3, 16, device=device)
    lse = torch.randn(2, 1, 5, 3, device=device)
    lse[1, :, 2:] = -torch.inf
    out[1, :, 2:] = torch.nan
    combined = torch.empty(1, 5, 3, 16, device=device).transpose(1, 2)
    combine(out, lse, combined, None)
    torch.testing.assert_close(combined[:, :, 2:], out[0, :, 2:].transpose(1, 2))
    weights = lse.mul(0.6931471805599453).softmax(dim=0)[..., None]
    torch.testing.assert_close(combined[:, :, :2], (weights * out).sum(dim=0)[:, :2].transpose(1, 2))


def test_whatever_runs_is_named(make_qkv, monkeypatch):
    q, k, v = make_qkv(300)
    pattern = Triangle(delta=64)
    assert pattern.backend(q, k, v).name == "torch-banded"
    assert correction.rows_backend(q, k, v).name == "torch"
    for name, expected in (("triton", "torch-banded+triangle:triton"), ("torch-banded", "torch-banded")):
        other = replace(correction.ROWS_BACKENDS[1], name=name, devices=("cpu",), missing=lambda: "", refuses=lambda *_: "")
        monkeypatch.setattr(correction, "ROWS_BACKENDS", (correction.ROWS_BACKENDS[0], other, correction.ROWS_BACKENDS[2]))
        assert pattern.backend(q, k, v).name == expected
    with pytest.raises(ValueError, match="^under delta=64 an output is of several softmaxes and has no log-sum-exp"):
        pattern.attend_lse(q, k, v)


def test_values_that_mean_nothing_are_refused():
    assert Triangle(delta=64) == Triangle(delta=64, mode="carry")
    for values, words in (
        ({"delta": 0}, "^delta must be 1 or more, not 0"),
        ({"mode": "carry"}, "^mode carry says what delta does, which is not given: add delta=64"),
        ({"delta": 64, "mode": "both"}, "^mode both is unknown: choose from carry, recompute"),
    ):
        with pytest.raises(ValueError, match=words):
            Triangle(**values)
