"""Parts of measurements, run on a model under a plan without the rest of the measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tmbench.engine.chunk_kind import feeds_chunks
from tmbench.engine.prefill import PLAIN, Kind
from tmbench.engine.session import Session, running
from tmbench.measure import loss
from tmbench.methods.plan import Plan, backends_name


def follow(model: PreTrainedModel, plan: Plan, *arguments: Any, kind: Kind = PLAIN) -> list[int]:
    """As ``Session.follow``."""
    with torch.inference_mode(), running(model, plan, kind) as session:
        return session.follow(*arguments)


def losses(model: PreTrainedModel, plan: Plan, *arguments: Any, kind: Kind = PLAIN) -> tuple[Tensor, Tensor, str]:
    """As ``loss.losses``, and the backends that ran."""
    at_once = feeds_chunks(model, kind)
    with running(model, plan, kind) as session:
        return *loss.losses(session, *arguments, at_once=at_once), backends_name(session.applied.backends)


@torch.inference_mode()
def generate(model: PreTrainedModel, plan: Plan, ids: Tensor, count: int, kind: Kind = PLAIN) -> list[int]:
    """The new tokens of one prompt."""
    with running(model, plan, kind) as session:
        return [int(token) for token in session.generate(ids, count)[0]]


def stand_in(monkeypatch: pytest.MonkeyPatch, answer: Callable[[PreTrainedModel, Tensor, int], list[int]]) -> None:
    """Have ``answer``, given model, prompt and the most new tokens, stand in for decoding."""
    monkeypatch.setattr(
        Session,
        "generate",
        lambda session, ids, count, context: torch.tensor([answer(session.model, ids, count)], dtype=torch.long),
    )
