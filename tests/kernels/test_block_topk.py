"""MInference's block-sparse rule, written a second time with its padding, against the definition."""

import numpy as np
import pytest
import torch

from tmbench_kernels import BlockTopK

B = 64


def published_blocks(q, k, count):
    """With a whole block of padding where the length is a multiple of 64, and of the sorted choice the causal part."""
    padding = B - len(k) % B
    q, k = (np.concatenate([x, np.zeros((padding, x.shape[1]))]).reshape(-1, B, x.shape[1]).mean(1) for x in (q, k))
    blocks = len(k)
    count = min(count, blocks)
    chosen = []
    for r in range(blocks):
        scores = [float(q[r] @ k[c]) if c <= r else -np.inf for c in range(blocks)]
        best = sorted(sorted(range(blocks), key=lambda n: (-scores[n], n))[:count])
        chosen.append(set(best[: min(r + 1, count)]))
    return chosen


@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("length", [1, 64, 65, 500, 640, 1000])
def test_definition_and_selection_follow_the_published_rule(make_qkv, make_structured_qkv, count, length):
    for make in (make_qkv, make_structured_qkv):
        q, k, _ = make(length, heads=4, kv_heads=2, dim=32, seed=length)
        pattern = BlockTopK(count)
        chosen = pattern.select(q, k).to_map()
        blocks = -(-length // B)
        for h in range(4):
            expected = published_blocks(q[0, h].double().numpy(), k[0, h // 2].double().numpy(), count)[:blocks]
            assert [set(row.nonzero().flatten().tolist()) for row in chosen[0, h]] == expected
            rule = pattern.rule(q[0, h], k[0, h // 2], 1.0)
            assert [set(row.nonzero().flatten().tolist()) for row in rule] == expected


@pytest.mark.parametrize(("length", "start"), [(640, 639), (640, 600), (1000, 100), (1000, 512), (70, 50)])
def test_a_chunk_chooses_as_a_prompt_whose_earlier_queries_are_zeros(make_structured_qkv, length, start):
    """The published code fills up its blocks with zeros, so that a cut block has the mean of what is there."""
    q, k, _ = make_structured_qkv(length, heads=2, kv_heads=1, dim=32, seed=length)
    q[:, :, :start] = 0
    pattern = BlockTopK(3)
    chosen = pattern.select(q[:, :, start:], k).to_map()
    for h in range(2):
        expected = published_blocks(q[0, h].double().numpy(), k[0, 0].double().numpy(), 3)[start // B : -(-length // B)]
        assert [set(row.nonzero().flatten().tolist()) for row in chosen[0, h]] == expected
        rule = pattern.rule(q[0, h, start:], k[0, 0], 1.0)
        assert [set(row.nonzero().flatten().tolist()) for row in rule] == expected


def test_nothing_is_forced_and_ties_go_to_the_earlier_block():
    x = torch.zeros(1, 1, 640, 8)
    chosen = BlockTopK(2).select(x, x).to_map()[0, 0]
    assert chosen[9].nonzero().flatten().tolist() == [0, 1]


def test_no_blocks_are_refused():
    with pytest.raises(ValueError, match="blocks must be at least 1, not 0"):
        BlockTopK(0)
