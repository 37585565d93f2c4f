"""What the selections of key blocks are made of."""

import pytest
import torch

from tmbench_kernels import scores as block_scores
from tmbench_kernels.scores import block_means, heaviest, heaviest_count, largest, products, tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_grouped_heads_are_not_rounded(make_qkv, dtype):
    a, b, _ = make_qkv(9, heads=6, kv_heads=2, dim=40, batch=2, dtype=dtype)
    out = products(a, b)
    assert out.dtype == torch.float32
    for h in range(6):
        expected = a[:, h].double() @ b[:, h // 3].double().transpose(1, 2)
        torch.testing.assert_close(out[:, h].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_means_of_blocks(make_qkv, length):
    _, x, _ = make_qkv(length, batch=2, dtype=torch.bfloat16)
    expected = [x[:, :, first : first + 4].double().mean(2) for first in range(0, length, 4)]
    torch.testing.assert_close(block_means(x, 4).double(), torch.stack(expected, dim=2), rtol=1e-5, atol=1e-6)


def test_the_largest_and_ties():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert largest(scores, 2).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert largest(scores, 9).all()
    assert not largest(scores, 0).any()
    counts = torch.tensor([1, 3])
    assert largest(scores, counts).tolist() == [[False, True, False, False], [True, True, True, False]]


def test_the_heaviest_and_ties():
    shares = torch.tensor([[0.25, 0.125, 0.25, 0.25, 0.125], [0.0, 0.75, 0.0, 0.0, 0.25]])
    assert heaviest(shares, 0.5).tolist() == [[True, False, True, False, False], [False] * 5]
    assert heaviest(shares, 0.9).tolist() == [[True, True, True, True, False], [False, True, False, False, False]]
    assert heaviest(shares, 1.0).all(), "zeros as well"
    assert heaviest_count(shares, 0.5).tolist() == [2, 0]


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (12, 12), (6, 1), (8, 4)])
@pytest.mark.parametrize("most", [1, 2, 5, 7, 20, 70, 10**6])
def test_tiles_cover_everything_once_and_fit(monkeypatch, heads, kv_heads, most):
    monkeypatch.setattr(block_scores, "TILE_ELEMENTS", most * 3)
    groups, blocks = heads // kv_heads, 11
    seen = []
    for some, kv, rows in tiles(heads, kv_heads, blocks, 3):
        q_heads, k_heads = range(*some.indices(heads)), range(*kv.indices(kv_heads))
        assert len(q_heads) * len(rows) <= most
        assert len(q_heads) % len(k_heads) == 0
        width = len(q_heads) // len(k_heads)
        assert [k_heads[n // width] for n in range(len(q_heads))] == [h // groups for h in q_heads]
        seen += [(h, row) for h in q_heads for row in rows]
    assert sorted(seen) == [(h, row) for h in range(heads) for row in range(blocks)]
