"""Delta correction: the rule written row by row in float64, its pairs, chunks, and the kernel for its dense rows."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import Dense, Triangle
from tmbench_kernels.reference import masked_attention, masked_lse
from tmbench_kernels.triangle.delta import attend_rows_in_torch

GPU = torch.cuda.is_available()
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
    softcap = draw.choice([0.0, 3.0])
    lse = q.new_empty(*q.shape[:2], rows.count, dtype=torch.float32)
    out = attend_rows(rows, q, k, v, 0.2, softcap=softcap, lse=lse)
    positions = torch.tensor(rows.positions(), device=q.device)
    mask = (torch.arange(length, device=q.device) <= positions[:, None])[None, None]
    size, error, plain_error = measure_errors(out, rows.take(q), k, v, mask, 0.2, softcap=softcap)
    assert error <= max(2 * plain_error, 1e-6 * size)
    exact = masked_lse(rows.take(q), k, mask, scale=0.2, softcap=softcap)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-4, atol=1e-3)
    sums = torch.empty_like(lse)
    plain = attend_rows_in_torch(rows, q, k, v, 0.2, softcap=softcap, lse=sums)
    torch.testing.assert_close(plain, out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(sums, lse, rtol=1e-4, atol=1e-3)


def test_whatever_runs_is_named(make_qkv, monkeypatch):
    q, k, v = make_qkv(300)
    pattern = Triangle(delta=64)
    assert pattern.backend(q, k, v).name == "torch-banded"
    monkeypatch.setattr("tmbench_kernels.triangle.rows_in_triton", lambda q, k, v: True)
    assert pattern.backend(q, k, v).name == "torch-banded+triangle:triton"
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
