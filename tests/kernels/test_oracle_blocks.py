"""The oracle of key blocks, against exact attention in float64 that is sorted block by block."""

import math

import numpy as np
import pytest
import torch

from tmbench_kernels import BlockTopK, Dense, FlashPrefill, FlexPrefill, OracleBlocks, ParameterError, XAttention
from tmbench_kernels.oracle_blocks import Like
from tmbench_kernels.reference import masked_lse

B = 128
SHARES = [0.3, 0.7, 0.95]
OTHERS = [
    FlashPrefill(alpha=0.6, sinks=1, window=1, last=1),
    XAttention(threshold=0.6),
    FlexPrefill(gamma=0.5, min_budget=128),
]
CHUNKS = [(1, 0), (700, 0), (1024, 1023), (1101, 1000), (500, 133), (640, 512)]


def exact_mass(q, k, scale, start):
    """What the queries of each block give to each key block, float64 ``[q_blocks, k_blocks]``."""
    blocks = math.ceil(len(k) / B)
    mass = np.zeros((blocks - start // B, blocks))
    for i in range(start, len(k)):
        logits = k[: i + 1] @ q[i - start] * scale
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        for c in range(i // B + 1):
            mass[i // B - start // B, c] += weights[c * B : (c + 1) * B].sum()
    return mass


def fewest(held, share):
    """The fewest blocks of a row that hold a share, heaviest first."""
    chosen, total = set(), 0.0
    for c in sorted(range(len(held)), key=lambda n: (-held[n], n)):
        if total >= share * held.sum():
            break
        chosen.add(c)
        total += held[c]
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("length", "start"), CHUNKS)
def test_the_fewest_blocks_that_hold_the_share(make_qkv, make_structured_qkv, share, length, start):
    for make, scale in ((make_structured_qkv, 0.3), (make_qkv, 1.0)):
        q, k, _ = make(length, heads=4, kv_heads=2, dim=32, seed=length)
        q = q[:, :, start:]
        chosen = OracleBlocks(share).select(q, k, scale=scale).to_map()[0]
        for h in range(4):
            mass = exact_mass(q[0, h].double().numpy(), k[0, h // 2].double().numpy(), scale, start)
            rule = OracleBlocks(share).rule(q[0, h], k[0, h // 2], scale)
            for r, held in enumerate(mass):
                expected = fewest(held[: start // B + r + 1], share)
                assert set(chosen[h, r].nonzero().flatten().tolist()) == expected
                assert set(rule[r].nonzero().flatten().tolist()) == expected


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS, ids=repr)
@pytest.mark.parametrize(("length", "start"), CHUNKS)
def test_at_the_density_of_another_no_choice_holds_more(make_structured_qkv, other, length, start):
    """As many pairs, and of all sets of as many blocks one that holds most; never less than the other's own."""
    q, k, _ = make_structured_qkv(length, seed=length)
    q = q[:, :, start:]
    oracle = OracleBlocks(like=Like(other))
    chosen, others = (pattern.select(q, k, scale=0.3).to_map() for pattern in (oracle, other))
    assert torch.equal(oracle.select(q, k, scale=0.3).mask(), oracle.mask(q, k, scale=0.3))
    assert oracle.pairs(q, k, scale=0.3) == other.pairs(q, k, scale=0.3)
    assert torch.equal(chosen.sum(3), others.sum(3))
    for h in range(4):
        mass = exact_mass(q[0, h].double().numpy(), k[0, h // 2].double().numpy(), 0.3, start)
        for r, held in enumerate(mass):
            own = start // B + r
            best, own_kept = chosen[0, h, r, :own], others[0, h, r, own]
            assert chosen[0, h, r, own] == own_kept
            heaviest = np.sort(held[:own])[::-1][: int(best.sum())].sum()
            assert held[:own][best.numpy()].sum() == pytest.approx(heaviest, rel=1e-5)
            assert held[chosen[0, h, r].numpy()].sum() >= held[others[0, h, r].numpy()].sum() - 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [OracleBlocks(0.8), OracleBlocks(like=Like(OTHERS[0]))], ids=str)
@pytest.mark.parametrize("queries", [1, 200, 333])
def test_attention_and_its_sums_are_exact(make_structured_qkv, assert_exact, pattern, queries):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = make_structured_qkv(333, heads=2, kv_heads=1, batch=2, dtype=dtype)
        q = q[:, :, -queries:]
        mask = pattern.mask(q, k, scale=0.3)
        assert pattern.pairs(q, k, scale=0.3) == int(mask.sum())
        assert mask.any(3).all()
        assert_exact(pattern.attend(q, k, v, scale=0.3), q, k, v, mask, 0.3)
        assert_exact(pattern.last_row(q, k, v, scale=0.3), q[:, :, -1:], k, v, mask[:, :, -1:], 0.3)
    out, lse = pattern.attend_lse(q.float(), k.float(), v.float(), softcap=3.0)
    mask = pattern.mask(q.float(), k.float())
    assert_exact(out, q.float(), k.float(), v.float(), mask, softcap=3.0)
    torch.testing.assert_close(lse.double(), masked_lse(q.float(), k.float(), mask, softcap=3.0), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_chunks_that_end_on_the_edges_of_blocks_give_the_rows_of_one_piece(make_structured_qkv):
    q, k, _ = make_structured_qkv(1000)
    for pattern in (OracleBlocks(0.8), OracleBlocks(like=Like(OTHERS[0])), OracleBlocks(like=Like(OTHERS[1]))):
        whole = pattern.mask(q, k, scale=0.3)
        for start, end in ((0, 384), (384, 512), (512, 1000)):
            part = pattern.of_chunk(end, 1000).mask(q[:, :, start:end], k[:, :, :end], scale=0.3)
            assert torch.equal(part, whole[:, :, start:end, :end])


@pytest.mark.slow
def test_the_whole_share_is_dense(make_qkv):
    q, k, v = make_qkv(900, batch=2)
    assert OracleBlocks(1).pairs(q, k) == Dense().pairs(q, k)
    torch.testing.assert_close(OracleBlocks(1).attend(q, k, v), Dense().attend(q, k, v))


def test_what_it_is_like_reads_back_as_it_is_written():
    for text in ("flashprefill", "xattention:stride=8:threshold=0.8", "flex-prefill: gamma=0.9"):
        assert Like.read(str(Like.read(text))) == Like.read(text)
    assert Like.read("xattention:stride=8").pattern == XAttention(stride=8)
    assert str(Like.read("flashprefill")) == "flashprefill:alpha=0.1"
    for text, words in (
        ("minference", "^like minference is unknown: choose from flashprefill, flexprefill, xattention$"),
        ("flashprefill:gamma=1", "^like: flashprefill has no parameter 'gamma': it has alpha$"),
        ("xattention:stride=8:stride=16", "^like: xattention's stride is given twice: leave one of them out$"),
        ("flashprefill:alpha=3", "^like: flashprefill's alpha must be between 0 and 1, not 3"),
    ):
        with pytest.raises(ParameterError, match=words):
            Like.read(text)


def test_a_share_and_a_density_exclude_each_other():
    assert OracleBlocks() == OracleBlocks(0.95)
    assert OracleBlocks(like=Like(FlashPrefill())).p is None
    with pytest.raises(ValueError, match="p and like both say how many blocks to take: give one of them"):
        OracleBlocks(0.5, Like(FlashPrefill()))
    for share in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match="p must be above 0 and at most 1"):
            OracleBlocks(share)
    assert BlockTopK().untimed == ""
    assert OracleBlocks().untimed
