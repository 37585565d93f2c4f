"""Which models' prompts can be fed in chunks: those that answer a short one as in one piece."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from tmbench.engine.chunks import Chunks, why_whole_by_config
from tmbench.engine.prefill import EAGER, PLAIN, Kind, tensors_of
from tmbench.engine.prefill_kind import all_agree, failed_trial, obstacle_of, short_prompt
from tmbench.engine.session import running
from tmbench.errors import UserError
from tmbench.methods.plan import ModelShape
from tmbench.methods.table import METHODS
from tmbench.models.context import splits_prompts

TRIED = Chunks(19)
"""How the short prompt is fed."""

_FOUND: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def check_chunks(name: str, model: PreTrainedModel, kind: Kind, option: str, *, planned: bool = False) -> None:
    """Raise UserError for a model whose prompts cannot be fed in chunks in this kind of prefill.

    ``option`` asks for chunks, of which a question that is asked later is one. ``planned`` is whether it has no weights yet,
    so that it cannot be tried.
    """
    if splits_prompts(model):
        raise UserError(f"{option} does not go with --context-parallel, which splits whole prompts: leave one of them out")
    if obstacle := _obstacle(model, kind) if planned else why_whole(model, kind):
        raise UserError(f"{option}: prompts of {name} cannot be fed in chunks, {obstacle}: leave the option out")


def feeds_chunks(model: PreTrainedModel, kind: Kind) -> bool:
    """Whether prompts can be fed in chunks. What a plain prefill would have needed is not looked for."""
    return kind != PLAIN and not why_whole(model, kind)


def why_whole(model: PreTrainedModel, kind: Kind) -> str:
    """Why prompts are read in one piece, in words that follow a comma; empty where they can be fed in chunks.

    A model is tried once, under no other method meanwhile.
    """
    if obstacle := _obstacle(model, kind):
        return obstacle
    if model not in _FOUND:
        _FOUND[model] = _tried(model)
    return _FOUND[model]


def _obstacle(model: PreTrainedModel, kind: Kind) -> str:
    """Why not, as far as it shows without trying, in words that follow a comma."""
    if kind == PLAIN:
        return obstacle_of(model) or "as they are read as transformers reads them"
    return why_whole_by_config(model)


@torch.inference_mode()
def _tried(model: PreTrainedModel) -> str:
    """As ``_obstacle``, of a short prompt that is read both ways."""
    plan = METHODS["dense"].plan(ModelShape.of(model))
    ids = short_prompt(model)
    found = []
    try:
        for chunks in (None, TRIED):
            with running(model, plan, EAGER, chunks) as session, session.prefill() as prefill:
                found.append([prefill(ids), *tensors_of(prefill.cache)])
    except UserError:
        raise
    except Exception as error:
        return failed_trial(error)
    if not all_agree(*found):
        return "as it answers a short prompt otherwise than in one piece"
    return ""
