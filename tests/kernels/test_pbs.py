"""PBS-Attn's rule, written a second time key by key in float64, against the definition; attention against masked softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tmbench_kernels import PBS, Dense, pbs, scores
from tmbench_kernels.block_sparse import lists
from tmbench_kernels.pbs import merge, sorted_tokens
from tmbench_kernels.reference import masked_lse

B = 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = [PBS(256, 0.6), PBS(128, 0.9), PBS(384, 0.3)]
CHUNKS = [(1, 0), (256, 0), (1100, 1099), (1024, 512), (900, 133)]


def seen_keys(q, k, scale, pattern, start):
    """The keys of every query from ``start`` on, as sets of positions, chosen in float64."""
    length, size = len(k), pattern.segment
    whole = length // size * size
    importance = np.zeros(whole)
    last = q[-B:]
    for query in last:
        weights = np.exp(k[:whole] @ query * scale)
        importance += weights / max(weights.sum(), 1e-300) / len(last)
    order = []
    for first in range(0, whole, size):
        order += sorted(range(first, first + size), key=lambda n: (-importance[n], n))
    blocks = [order[n : n + B] for n in range(0, whole, B)]
    found = []
    for i in range(start, length):
        own = i // size * size
        mine = q[max(i // B * B - start, 0) : (i // B + 1) * B - start].mean(0)
        before = blocks[: own // B]
        weights = [math.exp(k[block].mean(0) @ mine * scale) for block in before]
        keys, held = set(range(own, i + 1)), 0.0
        for n in sorted(range(len(before)), key=lambda n: (-weights[n], n)):
            if held < pattern.score * sum(weights) or 0 in before[n]:
                keys |= set(before[n])
            held += weights[n]
        found.append(keys)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize(("length", "start"), CHUNKS)
def test_the_published_rule(make_qkv, make_structured_qkv, pattern, length, start):
    for make, scale in ((make_structured_qkv, 0.3), (make_qkv, 1.0)):
        q, k, _ = make(length, heads=2, kv_heads=1, dim=32, seed=length)
        q = q[:, :, start:]
        mask = pattern.mask(q, k, scale=scale)
        assert pattern.pairs(q, k, scale=scale) == int(mask.sum())
        for h in range(2):
            expected = seen_keys(q[0, h].double().numpy(), k[0, 0].double().numpy(), scale, pattern, start)
            assert [set(row.nonzero().flatten().tolist()) for row in mask[0, h]] == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize(("length", "start"), [(256, 0), (400, 0), (650, 133)])
def test_attention_and_its_sums_are_exact(make_structured_qkv, assert_exact, pattern, length, start, dtype):
    q, k, v = make_structured_qkv(length, dtype=dtype, seed=length)
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


def test_the_patterns_of_these_tests_are_sparse(make_structured_qkv):
    """And sorting is what makes them so: heavy keys come first in their segment."""
    q, k, _ = make_structured_qkv(1100)
    for pattern in PATTERNS:
        assert 0.3 < pattern.pairs(q, k) / Dense().pairs(q, k) < 0.99
    order = PBS(256).sort(q, k, 0.2)
    assert order.shape == (1, 4, 1024)
    for n in range(4):
        assert torch.equal(order[0, 0, n * 256 : (n + 1) * 256].sort().values, torch.arange(n * 256, (n + 1) * 256))


@pytest.mark.slow
def test_the_whole_score_and_a_single_segment_are_dense(make_qkv):
    q, k, v = make_qkv(900, batch=2)
    for pattern in (PBS(128, 1), PBS(1024)):
        assert pattern.pairs(q, k) == Dense().pairs(q, k)
        torch.testing.assert_close(pattern.attend(q, k, v), Dense().attend(q, k, v))


@pytest.mark.slow
@pytest.mark.parametrize(("length", "start"), [(400, 0), (390, 133)])
def test_with_the_kernel_for_lists(make_structured_qkv, assert_exact, length, start):
    """Triton's, interpreted where there is no GPU."""
    q, k, v = (x.to(DEVICE) for x in make_structured_qkv(length, heads=2, kv_heads=1, dtype=torch.float16))
    q, pattern = q[:, :, start:], PBS(128, 0.5)
    (backend,) = (backend for backend in PBS.backends if backend.name == "triton")
    assert_exact(backend.attend(pattern, q, k, v, 0.3), q, k, v, pattern.mask(q, k, scale=0.3), 0.3)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run in any case")
@pytest.mark.parametrize("start", [0, 333])
def test_kernels_do_not_change_order_blocks_or_output(make_structured_qkv, monkeypatch, start):
    """Of all steps that Triton takes over on a GPU, interpreted."""
    q, k, v = make_structured_qkv(700, heads=2, kv_heads=1, dtype=torch.float16)
    q, pattern = q[:, :, start:], PBS(128, 0.5)

    def chosen():
        order = pattern.sort(q, k, 0.3)
        keys = sorted_tokens(k, order)
        return order, keys, pattern.lists(q, keys, 0.3, order).to_map(), pattern.attend(q, k, v, scale=0.3)

    *expected, out = chosen()
    for module in (pbs, scores, lists):
        monkeypatch.setattr(module, "runs_triton", lambda device: True)
    for module in (pbs, scores):
        monkeypatch.setattr(module, "triton_serves", lambda x: True)
    *found, again = chosen()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    torch.testing.assert_close(again, out)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 40), (2, 2, 64)])
@pytest.mark.parametrize("whole", [256, 640])
def test_tokens_are_sorted_in_triton_as_in_torch(make_qkv, heads, kv_heads, dim, whole):
    from tmbench_kernels.pbs import triton_backend

    x = make_qkv(700, heads=heads, kv_heads=kv_heads, dim=dim, batch=2, dtype=torch.float16)[1]
    order = torch.rand(2, heads, whole).argsort(-1)
    out = x.new_empty(2, heads, 700, dim, device=DEVICE)
    triton_backend.sorted_tokens(x.to(DEVICE), order.to(DEVICE), out)
    assert torch.equal(out.cpu(), sorted_tokens(x, order))
    assert torch.equal(
        out[:, -1].cpu(), torch.cat([x[:, -1].gather(1, order[:, -1, :, None].expand(-1, -1, dim)), x[:, -1, whole:]], 1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dim", [24, 64])
def test_two_softmaxes_are_made_one_in_triton_as_in_torch(make_qkv, dim):
    from tmbench_kernels.pbs import triton_backend

    out, others, _ = make_qkv(200, heads=3, kv_heads=3, dim=dim, batch=2, dtype=torch.float16)
    lse, others_lse = 5 * torch.randn(2, 3, 200), 5 * torch.randn(2, 3, 200)
    others_lse[:, :, :50] = -torch.inf
    others[:, :, :50] = 0
    got = tuple(x.to(DEVICE, copy=True) for x in (out, lse, others, others_lse))
    triton_backend.merge(*got)
    weights = torch.stack([lse, others_lse]).double().softmax(0)
    expected = weights[0, ..., None] * out.double() + weights[1, ..., None] * others.double()
    merge(out, lse, others, others_lse)
    assert torch.equal(got[1][:, :, :50].cpu(), lse[:, :, :50])
    torch.testing.assert_close(got[1].cpu(), lse, rtol=1e-5, atol=1e-5)
    for found in (got[0].cpu(), out):
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


def test_both_parts_are_named(make_qkv):
    assert PBS().backend(*make_qkv(600)).name == "torch-blocks+pbs:torch"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segment": 0}, "segment must be a multiple of 128, not 0"),
        ({"segment": 100}, "segment must be a multiple of 128, not 100"),
        ({"score": 0}, "score must be above 0 and at most 1, not 0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        PBS(**values)
