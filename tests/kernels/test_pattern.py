"""What all patterns share: the checks of shapes, the choice of a backend, and the oracle itself."""

import math
import re

import pytest
import torch

from tmbench_kernels import (
    Backend,
    BlockTopK,
    Dense,
    FlashPrefill,
    FlexPrefill,
    Triangle,
    VerticalSlash,
    XAttention,
)
from tmbench_kernels.reference import masked_attention

PATTERNS = [Dense(), Triangle(), VerticalSlash(), FlexPrefill(), XAttention(), FlashPrefill(), BlockTopK()]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("q", "k", "v", "reason"),
    [
        ((1, 4, 9, 16), (1, 2, 8, 16), (1, 2, 8, 16), "9 queries cannot be the last of 8 keys"),
        ((2, 4, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16), "differ"),
        ((1, 4, 8, 16), (1, 2, 8, 32), (1, 2, 8, 32), "differ"),
        ((1, 4, 8, 16), (1, 3, 8, 16), (1, 3, 8, 16), "share"),
        ((1, 4, 8, 16), (1, 2, 8, 16), (1, 2, 7, 16), "must be"),
        ((4, 8, 16), (2, 8, 16), (2, 8, 16), "must be"),
    ],
)
def test_refuses_shapes_that_are_no_prefill(pattern, q, k, v, reason):
    with pytest.raises(ValueError, match=reason):
        pattern.attend(torch.zeros(q), torch.zeros(k), torch.zeros(v))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_refuses_mixed_types(pattern):
    x = torch.zeros(1, 2, 8, 16)
    with pytest.raises(ValueError, match="one type"):
        pattern.attend(x, x, x.half())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_names_its_backend(pattern):
    x = torch.zeros(1, 2, 8, 16)
    assert pattern.backend(x, x, x) in pattern.backends
    x = x.to("meta")
    with pytest.raises(ValueError, match=f"no backend of the pattern {pattern.name} serves these tensors: .*, not on meta"):
        pattern.backend(x, x, x)


def test_takes_the_first_backend_that_is_there_and_serves():
    class Choosy(Dense):
        backends = (
            Backend("gpu", ("cuda",), nothing),
            Backend("absent", ("cpu",), nothing, missing=lambda: "is not installed (pip install absent)"),
            Backend("narrow", ("cpu",), nothing, refuses=lambda pattern, q, k, v: "is narrow" if q.shape[3] > 16 else ""),
            Backend("even", ("cpu",), nothing, refuses=lambda pattern, q, k, v: "" if q.shape[2] % 2 == 0 else "is even"),
        )

    def chosen(length, dim):
        x = torch.zeros(1, 2, length, dim)
        return Choosy().backend(x, x, x).name

    assert chosen(7, 16) == "narrow"
    assert chosen(8, 32) == "even"
    reasons = "gpu runs on cuda, not on cpu; absent is not installed (pip install absent); narrow is narrow; even is even"
    with pytest.raises(ValueError, match=re.escape(reasons)):
        chosen(7, 32)


def nothing(pattern, q, k, v, scale):
    return v


def test_oracle_against_a_loop_over_pairs():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.rand(1, 4, 5, 5) < 0.5
    mask[0, :, 2] = False
    out = masked_attention(q, k, v, mask, scale=0.3)
    for h in range(4):
        for i in range(5):
            keys = [j for j in range(5) if mask[0, h, i, j]]
            weights = [math.exp(0.3 * float(q[0, h, i].double() @ k[0, h // 2, j].double())) for j in keys]
            expected = sum(
                (w / sum(weights) * v[0, h // 2, j].double() for w, j in zip(weights, keys, strict=True)),
                torch.zeros(8, dtype=torch.float64),
            )
            torch.testing.assert_close(out[0, h, i], expected)
