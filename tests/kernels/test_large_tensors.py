"""Tensors of more than 2^31 elements: a head far behind the others is attended as it is alone. Small ones without a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tmbench_kernels import (
    PBS,
    BlockTopK,
    Dense,
    FlashPrefill,
    FlexPrefill,
    SkipSoftmax,
    Triangle,
    VerticalSlash,
    XAttention,
)

GPU = torch.cuda.is_available()
HEADS, LENGTH = (2304, 8192) if GPU else (8, 700)
DIM = 128 if GPU else 16
GROUP = 4
PATTERNS = [
    Dense(),
    Triangle(),
    Triangle(delta=64),
    VerticalSlash(((64, 128),)),
    FlexPrefill(),
    XAttention(),
    FlashPrefill(),
    BlockTopK(4),
    PBS(),
    SkipSoftmax(threshold=1e-3),
]


pytestmark = pytest.mark.usefixtures("running_sums_on_a_gpu")


def drawn(heads, apart):
    """``[1, heads, length, dim]``, heads by heads or tokens by tokens."""
    device, dtype = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
    shape = (1, heads, LENGTH, DIM) if apart else (1, LENGTH, heads, DIM)
    x = torch.randn(shape, device=device, dtype=dtype)
    return x if apart else x.transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("apart", [True, False], ids=["heads-apart", "tokens-apart"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_the_last_heads_are_attended_as_alone(pattern, apart):
    """Queries, keys and values alike, of a long row and of many: the last heads lie past what 32 bits count."""
    q, k, v = (drawn(HEADS, apart) for _ in range(3))
    assert not GPU or q.numel() > 2**31
    last = tuple(x[:, -GROUP:].clone() for x in (q, k, v))
    served = [one for one in pattern.backends if one.name.startswith("torch") != GPU and not one.obstacle(pattern, q, k, v)]
    ways = {one.name: partial(one.attend, pattern, scale=DIM**-0.5) for one in served}
    if getattr(pattern, "delta", None):
        # What one backend attends is not all of it.
        ways = {"all": pattern.attend}
    assert ways
    for name, attend in ways.items():
        alone, found = attend(*last).float(), attend(q, k, v)[:, -GROUP:].float()
        assert (found - alone).square().mean() < 1e-4 * alone.square().mean(), name
