"""Block lists: what they say, how many pairs they stand for, and attention over lists that no pattern selected."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmbench_kernels import BlockLists, Dense
from tmbench_kernels.block_sparse import torch_backend as backend
from tmbench_kernels.block_sparse.lists import block_count


def random_map(length, heads, density, seed, *, block=128, batch=1):
    """Any set of blocks: the own one may be absent, rows may be empty, and blocks may lie in the future."""
    blocks = block_count(length, block)
    return torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < density


def brute_mask(block_map, length, block):
    blocks = block_map.tolist()
    mask = torch.zeros(*block_map.shape[:2], length, length, dtype=torch.bool)
    for b, heads in enumerate(blocks):
        for h, rows in enumerate(heads):
            for i in range(length):
                mask[b, h, i, [j for j in range(i + 1) if rows[i // block][j // block]]] = True
    return mask


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 500), st.sampled_from([16, 64, 128]), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_lists_are_ascending_and_hold_each_block_of_the_map_once(length, block, density, seed):
    block_map = random_map(length, 3, density, seed, block=block, batch=2)
    lists = BlockLists.from_map(block_map, length, block)
    assert (lists.counts.dtype, lists.indices.dtype) == (torch.int32, torch.int32)
    assert lists.counts.is_contiguous()
    assert lists.indices.is_contiguous()
    blocks = block_count(length, block)
    for b in range(2):
        for h in range(3):
            for r in range(blocks):
                entries = lists.indices[b, h, r].tolist()
                expected = [c for c in range(r + 1) if block_map[b, h, r, c]]
                assert entries[: lists.counts[b, h, r]] == expected
                others = [c for c in reversed(range(blocks)) if c not in expected]
                assert entries[lists.counts[b, h, r] :] == others, "what follows a list must be readable, too"
    assert torch.equal(lists.to_map(), block_map.tril())


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.sampled_from([16, 64, 128]), st.sampled_from([0.0, 0.2, 0.7, 1.0]), st.integers(0, 99))
def test_mask_and_pairs_against_loops(length, block, density, seed):
    block_map = random_map(length, 2, density, seed, block=block, batch=2)
    lists = BlockLists.from_map(block_map, length, block)
    expected = brute_mask(block_map, length, block)
    assert torch.equal(lists.mask(), expected)
    assert lists.pairs() == int(expected.sum())


def test_what_follows_a_list_is_not_read(make_qkv):
    q, k, v = make_qkv(700)
    lists = BlockLists.from_map(random_map(700, 4, 0.5, 1), 700)
    beyond = torch.arange(6) >= lists.counts[..., None]
    filled = BlockLists(lists.counts, lists.indices.masked_fill(beyond, 0), 700)
    assert torch.equal(filled.to_map(), lists.to_map())
    assert filled.pairs() == lists.pairs()
    assert torch.equal(filled.own_listed(), lists.own_listed())
    assert torch.equal(backend.attend_lists(q, k, v, filled, 0.3), backend.attend_lists(q, k, v, lists, 0.3))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 700),
    st.sampled_from([64, 128]),
    st.sampled_from([0.0, 0.15, 0.5, 0.95]),
    st.sampled_from([1, 2**14, 2**20]),
    st.integers(0, 99),
)
def test_attention_on_given_lists(make_qkv, assert_exact, length, block, density, gathered, seed):
    """The amount that is gathered at a time may cut anywhere; the second head is dense."""
    q, k, v = make_qkv(length, heads=4, kv_heads=2, dim=16, seed=seed)
    block_map = random_map(length, 4, density, seed, block=block)
    block_map[:, 1] = True
    lists = BlockLists.from_map(block_map, length, block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_GATHERED_ELEMENTS", {"cpu": gathered})
        out = backend.attend_lists(q, k, v, lists, 0.25)
    assert_exact(out, q, k, v, lists.mask(), 0.25)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "batch"), [(4, 4, 64, 1), (2, 1, 96, 2), (3, 1, 128, 1)])
@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 640])
def test_shapes_and_types(make_qkv, assert_exact, dtype, heads, kv_heads, dim, batch, length):
    q, k, v = make_qkv(length, heads=heads, kv_heads=kv_heads, dim=dim, batch=batch, dtype=dtype)
    lists = BlockLists.from_map(random_map(length, heads, 0.6, length, batch=batch), length)
    assert_exact(backend.attend_lists(q, k, v, lists, dim**-0.5), q, k, v, lists.mask())


def test_any_strides_and_values_of_another_width(make_qkv, assert_exact):
    q, k, v = make_qkv(300, dim=32)
    lists = BlockLists.from_map(random_map(300, 4, 0.6, 3), 300)
    expected = backend.attend_lists(q, k, v, lists, 0.2)
    for change in (torch.Tensor.contiguous, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(backend.attend_lists(change(q), change(k), change(v), lists, 0.2), expected)
    wide = torch.cat([q, q], dim=3)[..., ::2]
    assert_exact(backend.attend_lists(wide, k, v[..., :24], lists, 0.2), wide, k, v[..., :24], lists.mask(), 0.2)


def test_all_blocks_are_dense(make_qkv):
    q, k, v = make_qkv(500, batch=2)
    lists = BlockLists.from_map(torch.ones(2, 4, 4, 4, dtype=torch.bool), 500)
    assert lists.pairs() == Dense().pairs(q, k)
    torch.testing.assert_close(backend.attend_lists(q, k, v, lists, 0.1), Dense().attend(q, k, v, scale=0.1))


@pytest.mark.parametrize(
    ("counts", "indices", "length", "message"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, 3, dtype=torch.int32), 300, "int32"),
        (torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 3, 3), 300, "int32"),
        (
            torch.zeros(1, 2, 3, dtype=torch.int32),
            torch.zeros(1, 2, 3, 3, dtype=torch.int32),
            400,
            "400 tokens are 4 blocks",
        ),
        (torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 3, 2, dtype=torch.int32), 300, r"\(1, 2, 3, 2\)"),
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, 3, dtype=torch.int32), 300, r"\(2, 3\)"),
    ],
)
def test_tensors_that_are_no_lists_are_refused(counts, indices, length, message):
    with pytest.raises(ValueError, match=message):
        BlockLists(counts, indices, length)


def test_length_65536_takes_linear_memory():
    """Too long for anything quadratic: one head's logits alone would take 17 GB."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 65536, 32) for _ in range(3))
    block_map = torch.zeros(1, 1, 512, 512, dtype=torch.bool)
    block_map[..., 0] = True
    block_map |= torch.eye(512, dtype=torch.bool)
    lists = BlockLists.from_map(block_map, 65536)
    out = backend.attend_lists(q, k, v, lists, 0.2)
    for row in (0, 130, 40000, 65535):
        seen = sorted({*range(128), *range(row // 128 * 128, row + 1)} & set(range(row + 1)))
        weights = (q[0, 0, row].double() @ k[0, 0, seen].double().T * 0.2).softmax(0)
        torch.testing.assert_close(out[0, 0, row].double(), weights @ v[0, 0, seen].double(), atol=1e-5, rtol=1e-4)
    assert lists.pairs() == 512 * (128 * 129 // 2) + 511 * 128 * 128
