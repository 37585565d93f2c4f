"""The backward pass that adds up sections, against autograd over the whole attention matrix."""

from __future__ import annotations

import pytest
import torch

from tmbench_kernels import MEASURES, SECTIONS, Dense, DenseProbe, Sections, section_gradients

SMALL = Sections(3, 7, 5)


def section(i, j, length, sections):
    """The section of a pair by its definition."""
    if j < sections.n_init or i - j < sections.n_local:
        return "streaming"
    return "last" if i >= length - sections.last_n else "middle"


def drawn(heads, kv_heads, length, dtype=torch.float64, v_dim=8):
    generator = torch.Generator().manual_seed(length)
    shapes = ((heads, 8), (kv_heads, 8), (kv_heads, v_dim))
    q, k, v = (torch.randn(2, h, length, d, dtype=torch.float64, generator=generator).to(dtype) for h, d in shapes)
    return q, k, v, torch.randn(2, heads, length, v_dim, dtype=torch.float64, generator=generator).to(dtype)


def by_hand(q, k, v, grad_out, sections, scale):
    """Sums and gradients by autograd, with every logit and probability a tensor of its own."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    length = q.shape[2]
    logits = (q @ k.repeat_interleave(groups, 1).transpose(-1, -2)) * scale
    logits = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    logits.retain_grad()
    p = logits.softmax(-1)
    p.retain_grad()
    (p @ v.repeat_interleave(groups, 1)).backward(grad_out.double())
    sums = torch.zeros(*q.shape[:2], len(SECTIONS), len(MEASURES), dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            place = sums[:, :, SECTIONS.index(section(i, j, length, sections))]
            ds, dp = logits.grad[:, :, i, j], p.grad[:, :, i, j]
            place += torch.stack([ds.abs(), ds, dp.abs(), dp], -1)
    return q.grad, k.grad, v.grad, sums


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "sections"),
    [
        (4, 2, 37, SMALL),
        (3, 3, 40, Sections(0, 9, 0)),
        (4, 1, 33, Sections(6, 0, 4)),
        (2, 1, 29, Sections(1, 1, 28)),
        (2, 2, 11, Sections(50, 2, 3)),
        (2, 1, 13, Sections(2, 90, 60)),
        (2, 1, 1, SMALL),
    ],
)
@pytest.mark.parametrize("elements", [1, 90, 2**20])
def test_sums_and_gradients_are_those_of_autograd(heads, kv_heads, length, sections, elements, monkeypatch):
    monkeypatch.setitem(section_gradients._BLOCK_ELEMENTS, "cpu", elements)
    q, k, v, grad_out = drawn(heads, kv_heads, length, v_dim=5)
    got = section_gradients.section_gradients(q, k, v, grad_out, sections, scale=0.4)
    for mine, theirs in zip(got, by_hand(q, k, v, grad_out, sections, 0.4), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_added_up_in_float32(dtype):
    q, k, v, grad_out = drawn(4, 2, 75, dtype)
    *grads, sums = section_gradients.section_gradients(q, k, v, grad_out, SMALL, scale=0.4)
    *expected, exact = by_hand(q, k, v, grad_out, SMALL, 0.4)
    torch.testing.assert_close(sums, exact, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(grads, expected, strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error < (0.005 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("sections", [SMALL, Sections(0, 4, 0), Sections(5, 0, 9), Sections(8, 512, 128), Sections(0, 0, 3)])
@pytest.mark.parametrize("length", [1, 6, 23])
def test_sections_cover_the_triangle_once(sections, length):
    labels = sections.labels(length)
    for i in range(length):
        for j in range(length):
            expected = -1 if j > i else SECTIONS.index(section(i, j, length, sections))
            assert labels[i, j] == expected
    assert sections.pairs(length) == tuple(int((labels == n).sum()) for n in range(3))


def test_a_probe_attends_as_dense_does_and_records_once():
    q, k, v, grad_out = drawn(4, 2, 41)
    records: list[torch.Tensor] = []
    q.requires_grad_()
    out = DenseProbe(sections=SMALL, record=records.append).attend(q, k, v)
    torch.testing.assert_close(out, Dense().attend(q.detach(), k, v))
    assert records == []
    out.backward(grad_out)
    torch.testing.assert_close(records, [by_hand(q.detach(), k, v, grad_out, SMALL, 8**-0.5)[3]])


def test_blocks_never_hold_more_than_their_room():
    """Unless one row alone does."""
    for heads, length, last_n in ((1, 5000, 128), (8, 3001, 0), (4, 700, 900)):
        blocks = list(section_gradients._blocks(heads, length, last_n, torch.device("cpu")))
        assert [start for start, _ in blocks[1:]] == [end for _, end in blocks[:-1]]
        assert (blocks[0][0], blocks[-1][1]) == (0, length)
        room = section_gradients._BLOCK_ELEMENTS["cpu"]
        assert all(heads * (end - start) * end <= room * 1.01 or end - start == 1 for start, end in blocks)
        assert last_n >= length or any(start == length - last_n for start, _ in blocks) or last_n == 0


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, grad_out = drawn(4, 2, 9)
    with pytest.raises(ValueError, match="gradient of the output must be"):
        section_gradients.section_gradients(q, k, v, grad_out[:, :, 1:], SMALL)
    with pytest.raises(ValueError, match="cannot share"):
        section_gradients.section_gradients(q[:, :3], k, v, grad_out[:, :3], SMALL)
    with pytest.raises(ValueError, match="n_local must be 0 or more, not -1"):
        Sections(8, -1, 128)
