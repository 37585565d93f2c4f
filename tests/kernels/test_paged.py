"""Chunks of prompts over a paged cache: any cut of ragged batches gives the rows of whole prompts, by the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import Triangle
from tmbench_kernels.triangle.paged import Chunk, attend_paged

HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 16, 24
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
counts = st.one_of(st.integers(0, 12), st.integers(13, 200))


class Cache:
    """A cache of shuffled slots for several prompts; whatever was not written is not a number."""

    def __init__(self, prompts, *, device="cpu", dtype=torch.float32, seed=0):
        """``prompts`` are their q, k and v, each ``[1, heads, length, dim]``."""
        self.prompts = prompts
        longest = max(k.shape[2] for _, k, _ in prompts)
        shuffled = torch.randperm(len(prompts) * longest + 7, generator=torch.Generator().manual_seed(seed))
        self.slots = shuffled[: len(prompts) * longest].view(len(prompts), longest).to(torch.int32).to(device)
        self.k, self.v = (
            torch.full((len(shuffled), KV_HEADS, width), torch.nan, dtype=dtype, device=device) for width in (DIM, V_DIM)
        )

    def write(self, row, start, end):
        for cache, x in ((self.k, self.prompts[row][1]), (self.v, self.prompts[row][2])):
            cache[self.slots[row, start:end].long()] = x[0, :, start:end].transpose(0, 1)

    def step(self, pattern, cuts, **options):
        """Write the rows that ``cuts`` names, {row: (start, end)}, and attend them in one batch."""
        for row, (start, end) in cuts.items():
            self.write(row, start, end)
        chunks = [Chunk(row, start, end, self.prompts[row][0].shape[2]) for row, (start, end) in cuts.items()]
        q = torch.cat([self.prompts[row][0][0, :, start:end].transpose(0, 1) for row, (start, end) in cuts.items()])
        out = attend_paged(pattern, q, self.k, self.v, self.slots, chunks, **options)
        assert out.is_contiguous()
        return dict(zip(cuts, out.split([end - start for start, end in cuts.values()]), strict=True))


def in_chunks(cache, pattern, chunk, **options):
    """Each prompt's output ``[1, heads, length, v_dim]``, all fed in steps of ``chunk`` rows of each."""
    parts: list[list[torch.Tensor]] = [[] for _ in cache.prompts]
    done = [0] * len(parts)
    while cuts := {
        row: (start, min(start + chunk, q.shape[2]))
        for row, ((q, _, _), start) in enumerate(zip(cache.prompts, done, strict=True))
        if start < q.shape[2]
    }:
        for row, out in cache.step(pattern, cuts, **options).items():
            parts[row].append(out)
            done[row] = cuts[row][1]
    return [torch.cat(part).transpose(0, 1)[None] for part in parts]


def prompts_of(make_qkv, lengths, *, device="cpu", dtype=torch.float32):
    shape = {"heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "v_dim": V_DIM, "dtype": dtype}
    return [tuple(x.to(device) for x in make_qkv(length, seed=length, **shape)) for length in lengths]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    chunk=st.integers(16, 250),
    n_init=counts, n_local=counts, last_n=counts,
)  # fmt: skip
def test_any_chunks_give_the_rows_of_whole_prompts(make_qkv, assert_exact, lengths, chunk, n_init, n_local, last_n):
    cache = Cache(prompts_of(make_qkv, lengths))
    pattern = Triangle(n_init, n_local, last_n)
    for (q, k, v), out in zip(cache.prompts, in_chunks(cache, pattern, chunk), strict=True):
        assert_exact(out, q, k, v, pattern.mask(q, k))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caps_sinks_and_scales(make_qkv, assert_exact, device, dtype):
    cache = Cache(prompts_of(make_qkv, (300, 170), device=device, dtype=dtype), device=device, dtype=dtype)
    options = {"scale": 0.3, "softcap": 2.0, "sinks": torch.linspace(-1, 1, HEADS, device=device)}
    pattern = Triangle(4, 30, 20)
    for (q, k, v), out in zip(cache.prompts, in_chunks(cache, pattern, 100, **options), strict=True):
        assert_exact(out, q, k, v, pattern.mask(q, k), **options)


def test_the_band_reads_sinks_and_window_alone(make_qkv):
    (prompt,) = prompts_of(make_qkv, (400,))
    cache, pattern = Cache([prompt]), Triangle(8, 50, 30)
    cache.write(0, 0, 8)
    cache.write(0, 200 - 49, 200)
    out = cache.step(pattern, {0: (200, 300)})[0]
    assert out.isfinite().all(), "what lies between was never written, and is not a number"
    assert Chunk(0, 200, 300, 400).keys(pattern) == 8 + 49 + 100
    assert Chunk(0, 300, 371, 400).keys(pattern) == 371, "one of the last rows sees all keys"


def test_padding_is_zero_and_chunks_fit_their_rows(make_qkv):
    (prompt,) = prompts_of(make_qkv, (40,))
    cache = Cache([prompt])
    cache.write(0, 0, 40)
    q = torch.cat([prompt[0][0].transpose(0, 1), torch.full((3, HEADS, DIM), torch.nan)])
    out = attend_paged(Triangle(2, 8, 4), q, cache.k, cache.v, cache.slots, [Chunk(0, 0, 40, 40)])
    assert not out[40:].any()
    assert out[:40].isfinite().all()
    with pytest.raises(ValueError, match="the chunks have 40 rows, and q has 39"):
        attend_paged(Triangle(), q[:39], cache.k, cache.v, cache.slots, [Chunk(0, 0, 40, 40)])


@pytest.mark.parametrize("cut", [(5, 5, 9), (-1, 5, 9), (3, 10, 9)])
def test_what_is_no_chunk_is_refused(cut):
    with pytest.raises(ValueError, match="are no chunk of a prompt of 9 tokens"):
        Chunk(0, *cut)
