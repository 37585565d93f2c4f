"""Measurements on one engine: what is read in any kind of prefill is answered, followed and lost alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from served_families import small

import plans
import under_plan
from tmbench.engine.chunk_kind import feeds_chunks
from tmbench.engine.chunks import Chunks
from tmbench.engine.kv_cache import CacheSlot, KvCache
from tmbench.engine.last_position import narrow
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN, Kind
from tmbench.engine.prefill_state import PrefillState
from tmbench.engine.session import KeptOpen, compile_ahead, running
from tmbench.errors import NotFiniteError

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 64},
    "phi3": {"sliding_window": None},
    "gemma": {},
    "olmo2": {"num_key_value_heads": 4},
    "gpt_neox": {"num_key_value_heads": 4},
}
WINDOW = {"n_init": 2, "n_local": 9, "last_n": 5}
KINDS: tuple[Kind, ...] = (EAGER, COMPILED)


pytestmark = pytest.mark.usefixtures("graphs", "short_chunks")


def plan_of(model, name="tri_mix"):
    return plans.plan_of(model, name, **WINDOW)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tri_mix", "minference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_choices_and_losses_are_those_of_a_plain_prefill(family, method, make_model, prompt):
    model, ids = make_model(family, **FAMILIES[family]), prompt(53)
    model.generation_config.eos_token_id = None
    plan, text = plan_of(model, method), [5, 6, 7, 8, 9, 10]
    answer = under_plan.generate(model, plan, ids, 12)
    choices = under_plan.follow(model, plan, ids, 6, text)
    of_prompt, of_answer, _ = under_plan.losses(model, plan, ids, text)
    for kind in KINDS:
        assert under_plan.generate(model, plan, ids, 12, kind) == answer
        assert under_plan.follow(model, plan, ids, 6, text, kind=kind) == choices
        got = under_plan.losses(model, plan, ids, text, kind=kind)
        torch.testing.assert_close(got[0], of_prompt, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], of_answer, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_sample_leaves_model_and_session_as_before(kind, make_model, prompt):
    model, ids = make_model("llama"), prompt(40)
    plan = plan_of(model)
    expected = under_plan.generate(model, plan, ids, 6, kind)
    before = [(name, dict(vars(module))) for name, module in model.named_modules()]

    def fail(layer, *rest):
        if layer == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with torch.inference_mode(), running(model, plan, kind) as session:
        session.applied.observer = fail
        with pytest.raises(torch.OutOfMemoryError):
            session.read(ids)
        assert session.applied.prefill == PrefillState()
        session.applied.observer = None
        assert session.generate(ids, 6)[0].tolist() == expected
    assert [(name, dict(vars(module))) for name, module in model.named_modules()] == before
    weight = model.lm_head.weight.data
    kept = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="the logits of the prompt's last token"):
        under_plan.generate(model, plan, ids, 6, kind)
    weight.copy_(kept)
    assert under_plan.generate(model, plan, ids, 6, kind) == expected


@pytest.mark.parametrize("kind", [PLAIN, EAGER])
def test_what_the_last_layer_and_the_mlps_see(kind, make_model, prompt):
    """What makes up the memory: an answer's prompt is read as TTFT's is, and losses need the last layer whole."""
    model = make_model("llama")
    seen: dict[str, list[int]] = {"mlp": [], "last": []}
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen["mlp"].append(args[0].shape[1]))
    attention = model.model.layers[-1].self_attn
    attention.o_proj.register_forward_hook(lambda _, args, out: seen["last"].append(out.stride(1)))
    width = model.config.hidden_size
    under_plan.generate(model, plan_of(model), prompt(40), 1, kind)
    assert max(seen["mlp"]) == (14 if kind == EAGER else 40)
    assert seen["last"] == [0 if kind == EAGER else width], "one position, seen at all of them"
    feeds_chunks(model, kind)  # which tries the model
    seen["mlp"].clear()
    seen["last"].clear()
    under_plan.losses(model, plan_of(model), prompt(40), [5], kind=kind)
    assert max(seen["mlp"]) == (14 if kind == EAGER else 40)
    assert seen["last"] == [width]


@pytest.mark.slow
def test_what_is_compiled_ahead_is_not_compiled_again(graphs, make_model, prompt):
    model = make_model("llama")
    for method, every in (("tri_mix", False), ("minference", False), ("dense", True)):
        for _ in range(2):
            compile_ahead(model, plan_of(model, method), COMPILED, prompt(40), every_position=every)
        made = len(graphs)
        assert made, "something was compiled"
        with torch.inference_mode(), running(model, plan_of(model, method), COMPILED) as session:
            session.read(prompt(61), every_position=every)
        assert len(graphs) == made
    compile_ahead(other := make_model("llama"), plan_of(other), EAGER, prompt(40))
    assert len(graphs) == made


@pytest.mark.slow
def test_what_takes_an_mlp_in_one_piece_is_compiled_ahead_of_its_own(graphs, make_model, prompt):
    model = make_model("llama")
    for length, chunks in ((40, None), (16, None), (64, Chunks(16)), (9, None), (33, None)):
        before = len(graphs)
        compile_ahead(model, plan_of(model), COMPILED, prompt(length), chunks=chunks)
        made = len(graphs)
        assert (made > before) == (length in (40, 16))
        with torch.inference_mode(), running(model, plan_of(model), COMPILED, chunks) as session:
            session.read(prompt(length - 1))
        assert len(graphs) == made


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize(
    ("length", "chunks", "context", "later"),
    [(40, None, 30, 0), (40, None, 39, 0), (40, None, 0, 3), (40, None, 0, 1), (40, None, 30, 1), (50, Chunks(20), 0, 0)],
)
def test_short_parts_of_a_long_prompt_are_compiled_ahead(length, chunks, context, later, family, graphs, prompt):
    """A question, an answer that is read in one pass and the rest of a prompt in chunks: an MLP takes those in one piece."""
    model, ids = small(family), prompt(length)
    plan = plan_of(model)
    # Of another prompt, which has no such part.
    compile_ahead(model, plan, COMPILED, prompt(60), every_position=later > 0, chunks=chunks)
    before = len(graphs)
    about = {"every_position": later > 0, "chunks": chunks, "context": context, "later": later}
    compile_ahead(model, plan, COMPILED, ids, **about)
    made = len(graphs)
    assert made > before
    with torch.inference_mode(), running(model, plan, COMPILED, chunks) as session:
        if later:
            session.read_before(ids, [5] * later, context)
        else:
            session.read(ids, context=context)
    assert len(graphs) == made


def test_a_failure_that_leaves_half_of_a_context_in_its_slot_is_told(graphs, make_model, prompt):
    """Its question would be read over that."""
    model, cache = make_model("llama"), KvCache(1, 50)
    kept, calls = KeptOpen(model, COMPILED, Chunks(20)), []

    def fail(module, given):
        calls.append(module)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with torch.inference_mode():
        handle = model.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            kept.under(plan_of(model), prompt(50), CacheSlot(cache, 0), 45)
        handle.remove()
    assert cache.layers[0][0][0, :, 20:45].eq(0).all()


def test_a_session_that_is_kept_open_tells_each_prompt_apart(make_model, prompt, monkeypatch):
    """What the prompt before ran says nothing of this one, and another plan is another session."""
    model = make_model("llama")
    prepared = []
    monkeypatch.setattr("tmbench.engine.prefill.narrow", lambda *given: prepared.append(given[2].plan) or narrow(*given))
    before = [dict(vars(module)) for module in model.modules()]
    both = [plans.plan_of(model, "dense"), plan_of(model)]
    kept = KeptOpen(model, EAGER)
    cache = KvCache(1, 60)
    told, logits = [], []
    with torch.inference_mode():
        for number, length in ((0, 40), (0, 50), (1, 40), (0, 40)):
            ids, slot = prompt(length), CacheSlot(cache, 0)
            session = kept.under(both[number], ids, slot)
            assert (session.applied.calls, session.applied.layers, session.applied.backends) == (0, set(), set())
            logits.append(session.read_into(ids, slot))
            told.append(sorted(session.applied.backends))
        kept.close()
        assert prepared == [both[0], both[1], both[0]], "once for the prompts that follow each other"
        with running(model, both[0], EAGER) as session:
            expected = session.read(prompt(40)).logits
    assert told == [["dense:sdpa"], ["dense:sdpa"], ["dense:sdpa", "triangle:torch-banded"], ["dense:sdpa"]]
    torch.testing.assert_close(logits[0], expected)
    torch.testing.assert_close(logits[3], expected)
    assert not torch.allclose(logits[2], expected)
    assert [dict(vars(module)) for module in model.modules()] == before
