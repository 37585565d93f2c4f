"""Dense attention of few queries behind many keys: by splits of their keys, as exact as in one walk over them."""

from __future__ import annotations

import pytest
import torch

from tmbench_kernels import Dense
from tmbench_kernels.dense import few_queries
from tmbench_kernels.pattern import new_lse
from tmbench_kernels.reference import masked_lse
from tmbench_kernels.triangle import splits

GPU = torch.cuda.is_available()
BACKENDS = {backend.name: backend for backend in Dense.backends}


pytestmark = pytest.mark.usefixtures("running_sums_on_a_gpu")


@pytest.fixture
def short(monkeypatch):
    """Short prompts count as long ones, and their keys are split."""
    for module in (few_queries, splits):
        monkeypatch.setattr(module, "ONE_LAUNCH", 0)
    monkeypatch.setattr(few_queries, "multiprocessors", lambda device: 132)
    splits.schedule_for.cache_clear()
    yield
    splits.schedule_for.cache_clear()


@pytest.fixture
def check(assert_as_torch):
    """``check(backend, q, k, v)``: output and log-sum-exp are the definition's, as near as the type allows."""

    def check(backend, q, k, v):
        mask, lse = Dense().mask(q, k), new_lse(q)
        out = backend.attend(Dense(), q, k, v, q.shape[-1] ** -0.5, lse=lse)
        assert_as_torch(out, q, k, v, mask)
        torch.testing.assert_close(lse.double(), masked_lse(q, k, mask), rtol=1e-3, atol=1e-3)

    return check


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="interprets Triton")
@pytest.mark.parametrize("queries", [1, 7, 64, 100])
def test_the_kernel_in_triton_splits_their_keys(short, check, make_structured_qkv, monkeypatch, queries):
    from tmbench_kernels.triangle import triton_backend

    made = []
    monkeypatch.setattr(triton_backend, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(
        triton_backend, "schedule_for", lambda *about, **sizes: made.append(splits.schedule_for(*about, **sizes)) or made[-1]
    )
    q, k, v = make_structured_qkv(700, batch=2, dtype=torch.float16)
    check(BACKENDS["triton"], q[:, :, -queries:], k, v)
    (schedule,) = made
    assert (schedule.last_n, schedule.band_tiles) == (queries, 0)
    assert schedule.splits > 1


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (256, 256), (192, 128)])
@pytest.mark.parametrize(("queries", "length"), [(1, 4097), (64, 4200), (64, 70001), (500, 9001), (1000, 9001)])
def test_on_a_gpu_it_is_the_kernel_for_hopper(check, make_structured_qkv, queries, length, dim, v_dim):
    q, k, v = make_structured_qkv(length, heads=8, kv_heads=2, dim=dim, dtype=torch.bfloat16)
    q, k, v = q.cuda()[:, :, -queries:], k.cuda(), v.cuda()[..., :v_dim]
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    backend = Dense().backend(q, k, v, lse=True)
    assert backend.name == "cuda-hopper"
    check(backend, q, k, v)
    check(BACKENDS["triton"], q, k, v)


def test_many_queries_or_few_keys_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(few_queries, "multiprocessors", lambda device: 132)
    q, k = (torch.empty(3, 32, tokens, 16, device="meta") for tokens in (200, 5000))
    assert few_queries.many(q, k) == "takes queries of fewer than 132 tiles of 128, not 192"
    assert few_queries.many(q[:2], k) == ""
    assert few_queries.many(q[:2], k, of=2) == "takes queries of fewer than 66 tiles of 128, not 128"
    assert few_queries.many(q[:1], k) == ""
    assert few_queries.many(q[:1], k[:, :, :4096]) == "takes more than 4096 keys, not 4096"


@pytest.mark.parametrize(
    ("queries", "groups", "busy"), [(1, 4, 0.9), (64, 4, 0.9), (500, 4, 0.9), (64, 1, 0.9), (2000, 4, 0.9)]
)
def test_splits_leave_few_slots_idle(queries, groups, busy):
    """Of what a GPU of 132 multiprocessors could do until the last split ends, so much is done, at 128K tokens."""
    length, keys, slots = 131072, 64, 132
    made = splits.schedule_for(
        few_queries.Triangle(0, 0, queries), 1, 32, 32 // groups, length,
        positions=192 // groups, keys=keys, overhead=2, slots=slots, queries=queries,
    )  # fmt: skip
    programs = made.head_tiles * made.last_tiles * made.splits
    rounds = -(-programs // slots)
    tiles = made.head_tiles * made.last_tiles * length // keys
    assert tiles / (slots * rounds * (made.split_keys // keys + 2)) > busy
    assert made.split_keys * made.splits >= length
