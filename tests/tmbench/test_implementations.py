"""Every part of a model gets back the attention that it had; a text that is read once more for each token is refused."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from plans import plan_of
from tmbench.engine import implementations
from tmbench.engine.attention import applied, applied_plan
from tmbench.engine.chunks import Chunks
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN, prepared
from tmbench.engine.session import running
from tmbench.errors import UnsupportedModelError

STREAMING: dict[str, Any] = {"n_init": 2, "n_local": 9}


@pytest.fixture
def llava():
    """A model that reads images by an encoder with an attention of its own."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=96, image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


def names(model):
    """What each part runs: of the configs by their place in one another, and of every module."""
    config = model.config
    return (
        [config._attn_implementation, config.text_config._attn_implementation, config.vision_config._attn_implementation],
        {name: part.config._attn_implementation for name, part in model.named_modules() if hasattr(part, "config")},
    )


PARTS = [
    {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"},
    {"": "eager", "text_config": "sdpa", "vision_config": "sdpa"},
    {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"},
]


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("fails", [False, True])
def test_each_part_gets_its_own_attention_back(parts, fails, llava, prompt):
    llava.set_attn_implementation(parts)
    before = names(llava)
    assert before[0] == list(parts.values())
    ids = prompt(20)
    ids[0, 4:8] = 96
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = llava(input_ids=ids, pixel_values=image).logits
        stopped = pytest.raises(RuntimeError, match="stop") if fails else nullcontext()
        with stopped, applied(llava, "dense") as session:
            assert names(llava)[0] == ["tmbench", "tmbench", parts["vision_config"]]
            got = llava(input_ids=ids, pixel_values=image).logits
            if fails:
                raise RuntimeError("stop")
    assert session.calls == 4, "the image encoder's attention is its own"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert names(llava) == before
    assert not llava._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PLAIN, EAGER, COMPILED])
def test_fast_prefills_leave_the_other_parts_alone(kind, llava, prompt, monkeypatch):
    monkeypatch.setattr("tmbench.engine.compiled_layers.BACKEND", "eager")
    llava.set_attn_implementation(PARTS[0])
    before = names(llava)
    plan = plan_of(llava, "streaming", **STREAMING)
    with torch.inference_mode(), applied_plan(llava, plan) as session:
        inside = names(llava)
        with prepared(llava, session, kind) as prefill:
            prefill(prompt(30))
            assert names(llava)[0][2] == "eager"
        assert names(llava) == inside
    assert names(llava) == before


def test_a_method_that_is_refused_leaves_the_parts_as_they_were(llava, monkeypatch):
    llava.set_attn_implementation(PARTS[0])
    before = names(llava)
    monkeypatch.setattr(implementations.Implementations, "use", lambda self, name: None)
    with pytest.raises(UnsupportedModelError, match="did not accept"), applied(llava, "dense"):
        pass
    assert names(llava) == before


@pytest.mark.slow
@pytest.mark.parametrize("where", ["argument", "generation config", "config"])
@pytest.mark.parametrize("method", ["streaming", "tri_mix"])
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_generation_without_a_cache_is_refused(where, method, more, make_model, prompt):
    model, ids = make_model("llama"), prompt(40, 2)
    model.generation_config.eos_token_id = None
    if where == "argument":
        more = more | {"use_cache": False}
    elif where == "generation config":
        model.generation_config.use_cache = False
    else:
        model.config.use_cache = model.generation_config.use_cache = False
    with (
        applied(model, method, **STREAMING) as session,
        pytest.raises(
            UnsupportedModelError, match=f"40 tokens once more .*another prefill through {method}: .*use_cache=True"
        ),
    ):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **more)
    assert session.calls == 4, "nothing was read once more"
    assert not model._forward_pre_hooks


def test_embeddings_and_positional_arguments_are_looked_at_too(make_model, prompt):
    model, ids = make_model("llama"), prompt(41)
    embeddings = model.get_input_embeddings()(ids).detach()
    with torch.no_grad(), applied(model, "streaming", **STREAMING):
        model(ids[:, :40])
        with pytest.raises(UnsupportedModelError, match="40 tokens once more"):
            model(ids)
    with torch.no_grad(), applied(model, "streaming", **STREAMING):
        model(inputs_embeds=embeddings[:, :40])
        with pytest.raises(UnsupportedModelError, match="40 tokens once more"):
            model(inputs_embeds=embeddings, use_cache=False)


def test_other_prompts_are_read_one_after_the_other(make_model, prompt):
    """The same once more, a longer one that begins alike, a shorter one, another of one token more, and with a cache."""
    model, ids = make_model("llama"), prompt(60)
    model.generation_config.eos_token_id = None
    other = ids[:, :42].clone()
    other[0, 3] += 1
    with torch.no_grad(), applied(model, "streaming", **STREAMING) as session:
        for one in (ids[:, :40], ids[:, :40], ids[:, :60], ids[:, :40], other[:, :41], ids[:, :20]):
            model(one, use_cache=False)
        text = model.generate(ids[:, :40], attention_mask=torch.ones(1, 40), max_new_tokens=5)
        model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=5)
    assert session.calls == 4 * 8


@pytest.mark.parametrize("what", ["a question behind chunks", "a question behind a context", "a prefix", "prompts"])
@torch.inference_mode()
def test_what_our_own_prefill_reads_may_begin_as_what_it_read_before(what, make_model):
    """Each is what was read before it and one token more, and none is a new token's."""
    model, ids = make_model("llama"), torch.full((1, 31), 5)
    chunks = Chunks(10) if "chunks" in what else None
    with running(model, plan_of(model, "streaming", **STREAMING), EAGER, chunks) as session:
        if what == "a prefix":
            kept = session.keep(ids[:, :15])
        with session.prefill() as prefill:
            if what == "a prefix":
                prefill.after(kept, ids[:, 15:])
            elif what == "prompts":
                prefill(ids[:, :30])
                prefill(ids)
            else:
                prefill(ids, context=20 if chunks else 15)
    session.applied.check_complete()


def test_dense_attention_without_a_cache_is_right_and_so_not_refused(make_model, prompt):
    model, ids = make_model("llama"), prompt(40)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    with applied(model, "dense"):
        got = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, use_cache=False)
    assert got.tolist() == expected.tolist()
