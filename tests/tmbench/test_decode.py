"""Greedy decoding of our own: transformers' under a plain generation config, and nothing of the checkpoint's besides."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import tmbench
import under_plan
from families import FAMILIES
from plans import plan_of
from tmbench.engine import own_attention
from tmbench.engine.attention import applied
from tmbench.engine.calls import cache_name, cache_of
from tmbench.engine.decode import Decoding, end_tokens, generate
from tmbench.engine.prefill import Prefill
from tmbench.errors import UnsupportedModelError, UserError
from tmbench.measure.probe import gradients
from tmbench.models.loading import load
from tmbench_kernels import Sections

STEERING = {
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[5], [9, 4]],
    "suppress_tokens": list(range(20, 60)),
    "begin_suppress_tokens": list(range(3, 50)),
    "min_length": 60,
    "min_new_tokens": 20,
    "max_length": 3,
    "max_new_tokens": 2,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 5.0,
    "use_cache": False,
    "cache_implementation": "static",
    "max_time": 1e-9,
    "forced_bos_token_id": 8,
    "forced_eos_token_id": 8,
    "encoder_repetition_penalty": 1.9,
    "guidance_scale": 3.0,
    "sequence_bias": [[[40], 50.0]],
    "exponential_decay_length_penalty": (1, 9.0),
    "prompt_lookup_num_tokens": 3,
    "prefill_chunk_size": 7,
    "renormalize_logits": True,
    "remove_invalid_values": True,
}
WINDOW: dict[str, Any] = {"starting_layer": 1, "n_init": 2, "n_local": 9, "last_n": 4}


def transformers_own(model, ids, count, **plain):
    """What transformers' ``generate`` writes with nothing in the checkpoint's generation config but an end token."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=0)
    try:
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, **plain)[
            :, ids.shape[1] :
        ]
    finally:
        model.generation_config = own


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "tri_mix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate_under_a_plain_config(family, method, make_model, prompt):
    model, ids = make_model(family, **FAMILIES[family]), prompt(50, 2)
    model.generation_config.eos_token_id = None
    with applied(model, method, **(WINDOW if method == "tri_mix" else {})) as session:
        expected = transformers_own(model, ids, 16)
        assert session.calls == len(session.plan.by_layer)
        model.config.use_cache = model.generation_config.use_cache = False
        got = generate(model, ids, 16)
        assert session.calls == 2 * len(session.plan.by_layer), "one prefill each, whatever the config says of the cache"
    assert got.tolist() == expected.tolist()
    assert got.shape == (2, 16)


@pytest.mark.slow
def test_tokens_of_the_embedded_model_are_those_of_generate():
    loaded = load("tiny", device="cpu")
    text = "VAR AB = 3. " * 60 + "Which variables hold 3?"
    ids = torch.tensor([loaded.need_tokenizer("a test")(text)["input_ids"]])
    with applied(loaded.model, "tri_mix"):
        expected = transformers_own(loaded.model, ids, 24)
        assert generate(loaded.model, ids, 24).tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("key", STEERING)
def test_no_key_of_a_generation_config_steers(key, make_model, prompt):
    model, ids = make_model("llama"), prompt(40)
    model.generation_config.eos_token_id = None
    expected = generate(model, ids, 12).tolist()
    setattr(model.generation_config, key, STEERING[key])
    assert generate(model, ids, 12).tolist() == expected


def test_the_keys_do_steer_transformers_own(make_model, prompt):
    """What the test before would not notice if these keys did nothing at all."""
    model, ids = make_model("llama"), prompt(40)
    model.generation_config.eos_token_id = None
    config = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0)
    expected = generate(model, ids, 12).tolist()
    assert model.generate(ids, generation_config=config)[:, 40:].tolist() == expected
    model.generation_config.repetition_penalty = STEERING["repetition_penalty"]
    assert model.generate(ids, generation_config=config)[:, 40:].tolist() != expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_a_config_without_a_cache_changes_no_figure_and_adds_no_prefill(family, make_model, prompt, monkeypatch):
    model, ids = make_model(family, num_key_value_heads=4), prompt(40)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "tri_mix", **WINDOW)
    prefills = []
    pattern = type(plan.patterns[-1])
    attend = pattern.attend
    monkeypatch.setattr(pattern, "attend", lambda self, *a, **kw: prefills.append(a[0].shape[2]) or attend(self, *a, **kw))

    def figures():
        chosen = under_plan.follow(model, plan, ids, 9)
        of_prompt, of_answer, _ = under_plan.losses(model, plan, ids, chosen[:5])
        probed, _ = gradients(model, ids, chosen[0], Sections(2, 9, 4))
        return chosen, of_prompt.tolist(), of_answer.tolist(), probed.means.nan_to_num().tolist()

    expected = figures()
    assert prefills == [40] * 6, "three deep layers, two prefills"
    model.config.use_cache = model.generation_config.use_cache = False
    assert figures() == expected
    assert prefills == [40] * 12


def test_no_length_of_a_text_is_planned_for(make_model, prompt, monkeypatch):
    planless = []

    def noted(query):
        planless.append(tuple(query.shape[1:3]))
        return nullcontext()

    monkeypatch.setattr(own_attention, "without_plans", noted)
    model = make_model("llama", **FAMILIES["llama"])
    model.generation_config.eos_token_id = None
    with applied(model, "dense"):
        generate(model, prompt(50), 5)
    text = model.config
    assert planless == [(text.num_attention_heads, 1)] * text.num_hidden_layers * 4


def test_sequences_end_at_the_models_end_tokens_and_are_padded(make_model, prompt):
    model, ids = make_model("llama"), prompt(30, 2)
    model.generation_config.eos_token_id = None
    free = generate(model, ids, 10).tolist()
    end = next(token for token in free[0] if token not in free[1])
    place = free[0].index(end)
    for ends in (end, [end, 96], torch.tensor([end])):
        model.generation_config.eos_token_id = ends
        got = generate(model, ids, 10).tolist()
        assert got[0] == free[0][: place + 1] + [0] * (9 - place)
        assert got[1] == free[1]
        assert generate(model, ids[:1], 10).tolist() == [free[0][: place + 1]]
    model.generation_config.pad_token_id = None
    assert generate(model, ids, 10)[0, place:].tolist() == [end] * (10 - place)


@pytest.mark.parametrize(("given", "ends"), [(None, []), (5, [5]), ([5, 6], [5, 6]), (-1, []), ([5, 97, 10**9], [5])])
def test_end_tokens_outside_of_the_vocabulary_stand_for_none(given, ends, make_model, prompt):
    model = make_model("llama")
    model.generation_config.eos_token_id = given
    assert end_tokens(model) == ends
    assert len(under_plan.follow(model, plan_of(model, "dense"), prompt(20), 3)) == 3


def test_inputs_are_ids_or_what_a_tokenizer_returns(make_model, prompt):
    model, ids = make_model("llama"), prompt(20)
    expected = tmbench.generate(model, ids, 5).tolist()
    mask = torch.ones_like(ids)
    for inputs in (ids[0], ids.tolist(), ids[0].tolist(), {"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        assert tmbench.generate(model, inputs, max_new_tokens=5).tolist() == expected
    mask[0, -1] = 0
    for inputs, error, words in (
        ({"input_ids": ids, "attention_mask": mask}, UnsupportedModelError, "padding behind"),
        ({"input_ids": ids, "pixel_values": ids}, UserError, "leave out pixel_values"),
        ([[1, 2], [3]], UserError, "all sequences of one length"),
        ("a text", UserError, "tokenize first"),
        (torch.ones(1, 4), UserError, r"\[batch, length\], not float32 \(1, 4\)"),
        (torch.ones(1, 0, dtype=torch.long), UserError, r"not int64 \(1, 0\)"),
    ):
        with pytest.raises(error, match=words):
            tmbench.generate(model, inputs, 5)
    with pytest.raises(UserError, match=r"max_new_tokens must be a whole number, 1 or more, not 2\.5"):
        tmbench.generate(model, ids, 2.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_new_tokens must be a whole number, 1 or more, not 0"):
        tmbench.generate(model, ids, 0)
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no head that yields tokens"):
        tmbench.generate(model.model, ids, 5)


def test_a_model_that_returns_no_cache_is_refused(make_model, prompt, monkeypatch):
    model, ids = make_model("llama"), prompt(20)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **kw: forward(input_ids, **kw | {"use_cache": False}))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM returns no cache"):
        generate(model, ids, 3)


def test_a_text_across_the_length_at_which_longrope_changes_is_refused(make_model, prompt):
    """Keys in the cache were turned by other angles than those that come after: no text of both is the model's."""
    half = [1.0] * 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": half, "long_factor": [4.0] * 8}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 32, "sliding_window": None}
    model = make_model("phi3", **changes)
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        prefill = Prefill(model)
        decoding = Decoding(model, prompt(30), prefill(prompt(30)), prefill.cache)
        for token in (5, 6):
            decoding.read([token])
        assert decoding.length == 32
        with pytest.raises(RuntimeError, match=r"Phi3ForCausalLM changes its rotary embeddings behind token 32"):
            decoding.read([7])
    for length, count in ((28, 5), (33, 5)):
        with applied(model, "streaming", n_init=2, n_local=9):
            assert generate(model, prompt(length), count).tolist() == transformers_own(model, prompt(length), count).tolist()
    text = prompt(33)
    # Recent releases of transformers have ``generate`` read the whole text once more there.
    with torch.no_grad(), applied(model, "streaming", n_init=2, n_local=9):
        past = {cache_name(model): cache_of(model(text[:, :28], use_cache=True))}
        for place in range(28, 32):
            model(text[:, place : place + 1], use_cache=True, **past)
        with pytest.raises(UnsupportedModelError, match="32 tokens once more"):
            model(text, use_cache=True)
