"""Attention of new tokens over a cache: torch against its definition, Triton's kernel against torch."""

from __future__ import annotations

import pytest
import torch

from tmbench_kernels.decode import attend_with_kvcache, torch_backend
from tmbench_kernels.pattern import new_lse
from tmbench_kernels.reference import masked_attention, masked_lse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def backend(name):
    if name == "torch":
        return torch_backend.attend
    from tmbench_kernels.decode import triton_backend

    return triton_backend.attend


def case(make_qkv, lengths, capacity, **shape):
    """New tokens' q, k and v, caches of these lengths, and what each sequence must yield, in float64."""
    q, k, v = (x.to(DEVICE) for x in make_qkv(capacity, batch=len(lengths), **shape))
    scale = q.shape[-1] ** -0.5
    places = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
    new, expected = [], []
    for one, length in enumerate(lengths):
        k_cache[one, :, :length], v_cache[one, :, :length] = k[one, :, :length], v[one, :, :length]
        new.append([x[one : one + 1, :, length : length + 1] for x in (q, k, v)])
        seen = torch.ones(1, length + 1, dtype=torch.bool, device=DEVICE)
        keys, values = (x[one : one + 1, :, : length + 1] for x in (k, v))
        expected.append(masked_attention(new[-1][0], keys, values, seen, scale=scale).transpose(1, 2))
    new_q, new_k, new_v = (torch.cat(parts) for parts in zip(*new, strict=True))
    return (new_q, new_k, new_v), k_cache, v_cache, places, scale, torch.cat(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (9, 3, 64), (8, 1, 40), (32, 2, 128), (2, 2, 256)])
@pytest.mark.parametrize("lengths", [[0], [700], [0, 1, 63, 64, 65, 511]])
def test_each_sequence_sees_its_own_keys_and_the_new_one(make_qkv, name, heads, kv_heads, dim, lengths):
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": torch.float16}
    new, k_cache, v_cache, places, scale, expected = case(make_qkv, lengths, 701, **shape)
    out = backend(name)(*new, k_cache, v_cache, places, scale)
    assert out.shape == (len(lengths), 1, heads, dim)
    assert out.is_contiguous()
    assert (out.double() - expected).square().mean().sqrt() <= 0.005 * expected.square().mean().sqrt()
    for one, length in enumerate(lengths):
        assert torch.equal(k_cache[one, :, length], new[1][one, :, 0])
        assert torch.equal(v_cache[one, :, length], new[2][one, :, 0])
        assert not k_cache[one, :, length + 1 :].any(), "nothing else is written"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("window", [1, 2, 16, 33, 200, 400])
def test_a_window_hides_all_keys_before_it(make_qkv, name, window):
    lengths = [0, 1, 15, 16, 199, 340]
    new, k_cache, v_cache, places, scale, _ = case(make_qkv, lengths, 341, heads=4, kv_heads=2, dtype=torch.float16)
    lse = new_lse(new[0])
    out = backend(name)(*new, k_cache, v_cache, places, scale, lse=lse, window=window)
    token = torch.arange(341, device=DEVICE)
    for one, length in enumerate(lengths):
        seen = ((token <= length) & (token > length - window))[None]
        parts = new[0][one : one + 1], k_cache[one : one + 1], v_cache[one : one + 1]
        expected = masked_attention(*parts, seen, scale=scale).transpose(1, 2)
        assert (out[one : one + 1].double() - expected).square().mean().sqrt() <= 0.005 * expected.square().mean().sqrt()
        torch.testing.assert_close(
            lse[one : one + 1].double(), masked_lse(*parts[:2], seen, scale=scale).double(), atol=2e-3, rtol=1e-3
        )


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_any_scale(make_qkv, scale):
    (q, k, v), k_cache, v_cache, places, _, _ = case(make_qkv, [130, 7], 200, dtype=torch.float16)
    expected = torch_backend.attend(q, k, v, k_cache.clone(), v_cache.clone(), places, scale)
    got = backend("triton")(q, k, v, k_cache, v_cache, places, scale)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("capacity", [90, 1500])
def test_caps_and_log_sum_exps(make_qkv, name, softcap, capacity):
    """Over splits, of which some sequences leave all but the first empty."""
    lengths = [0, 1, 71, capacity - 1]
    q, k, v = (x.to(DEVICE) for x in make_qkv(capacity, batch=4, heads=4, kv_heads=2, dtype=torch.float16))
    places = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    token = places.long()[:, None, None, None]
    new_q, new_k, new_v = (x.gather(2, token.expand(-1, x.shape[1], 1, x.shape[3])) for x in (q, k, v))
    k_cache, v_cache = k.clone(), v.clone()
    lse = new_lse(new_q)
    out = backend(name)(new_q, new_k, new_v, k_cache, v_cache, places, 0.3, softcap=softcap, lse=lse)
    mask = (torch.arange(capacity, device=DEVICE) <= places[:, None])[:, None, None]
    logits = {"scale": 0.3, "softcap": softcap}
    torch.testing.assert_close(lse.double(), masked_lse(new_q, k, mask, **logits), atol=2e-4, rtol=1e-5)
    exact = masked_attention(new_q, k, v, mask, **logits).transpose(1, 2)
    torch.testing.assert_close(out.double(), exact, atol=3e-3, rtol=3e-3)
    sinks = torch.tensor([-3.0, 0.5, 4.0, 90.0], device=DEVICE)
    out = attend_with_kvcache(new_q, new_k, new_v, k_cache, v_cache, places, 0.3, softcap=softcap, sinks=sinks)
    exact = masked_attention(new_q, k, v, mask, **logits, sinks=sinks).transpose(1, 2)
    torch.testing.assert_close(out.double(), exact, atol=3e-3, rtol=3e-3)


def test_sinks_that_are_not_one_for_each_head_are_refused():
    x = torch.zeros(1, 2, 1, 8)
    cache = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="sinks must be one number for each of 2 query heads"):
        attend_with_kvcache(x, x, x, cache, cache, torch.zeros(1, dtype=torch.int32), 1.0, sinks=torch.zeros(3))


def test_tokens_one_by_one_are_the_causal_attention_of_the_text(make_qkv):
    """In float32, exactly what a pass over the whole text yields up to rounding."""
    q, k, v = (x.to(DEVICE) for x in make_qkv(40, batch=2))
    k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
    places = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    steps = []
    for token in range(40):
        one = slice(token, token + 1)
        steps.append(attend_with_kvcache(q[:, :, one], k[:, :, one], v[:, :, one], k_cache, v_cache, places, 0.125))
        places += 1
    causal = torch.ones(40, 40, dtype=torch.bool, device=DEVICE).tril()
    expected = masked_attention(q, k, v, causal, scale=0.125).transpose(1, 2)
    torch.testing.assert_close(torch.cat(steps, 1).double(), expected, atol=1e-5, rtol=1e-5)


def test_splits_are_as_many_as_the_device_has_room_for():
    from tmbench_kernels.decode.triton_backend import splits_for

    assert splits_for(4, 8, 131072, 8 * 132) == 33
    assert splits_for(64, 8, 131072, 8 * 132) == 2
    assert splits_for(256, 8, 131072, 8 * 132) == 1
    assert splits_for(1, 1, 131072, 8 * 132) == 128, "as many as are combined at once"
    assert splits_for(1, 8, 256, 8 * 132) == 4, "short caches need no more"
    assert splits_for(1, 8, 20, 8 * 132) == 1
