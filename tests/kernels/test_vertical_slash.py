"""MInference's rule, written a second time in plain Python, against the selection, the definition and the backend."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import Dense, VerticalSlash
from tmbench_kernels.vertical_slash import Selection, runs, selection_mask
from tmbench_kernels.vertical_slash import torch_backend as backend


def published_selection(q, k, columns, distances, scale, start=0):
    """One head's queries from ``start`` on, in float64, one query and one key at a time: the two sets as sorted lists."""
    length = len(k)
    vertical, slash = [0.0] * length, [0.0] * length
    for i in range(max(length - 64, start), length):
        logits = np.array([float(q[i] @ k[j]) * scale for j in range(i + 1)])
        weights = np.exp(logits - logits.max())
        for j, p in enumerate(weights / weights.sum()):
            vertical[j] += p
            slash[i - j] += p
    vertical[:30] = [float("inf")] * min(30, length)
    slash[:100] = [float("inf")] * min(100, length)

    def best(scores, count):
        return sorted(sorted(range(length), key=lambda n: (-scores[n], n))[:count])

    return best(vertical, min(length, max(columns, 30))), best(slash, min(length, max(distances, 50)))


def published_keys(columns, distances, row_block):
    """The converter, literally: one scan over descending distances and ascending columns. Keys may lie in the future."""
    end_of_block = 64 * row_block + 64
    ends = [max(end_of_block - s, 64) for s in sorted(distances, reverse=True) if s < end_of_block]
    start, stop = ends[0] - 64, ends[0]
    blocks: list[int] = []
    pending, kept = sorted(columns), []
    for end in [*ends[1:], None]:
        if end is None or end > stop + 64:
            while pending and pending[0] < stop:
                column = pending.pop(0)
                if column < start:
                    kept.append(column)
            blocks += range(start, stop)
            if end is not None:
                start, stop = end - 64, end
        elif end > stop:
            stop += 64
    assert len(set(blocks)) == len(blocks)
    return {*blocks, *kept}


def published_mask(columns, distances, length):
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        keys = [j for j in published_keys(columns, distances, i // 64) if j <= i]
        mask[i, keys] = True
    return mask


def random_selection(length, heads, density, seed):
    """Sets that a search could return: distance 0 is always there; sparse sets leave gaps between runs."""
    random = torch.Generator().manual_seed(seed)
    columns = torch.rand(1, heads, length, generator=random) < density
    distances = torch.rand(1, heads, length, generator=random) < density
    distances[..., 0] = True
    return Selection(columns, distances)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "budget"), [(1, (5, 5)), (40, (35, 60)), (150, (0, 0)), (331, (60, 130)), (260, (31, 180))]
)
def test_selection_follows_the_published_rule(make_qkv, length, budget):
    q, k, _ = make_qkv(length, heads=4, kv_heads=2, dim=16)
    chosen = VerticalSlash((budget,)).select(q, k, scale=0.4)
    for h in range(4):
        head = q[0, h].double().numpy(), k[0, h // 2].double().numpy()
        columns, distances = published_selection(*head, budget[0], budget[1], 0.4)
        assert chosen.columns[0, h].nonzero().flatten().tolist() == columns
        assert chosen.distances[0, h].nonzero().flatten().tolist() == distances


@pytest.mark.slow
@pytest.mark.parametrize(("length", "start"), [(331, 330), (331, 300), (260, 100), (260, 192), (600, 450)])
def test_a_chunk_selects_by_its_last_queries(make_qkv, length, start):
    q, k, _ = make_qkv(length, heads=2, kv_heads=1, dim=16)
    pattern = VerticalSlash(((35, 60),))
    part = q[:, :, start:]
    chosen, mask = pattern.select(part, k, scale=0.4), pattern.mask(part, k, scale=0.4)
    for h in range(2):
        columns, distances = published_selection(q[0, h].double().numpy(), k[0, 0].double().numpy(), 35, 60, 0.4, start)
        assert chosen.columns[0, h].nonzero().flatten().tolist() == columns
        assert chosen.distances[0, h].nonzero().flatten().tolist() == distances
        assert torch.equal(mask[0, h], published_mask(columns, distances, length)[start:])
    assert pattern.pairs(part, k, scale=0.4) == int(mask.sum())


def test_each_head_has_its_own_budget(make_qkv):
    q, k, _ = make_qkv(500, heads=4, batch=2)
    chosen = VerticalSlash(((0, 0), (40, 120), (200, 100), (9999, 9999))).select(q, k)
    assert chosen.columns.sum(2).tolist() == [[30, 40, 200, 500]] * 2
    assert chosen.distances.sum(2).tolist() == [[50, 120, 100, 500]] * 2
    assert chosen.columns[..., :30].all()
    assert chosen.distances[0, 0].nonzero().flatten().tolist() == list(range(50))
    assert chosen.distances[0, 2].nonzero().flatten().tolist() == list(range(100))


def test_ties_go_to_the_smaller_index(make_qkv):
    q, k, _ = make_qkv(400, heads=1, kv_heads=1)
    chosen = VerticalSlash(((50, 130),)).select(torch.zeros_like(q), k)
    assert chosen.columns[0, 0].nonzero().flatten().tolist() == list(range(50))
    assert chosen.distances[0, 0].nonzero().flatten().tolist() == list(range(130))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.sampled_from([0.002, 0.01, 0.03, 0.3]), st.integers(0, 2**16))
def test_definition_and_converter_follow_the_published_converter(length, density, seed):
    chosen = random_selection(length, 1, density, seed)
    columns, distances = (x[0, 0].nonzero().flatten().tolist() for x in (chosen.columns, chosen.distances))
    assert torch.equal(selection_mask(chosen)[0, 0], published_mask(columns, distances, length))
    blocks = -(-length // 64)
    seen = runs.visible_keys(chosen.columns, chosen.distances, 0, blocks)[0, 0]
    for block in range(blocks):
        expected = {j for j in published_keys(columns, distances, block) if j < min(64 * block + 64, length)}
        assert set(seen[block].nonzero().flatten().tolist()) == expected
    first = blocks // 2
    later = runs.visible_keys(chosen.columns, chosen.distances, first, blocks)
    assert torch.equal(later[0, 0], seen[first:])


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 1200), st.sampled_from([0.001, 0.01, 0.1, 0.9]), st.sampled_from([0.0, 1.2, 1e9]), st.integers(0, 99))
def test_attention_on_given_indices(make_qkv, assert_exact, length, density, small_block_cost, seed):
    """0 forces blocks one by one, 1e9 whole strips; the middle one is what is used."""
    q, k, v = make_qkv(length, heads=4, kv_heads=2, dim=16, seed=seed)
    chosen = random_selection(length, 4, density, seed)
    chosen.distances[:, 1] = True
    mask = selection_mask(chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "SMALL_BLOCK_COST", small_block_cost)
        out = backend.attend_selected(q, k, v, chosen.columns, chosen.distances, 0.25)
        patch.setattr(runs, "COUNTED", 4)
        pairs = runs.count_pairs(chosen.columns, chosen.distances)
    assert_exact(out, q, k, v, mask, 0.25)
    assert pairs == int(mask.sum())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "batch"), [(4, 4, 64, 1), (2, 1, 96, 2), (3, 1, 128, 1)])
@pytest.mark.parametrize("length", [1, 333, 640])
def test_shapes_and_types(make_qkv, assert_exact, dtype, heads, kv_heads, dim, batch, length):
    q, k, v = make_qkv(length, heads=heads, kv_heads=kv_heads, dim=dim, batch=batch, dtype=dtype)
    pattern = VerticalSlash(((35, 104),))
    mask = pattern.mask(q, k)
    assert_exact(pattern.attend(q, k, v), q, k, v, mask)
    assert pattern.pairs(q, k) == int(mask.sum())


def test_a_full_budget_is_dense(make_qkv):
    q, k, v = make_qkv(700, batch=2)
    pattern = VerticalSlash(((700, 700),))
    assert pattern.pairs(q, k) == Dense().pairs(q, k)
    torch.testing.assert_close(pattern.attend(q, k, v), Dense().attend(q, k, v))


def test_the_scale_decides_the_selection(make_qkv):
    q, k, _ = make_qkv(600)
    pattern = VerticalSlash(((40, 110),))
    assert not torch.equal(pattern.mask(q, k, scale=0.01), pattern.mask(q, k, scale=2.0))


@pytest.mark.parametrize("budgets", [(), ((1, 2, 3),), ((-1, 5),), ((5, 2.5),), ((30, 100), (True, 100))])
def test_malformed_budgets_are_refused(budgets):
    with pytest.raises(ValueError, match="budgets"):
        VerticalSlash(budgets)


def test_budgets_for_another_number_of_heads_are_refused(make_qkv):
    with pytest.raises(ValueError, match="budgets for 3 heads, but q has 4"):
        VerticalSlash(((30, 100),) * 3).attend(*make_qkv(10))


@pytest.mark.slow
@pytest.mark.parametrize("gaps", [[(700, 850)], [(1030, 1100), (300, 364)], [(1100, 1400)], []])
@pytest.mark.parametrize("length", [1400, 1500])
def test_keys_that_most_blocks_see_go_without_a_bias(make_qkv, assert_exact, monkeypatch, gaps, length):
    """A bias for every pair would take longer than dense attention; some queries see none of what is left over."""
    biased, with_lse = [], backend.with_lse

    def attend(q, part, *rest, **asked):
        # One row for a block of queries hides nothing of its own keys.
        rows = 0 if part.bias is None or part.bias.stride(2) == 0 else part.bias.shape[2]
        biased.append(rows * part.k.shape[0] * part.k.shape[2])
        return with_lse(q, part, *rest, **asked)

    monkeypatch.setattr(backend, "with_lse", attend)
    q, k, v = make_qkv(length, heads=2, kv_heads=1, dim=16)
    columns, distances = (torch.zeros(1, 2, length, dtype=torch.bool) for _ in range(2))
    columns[..., [3, 200, 640]] = True
    distances[...] = True
    for low, high in gaps:
        distances[:, 1, low:high] = False
    out = backend.attend_selected(q, k, v, columns, distances, 0.25)
    mask = selection_mask(Selection(columns, distances))
    assert_exact(out, q, k, v, mask, scale=0.25)
    assert bool(biased) == bool(gaps)
    assert sum(biased) <= 0.1 * int(mask[0, 1].sum())


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1.0, 6.0, 40.0])
def test_heavy_keys_that_a_block_does_not_see(make_qkv, assert_exact, monkeypatch, weight):
    """They are attended to with those that most blocks see and taken out again, or the block is attended for anew."""
    taken, anew = [], []
    monkeypatch.setattr(backend, "_take_out", lambda head, strip, f=backend._take_out: taken.append(strip) or f(head, strip))
    monkeypatch.setattr(backend, "_anew", lambda head, block, f=backend._anew: anew.append(block) or f(head, block))
    q, k, v = make_qkv(2048, heads=1, kv_heads=1, dim=16)
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, 700:760, 0] = weight
    columns, distances = (torch.zeros(1, 1, 2048, dtype=torch.bool) for _ in range(2))
    distances[...] = True
    distances[..., 500:640] = False
    mask = selection_mask(Selection(columns, distances))
    out = backend.attend_selected(q, k, v, columns, distances, 0.25)
    assert taken
    assert any(strip.hidden.any() for strip in taken)
    assert bool(anew) == (weight > 1)
    assert_exact(out, q, k, v, mask, scale=0.25)
