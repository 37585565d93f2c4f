"""Tensors as transformers passes them, and the rule by which an output counts as right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tmbench_kernels.reference import masked_attention

Tensors = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True, scope="session")
def _poison_uninitialised_memory() -> Iterator[None]:
    """``torch.empty`` is filled with NaN, so that an output nobody wrote to cannot pass."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def running_sums_on_a_gpu() -> Iterator[None]:
    """On a GPU memory is not poisoned: torch has running sums there in no order that is always the same."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def make_qkv() -> Callable[..., Tensors]:
    """q, k and v: views of ``[batch, length, heads, dim]``, transposed, as a projection yields them."""

    def make(
        length: int,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 64,
        v_dim: int | None = None,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Tensors:
        random = torch.Generator().manual_seed(seed)
        q, k, v = (
            torch.randn(batch, length, n, width, generator=random).to(dtype).transpose(1, 2)
            for n, width in ((heads, dim), (kv_heads, dim), (kv_heads, v_dim or dim))
        )
        return q, k, v

    return make


@pytest.fixture(scope="session")
def make_structured_qkv() -> Callable[..., Tensors]:
    """q, k and v whose attention is as uneven as a trained model's, laid out in memory as those of ``make_qkv``.

    All heads attend to the first keys and to some columns; even key heads to near keys, odd ones along slashes: a constant
    part of q and k, turned by RoPE, makes a logit depend on the distance.
    """

    def make(
        length: int,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 32,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Tensors:
        random = torch.Generator().manual_seed(seed)
        half = dim // 2
        angles = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(half) / half)
        cos, sin = angles.cos(), angles.sin()

        def tokens(head: int, strength: Tensor) -> Tensor:
            x = torch.randn(batch, length, dim, generator=random)
            x[..., 2 if head % 2 else 0 : half - 2 : 3 if head % 2 else 1] += 2.0
            x[..., half - 1] += strength
            a, b = x[..., :half], x[..., half:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

        columns = torch.where(torch.rand(batch, length, generator=random) < 1 / 200, 8.0, 0.0)
        columns[:, :4] = 12.0
        groups = heads // kv_heads
        q = [tokens(head // groups, torch.tensor(2.0)) for head in range(heads)]
        k = [tokens(head, columns) for head in range(kv_heads)]
        v = torch.randn(batch, length, kv_heads, dim, generator=random).to(dtype).transpose(1, 2)
        stacked_q, stacked_k = (torch.stack(x, dim=2).to(dtype).transpose(1, 2) for x in (q, k))
        return stacked_q, stacked_k, v

    return make


def rms_errors(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, **logits: Any
) -> tuple[float, float, float]:
    """RMS of the exact output, of ``out`` against it, and of plain torch in the same type against it."""
    exact = masked_attention(q, k, v, mask, scale=scale, **logits)
    plain = masked_attention(q, k, v, mask, scale=scale, dtype=q.dtype, **logits)
    assert out.shape == exact.shape
    assert out.dtype == q.dtype
    size, error, plain_error = (x.double().square().mean().sqrt().item() for x in (exact, out - exact, plain - exact))
    return size, error, plain_error


@pytest.fixture(scope="session")
def measure_errors() -> Callable[..., tuple[float, float, float]]:
    """``rms_errors``, for a test with a bound of its own."""
    return rms_errors


@pytest.fixture(scope="session")
def assert_as_torch() -> Callable[..., None]:
    """The error against float64 is at most twice that of plain torch in the same type, whatever that is.

    ``note`` is what a failure says. Where torch makes next to no error, neither may the output.
    """

    def check(
        out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, note: str = ""
    ) -> None:
        size, error, plain_error = rms_errors(out, q, k, v, mask, scale)
        assert error <= max(2 * plain_error, 1e-6 * size) + torch.finfo(torch.float32).tiny, note

    return check


@pytest.fixture(scope="session")
def assert_exact() -> Callable[..., None]:
    """The error against float64 is at most twice that of plain torch in the same type, or 0.5 % RMS in 16 bits.

    ``softcap`` and ``sinks`` are those of the logits. Learned sinks are a factor, which is rounded once more.
    """

    def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, **logits: Any) -> None:
        size, error, plain_error = rms_errors(out, q, k, v, mask, scale, **logits)
        allowed = 2 * plain_error + (2 if "sinks" in logits else 1) * torch.finfo(torch.float32).eps * size
        if q.dtype != torch.float32:
            allowed = max(allowed, 0.005 * size)
        assert error <= allowed

    return check
