"""The index of a vertical-slash selection against the definition: interpreted without a GPU, as compiled on one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import VerticalSlash, scores
from tmbench_kernels.vertical_slash import Selection, selection_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(columns, distances, start=0):
    from tmbench_kernels.vertical_slash.triton_index import build_index

    most_columns, most_distances = (int(x.sum(2).max()) for x in (columns, distances))
    return build_index(columns.to(DEVICE), distances.to(DEVICE), most_columns, most_distances, start)


def check(columns, distances, start=0):
    """An index must show every key of the definition once, and say nothing beyond what it counts."""
    index = build(columns, distances, start)
    batch, heads, length = columns.shape
    first_row = start // 64
    seen = torch.zeros(batch, heads, length - start, length + 64, dtype=torch.int8)
    kept, before, counts, starts = (x.cpu() for x in (index.kept, index.before, index.counts, index.starts))
    for b in range(batch):
        for h in range(heads):
            own = columns[b, h].nonzero().flatten()
            ordered = index.columns[b, h].cpu()
            assert ordered[: len(own)].tolist() == own.tolist()
            assert (ordered[len(own) :] == length).all()
            for row in range(counts.shape[2]):
                end = 64 * (first_row + row) + 64
                assert before[b, h, row] == (own < end).sum()
                assert not kept[b, h, row, before[b, h, row] :].any()
                assert kept[b, h, row].max() <= 1
                pieces = starts[b, h, row, : counts[b, h, row]].tolist()
                assert all(low + 64 <= high for low, high in pairwise(pieces))
                keys = seen[b, h, max(end - 64 - start, 0) : end - start]
                for low in pieces:
                    keys[:, low : low + 64] += 1
                keys[:, ordered[kept[b, h, row].bool()].long()] += 1
    seen = seen[..., :length].tril_(start)
    assert seen.max() <= 1
    assert torch.equal(seen.bool(), selection_mask(Selection(columns, distances), start))


@pytest.fixture
def sizes(monkeypatch):
    """``sizes(part, lanes, wide)``: as many parts, and as many rounds, as a long prompt takes."""
    from tmbench_kernels.vertical_slash import triton_index

    def change(part, lanes, wide):
        monkeypatch.setattr(triton_index, "PART", part)
        monkeypatch.setattr(triton_index, "LANES", lanes)
        monkeypatch.setattr(triton_index, "WIDE", wide)

    return change


DENSITIES = st.sampled_from([0.0, 0.002, 0.008, 0.015, 0.03, 0.1, 0.9])


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.one_of(st.sampled_from([1, 63, 64, 65, 128, 129]), st.integers(1, 1200)),
    st.floats(0, 1),
    st.tuples(DENSITIES, DENSITIES),
    st.tuples(st.sampled_from([64, 128, 1024]), st.sampled_from([2, 8, 128]), st.sampled_from([64, 256, 4096])),
    st.booleans(),
    st.integers(0, 999),
)
def test_any_sets_from_any_start(length, share, densities, given_sizes, has_zero, seed):
    from tmbench_kernels.vertical_slash import triton_index

    random = torch.Generator().manual_seed(seed)
    density = torch.tensor(densities)[:, None]
    columns = torch.rand(1, 2, length, generator=random) < density
    distances = torch.rand(1, 2, length, generator=random) < density.flip(0)
    distances[..., 0] |= has_zero
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("PART", "LANES", "WIDE"), given_sizes, strict=True):
            patch.setattr(triton_index, name, size)
        check(columns, distances, min(int(share * length), length - 1))


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 1, 700, 1337])
def test_walks_that_never_meet(start, sizes):
    """Gaps of 65 to 127 keys can keep walks of different remainders apart until the end."""
    sizes(128, 2, 256)
    columns, distances = (torch.zeros(1, 2, 1400, dtype=torch.bool) for _ in range(2))
    columns[..., ::7] = True
    distances[:, 0, ::97] = True
    distances[:, 1, ::65] = True
    distances[:, 1, ::130] = True
    check(columns, distances, start)


@pytest.mark.slow
def test_full_and_empty_sets(sizes):
    sizes(64, 2, 64)
    columns, distances = (torch.zeros(2, 2, 333, dtype=torch.bool) for _ in range(2))
    columns[0, 0] = True
    distances[0, 1] = True
    columns[1, 0, 332] = True
    distances[1, 1, 332] = True
    check(columns, distances, 70)


@pytest.mark.slow
def test_sets_that_lie_anywhere_in_memory():
    random = torch.Generator().manual_seed(2)
    columns, distances = ((torch.rand(300, 2, 2, generator=random) < 0.05).permute(1, 2, 0) for _ in range(2))
    distances[..., 0] = True
    check(columns, distances)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [900, 130])
def test_a_selection_without_sorting_is_that_by_sorting(make_structured_qkv, monkeypatch, queries):
    from tmbench_kernels import triton_heaviest

    pattern = VerticalSlash(((30, 50), (200, 120), (40, 300), (900, 900)))
    q, k, _ = make_structured_qkv(900, heads=4, kv_heads=2, batch=2)
    monkeypatch.setattr(scores, "runs_triton", lambda device: False)
    expected = pattern.select(q[:, :, -queries:], k)
    calls = []
    monkeypatch.setattr(scores, "runs_triton", lambda device: True)
    monkeypatch.setattr(scores, "triton_serves", lambda x: False)
    real = triton_heaviest.largest
    monkeypatch.setattr(triton_heaviest, "largest", lambda *given: calls.append(given) or real(*given))
    got = pattern.select(q[:, :, -queries:].to(DEVICE), k.to(DEVICE))
    assert len(calls) == 1
    if DEVICE == "cpu":
        assert torch.equal(got.columns, expected.columns)
        assert torch.equal(got.distances, expected.distances)
    columns, distances = pattern.counts(4, 900)
    assert got.columns.sum(2).tolist() == [list(columns)] * 2
    assert got.distances.sum(2).tolist() == [list(distances)] * 2


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_host(make_structured_qkv):
    pattern = VerticalSlash(((60, 300), (200, 120)))
    q, k, _ = (x.cuda() for x in make_structured_qkv(9001, heads=2, kv_heads=1, dtype=torch.bfloat16))
    pattern.index(q, k, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pattern.index(q[:, :, -130:], k, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("start", [0, 20000 - 300])
def test_a_long_prompt_on_a_gpu(start):
    random = torch.Generator().manual_seed(start)
    columns = torch.rand(1, 2, 20000, generator=random) < 0.01
    distances = torch.rand(1, 2, 20000, generator=random) < torch.tensor([0.05, 0.006])[:, None]
    distances[..., :100] = True
    if start:
        check(columns, distances, start)
        return
    # The whole mask takes gigabytes: it is enough to know that a chunk's rows are those of the whole.
    whole, chunk = build(columns, distances), build(columns, distances, 12345)
    rows = chunk.counts.shape[2]
    assert torch.equal(whole.counts[:, :, -rows:], chunk.counts)
    counted = torch.arange(chunk.starts.shape[3], device=DEVICE) < chunk.counts[..., None]
    assert torch.equal(whole.starts[:, :, -rows:][counted], chunk.starts[counted])
    assert torch.equal(whole.kept[:, :, -rows:], chunk.kept)
