"""The operators that stand in a compiled decoder layer for what must not be traced: attention, and the MLP in chunks.

All layers of a model share one graph, so an operator cannot be told by the graph which layer it is in. ``entered`` says so,
from outside of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """What the operators do in one layer."""

    attention: Callable[[Tensor, Tensor, Tensor, float | None, float, Tensor | None], Tensor]
    """q, k, v ``[batch, heads, length, dim]``, scale, cap of the logits (0 for none) and sinks ``[heads]`` to
    ``[batch, length or 1, heads, v_dim]``, contiguous."""
    mlp: Callable[[Tensor], Tensor] | None
    """Hidden states ``[batch, length, hidden]`` to new ones of that shape, contiguous; None where a layer has no MLP."""


_RUNNING: ContextVar[Region] = ContextVar("tmbench-region")


@contextmanager
def entered(region: Region) -> Iterator[None]:
    """Until the end of the ``with`` block, the operators are those of this layer, in this thread."""
    token = _RUNNING.set(region)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float, sinks: Tensor | None) -> Tensor:
    return _RUNNING.get().attention(q, k, v, scale, softcap, sinks)


def _mlp(x: Tensor) -> Tensor:
    mlp = _RUNNING.get().mlp
    assert mlp is not None, "a layer without an MLP does not call one"
    return mlp(x)


def _attention_shape(q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float, sinks: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _last_row_shape(q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float, sinks: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], v.shape[3])


def _mlp_shape(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# Its methods have no types.
_LIBRARY: Any = torch.library.Library("tmbench", "DEF")  # type: ignore[no-untyped-call]


def _define(name: str, schema: str, run: Callable[..., Tensor], shape: Callable[..., Tensor]) -> None:
    """By torch's library itself: an operator of ``custom_op`` takes the host several times as long to call."""
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tmbench::{name}", shape, lib=_LIBRARY)


# Two operators for attention, as an operator's shape must be known before it runs.
_SCHEMA = "(Tensor q, Tensor k, Tensor v, float? scale, float softcap, Tensor? sinks) -> Tensor"
_define("attention", _SCHEMA, _attend, _attention_shape)
_define("last_row", _SCHEMA, _attend, _last_row_shape)
_define("mlp", "(Tensor x) -> Tensor", _mlp, _mlp_shape)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """Attention of the running layer, ``[batch, length, heads, v_dim]``."""
    out: Tensor = torch.ops.tmbench.attention(q, k, v, scale, softcap, sinks)
    return out


def last_row(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """Attention of the running layer's last query, ``[batch, 1, heads, v_dim]``."""
    out: Tensor = torch.ops.tmbench.last_row(q, k, v, scale, softcap, sinks)
    return out


def mlp(x: Tensor) -> Tensor:
    """The MLP of the running layer, ``[batch, length, hidden]``."""
    out: Tensor = torch.ops.tmbench.mlp(x)
    return out


def mlp_and_router(x: Tensor) -> tuple[Tensor, None]:
    """As ``mlp``, for layers whose MLP returns what its router chose as well, which nobody reads."""
    return mlp(x), None
