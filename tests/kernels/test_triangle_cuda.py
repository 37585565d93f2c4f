"""The kernels for CUDA: in Triton's interpreter where there is no GPU, and as compiled where there is one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tmbench_kernels import Triangle

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = {backend.name: backend for backend in Triangle.backends}


@pytest.fixture(params=["triton", pytest.param("cuda-hopper", marks=pytest.mark.gpu)])
def attend(request, make_qkv, assert_as_torch, monkeypatch):
    """``attend(pattern, length, ...)`` checks one case against float64 and returns the output; memory is poisoned."""
    from tmbench_kernels.triangle import splits, triton_backend

    backend = BACKENDS[request.param]

    def check(pattern, length, *, scale=None, change=lambda q, k, v: (q, k, v), **shape):
        q, k, v = change(*(x.to(DEVICE) for x in make_qkv(length, **{"dtype": torch.float16} | shape)))
        if GPU and (reason := backend.obstacle(pattern, q, k, v)):
            pytest.skip(reason)
        out = backend.attend(pattern, q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        assert_as_torch(out, q, k, v, pattern.mask(q, k), scale)
        return out

    def split_from(length):
        monkeypatch.setattr(splits, "ONE_LAUNCH", length)
        forget()

    def forget():
        splits.schedule_for.cache_clear()
        if GPU:
            from tmbench_kernels.triangle import hopper_backend

            hopper_backend._launch.cache_clear()

    attend: Any = check
    attend.split_from = split_from
    attend.multiprocessors = lambda n: monkeypatch.setattr(triton_backend, "multiprocessors", lambda device: n)
    yield attend
    forget()


COUNTS = (0, 1, 3, 8, 16, 17, 63, 64, 65, 128, 200, 512, 700)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(120 if GPU else 12))
def test_any_sizes(attend, seed):
    """Lengths, splits of the pattern and shapes that are no multiple of anything."""
    draw = random.Random(seed)
    attend.split_from(draw.choice([0, 4096]))
    if not GPU:
        attend.multiprocessors(draw.choice([1, 4, 64]))
    longest = 3000 if GPU else 200
    length = draw.choice([1, 2, 63, 64, 65, 127, 129, draw.randint(1, longest), longest + 1])
    pattern = Triangle(draw.choice(COUNTS), draw.choice(COUNTS), draw.choice((*COUNTS, 5000)))
    groups, kv_heads = draw.choice([1, 2, 3, 4, 5, 7, 8]), draw.choice([1, 2])
    dim, dtype = draw.choice([64, 96, 128]), draw.choice([torch.float16, torch.bfloat16])
    if not GPU:
        dtype = torch.float16  # the interpreter rounds bfloat16 towards zero, which no GPU does
    shape = {"heads": groups * kv_heads, "kv_heads": kv_heads, "dim": dim, "batch": draw.choice([1, 2])}
    attend(pattern, length, dtype=dtype, seed=seed, **shape)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 96, 128, 192, 256])
def test_head_sizes(attend, dim):
    attend.split_from(0)
    attend(Triangle(5, 70, 40), 200, heads=2, kv_heads=1, dim=dim)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_any_sizes_of_wide_heads(attend, seed):
    draw = random.Random(seed)
    attend.split_from(draw.choice([0, 4096]))
    pattern = Triangle(draw.choice(COUNTS), draw.choice(COUNTS), draw.choice((*COUNTS, 5000)))
    dim, v_dim = draw.choice([(192, 128), (256, 256), (136, 200), (64, 256), (192, 192)])
    groups, kv_heads = draw.choice([1, 2, 4, 7]), draw.choice([1, 2])
    shape = {"heads": groups * kv_heads, "kv_heads": kv_heads, "batch": draw.choice([1, 2])}
    attend(pattern, draw.randint(1, 3000), dim=dim, v_dim=v_dim, dtype=torch.bfloat16, seed=seed, **shape)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 6, 16, 20, 71])
def test_group_sizes(attend, groups):
    attend(Triangle(5, 40, 20), 150, heads=groups, kv_heads=1, dim=64)


@pytest.mark.slow
def test_values_of_another_width(attend):
    attend(Triangle(5, 40, 20), 150, change=lambda q, k, v: (q, k, v[..., :32]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.contiguous(), k.contiguous(), v.contiguous()),
        lambda q, k, v: tuple(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)),
        lambda q, k, v: tuple(torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]] for x in (q, k, v)),
        lambda q, k, v: (q[:, :1].expand_as(q), k[:, :, :1].expand_as(k), v),
        lambda q, k, v: tuple(x.repeat(1, 1, 2, 1)[:, :, ::2] for x in (q, k, v)),
    ],
    ids=["heads first", "dim not last", "not aligned", "expanded", "every other row"],
)
def test_any_strides(attend, change):
    attend(Triangle(5, 70, 40), 150, change=change)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 1e-3, 0.0, -0.2])
def test_scales(attend, scale):
    attend(Triangle(5, 70, 40), 200, scale=scale)


@pytest.mark.slow
def test_queries_without_keys_give_zeros(attend):
    out = attend(Triangle(0, 0, 20), 200)
    assert not out[:, :, :180].any()


@pytest.mark.slow
def test_one_softmax_over_sinks_and_window(attend):
    """A sink that outweighs the window by e^60 in some heads, and a window that outweighs the sinks in the others."""

    def change(q, k, v):
        q[..., 0], k[:, :, 3, 0], k[:, 1, :, 1] = 30.0, 16.0, 0.0
        return q, k, v

    attend(Triangle(8, 64, 16), 260, change=change)


def test_the_last_rows_are_split_so_that_no_part_outlasts_the_rest():
    from tmbench_kernels.triangle.triton_backend import schedule_for

    for heads, kv_heads, length in [(32, 8, 131072), (4, 1, 131072), (8, 8, 20000), (1, 1, 1_000_000)]:
        schedule = schedule_for(Triangle(), 1, heads, kv_heads, length, positions=32, keys=64, overhead=3, slots=132)
        steps = schedule.head_tiles * (schedule.band_tiles * schedule.band_steps + schedule.last_tiles * (length // 64))
        assert schedule.split_keys * schedule.splits >= length > schedule.split_keys * (schedule.splits - 1)
        assert schedule.split_keys / 64 <= 1.5 * steps / 132 or schedule.splits == 64


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda-hopper"])
def test_a_length_past_32_bits_of_elements(backend):
    """More than 2^31 elements of q: the rows beyond them are right, and so are those before."""
    from tmbench_kernels.reference import masked_attention

    length, heads = 560_000, 32
    q = torch.randn(1, length, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(1, length, 1, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    assert q.numel() > 2**31
    pattern = Triangle()
    out = BACKENDS[backend].attend(pattern, q, k, v, 128**-0.5)
    for rows in (torch.arange(0, 700, 50), torch.arange(530_000, 530_640, 80), torch.arange(length - 200, length, 40)):
        rows = rows.cuda()
        mask = pattern.attends(rows[:, None], torch.arange(length, device="cuda"), length)
        exact = masked_attention(q[:, :4, rows], k, v, mask, dtype=torch.float32)
        torch.testing.assert_close(out[:, :4, rows].float(), exact, atol=2e-3, rtol=2e-2)


@pytest.mark.gpu
def test_nothing_is_compiled_again_for_another_prompt_or_pattern():
    from tmbench_kernels import hopper
    from tmbench_kernels.triangle import combine, triton_backend

    def run(length, pattern):
        q, k, v = (torch.randn(1, n, length, 64, device="cuda", dtype=torch.float16) for n in (4, 2, 2))
        for backend in BACKENDS.values():
            if backend.name != "torch-banded" and not backend.obstacle(pattern, q, k, v):
                backend.attend(pattern, q, k, v, 0.125)

    def compiled():
        kernels = (triton_backend._walk, combine._combine)
        return [
            *(sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels),
            hopper.load_kernel.cache_info().misses,
        ]

    run(5000, Triangle(8, 512, 128))
    before = compiled()
    for length, pattern in [(5001, Triangle(8, 512, 128)), (8192, Triangle(3, 64, 1)), (16384, Triangle(16, 1000, 77))]:
        run(length, pattern)
    assert compiled() == before
