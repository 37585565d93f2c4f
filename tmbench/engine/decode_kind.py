"""How a model can decode several texts at once: in a CUDA graph, step by step, or not at all."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tmbench.engine.batch import GRAPH, STEPPED, Batch, StepKind
from tmbench.engine.decode_step import next_logits, prepared
from tmbench.engine.kv_cache import CacheSlot, KvCache
from tmbench.engine.prefill import EAGER, PLAIN, Kind
from tmbench.engine.prefill_kind import agree, short_prompt
from tmbench.engine.session import running
from tmbench.errors import UnsupportedModelError, UserError
from tmbench.methods.layer_kinds import CHUNKED, FULL, SLIDING, kind_words, layer_kinds
from tmbench.methods.plan import ModelShape
from tmbench.methods.table import METHODS
from tmbench.models import parallel
from tmbench.models.rotary import depends_on_length
from tmbench.results.failures import describe

LENGTHS = (21, 33)
"""Of the probe's two prompts."""
STEPS = 3

_FOUND: WeakKeyDictionary[PreTrainedModel, tuple[StepKind | None, str]] = WeakKeyDictionary()


def step_kind(model: PreTrainedModel, prefill: Kind) -> tuple[StepKind | None, str]:
    """How texts decode together; or None, and why they cannot, in words that follow a comma.

    A model is tried once: two short texts are continued together and one by one, and their logits compared.
    """
    if obstacle := why_alone(model, prefill):
        return None, obstacle
    if model not in _FOUND:
        _FOUND[model] = _try(model)
    return _FOUND[model]


def why_alone(model: PreTrainedModel, prefill: Kind) -> str:
    """Why texts are decoded one by one, as far as it shows without trying; empty where nothing does."""
    if parallel.size() > 1:
        return "as several GPUs share it"
    if prefill == PLAIN:
        return "as its prompts are read as transformers reads them"
    if depends_on_length(model):
        return "as its rotary embeddings depend on a text's length"
    kinds = layer_kinds(model.config)
    if CHUNKED in kinds:
        return "as its queries are scaled by their place, which it takes from a cache of transformers'"
    if own := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        return f"as it has layers of {kind_words(own)}, whose state no static cache here holds"
    return ""


@torch.inference_mode()
def _try(model: PreTrainedModel) -> tuple[StepKind | None, str]:
    try:
        if not _answers_alike(model):
            return None, "as it answers short prompts otherwise when several are continued together"
    except UnsupportedModelError as error:
        return None, f"as {error}"
    except UserError:
        raise
    except Exception as error:
        return None, f"as two short prompts failed ({describe(error)})"
    if model.device.type != "cuda":
        return STEPPED, ""
    try:
        _decode(model)
    except Exception:
        # What cannot be recorded runs all the same, and rows say which it was.
        torch.cuda.synchronize(model.device)
        return STEPPED, ""
    return GRAPH, ""


def _prompts(model: PreTrainedModel) -> list[Tensor]:
    return [short_prompt(model, length) for length in LENGTHS]


def _answers_alike(model: PreTrainedModel) -> bool:
    """Whether steps over a static cache yield the logits of the plain loop."""
    plan = METHODS["dense"].plan(ModelShape.of(model))
    cache = KvCache(len(LENGTHS), max(LENGTHS) + STEPS)
    seqlens = torch.tensor(LENGTHS, dtype=torch.int32, device=model.device)
    expected = []
    for slot, ids in enumerate(_prompts(model)):
        with running(model, plan, EAGER) as session:
            session.read_into(ids, CacheSlot(cache, slot))
        with running(model, plan, PLAIN) as session:
            decoding = session.read(ids)
            expected.append([decoding.read([token]) for token in range(1, STEPS + 1)])
    got = []
    with prepared(model, cache, seqlens):
        for token in range(1, STEPS + 1):
            tokens = torch.full((len(LENGTHS), 1), token, dtype=torch.long, device=model.device)
            got.append(next_logits(model, tokens, seqlens).float())
            seqlens += 1
    return all(
        agree(got[step][slot : slot + 1], expected[slot][step], model.dtype)
        for slot in range(len(LENGTHS))
        for step in range(STEPS)
    )


def _decode(model: PreTrainedModel) -> None:
    """Record a step and run it."""
    plan = METHODS["dense"].plan(ModelShape.of(model))
    batch = Batch(model, max(LENGTHS) + STEPS, STEPS, size=1, graph=True)
    with running(model, plan, EAGER) as session:
        batch.read(session, _prompts(model)[0], STEPS)
    while batch.texts:
        batch.advance()
