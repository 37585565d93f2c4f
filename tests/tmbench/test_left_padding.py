"""Texts of a left-padded batch are read as each alone, by dense and triangle attention; no other pattern takes padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from served_families import small
from transformers import GenerationConfig, StaticCache

import tmbench
from tmbench import applied
from tmbench.engine.prefill import EAGER, prepared
from tmbench.errors import UnsupportedModelError, UserError

OFFSETS = (0, 13, 5, 44)
"""Padding in front of each text: none, more than the window, less than it, and all but one token."""
LENGTH = 45
TRIANGLE: dict[str, Any] = {"n_init": 3, "n_local": 7, "last_n": 5}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "triangle": ("tri_mix", {"starting_layer": 0, **TRIANGLE}),
    "half": ("tri_mix", TRIANGLE),
    "streaming": ("streaming", {"n_init": 2, "n_local": 9}),
}
NEW = 6


@pytest.fixture
def padded(prompt):
    """Ids ``[4, 45]`` and their mask; what stands in front of a text is noise, so that reading it shows."""
    ids, mask = prompt(LENGTH, len(OFFSETS)), torch.ones(len(OFFSETS), LENGTH, dtype=torch.long)
    for row, offset in enumerate(OFFSETS):
        mask[row, :offset] = 0
    return {"input_ids": ids, "attention_mask": mask}


def texts(padded):
    return [ids[offset:][None] for ids, offset in zip(padded["input_ids"], OFFSETS, strict=True)]


def near(got, expected):
    """Equal up to 1e-4 of the root mean square."""
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def triangle_masks():
    """The definition, pair by pair, for each row's text; padding sees itself, as an empty softmax is no number."""
    masks = torch.eye(LENGTH, dtype=torch.bool).repeat(len(OFFSETS), 1, 1, 1)
    for row, start in enumerate(OFFSETS):
        for i in range(start, LENGTH):
            for j in range(start, i + 1):
                kept = j - start < TRIANGLE["n_init"] or i - j < TRIANGLE["n_local"] or i >= LENGTH - TRIANGLE["last_n"]
                masks[row, 0, i, j] = kept
    return torch.zeros(masks.shape).masked_fill(~masks, torch.finfo(torch.float32).min)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mistral, with a window", "gemma3_text", "gpt_oss", "llama4_text", "deepseek_v3"]
)
@pytest.mark.parametrize("chosen", METHODS)
def test_each_text_is_read_as_alone(chosen, family, padded):
    model, (method, parameters) = small(family), METHODS[chosen]
    with torch.inference_mode(), applied(model, method, **parameters) as session:
        alone = [model(ids).logits[0] for ids in texts(padded)]
        backends, calls = set(session.backends), session.calls
        session.forget()
        got = model(**padded).logits
        assert session.backends == backends
        assert session.calls == calls // len(alone), "one for each layer, whether of all texts or of one, of one token too"
    for row, offset in enumerate(OFFSETS):
        near(got[row, offset:], alone[row])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "gemma2", "qwen3_next", "llama4_text"])
def test_dense_is_transformers_own_of_the_same_batch(family, padded):
    model = small(family)
    with torch.inference_mode():
        with applied(model, "dense"):
            got = model(**padded).logits
        model.set_attn_implementation("eager")
        expected = model(**padded).logits
    for row, offset in enumerate(OFFSETS):
        near(got[row, offset:], expected[row, offset:])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_triangle_is_transformers_own_under_its_mask(family, padded):
    model = small(family)
    with torch.inference_mode():
        with applied(model, "tri_mix", starting_layer=0, **TRIANGLE):
            got = model(**padded).logits
        model.set_attn_implementation("eager")
        expected = model(padded["input_ids"], attention_mask=triangle_masks()).logits
        dense = model(**padded).logits
    for row, offset in enumerate(OFFSETS):
        near(got[row, offset:], expected[row, offset:])
    assert (got[0] - dense[0]).norm() > 0.05 * dense[0].norm(), "the triangle makes a difference"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("chosen", METHODS)
def test_answers_are_those_of_each_text_alone(chosen, family, padded):
    model, (method, parameters) = small(family), METHODS[chosen]
    model.generation_config.eos_token_id = None
    plain = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    with applied(model, method, **parameters) as session:
        expected = [tmbench.generate(model, ids, NEW)[0].tolist() for ids in texts(padded)[:3]]
        padded = {name: tensor[:3] for name, tensor in padded.items()}
        session.forget()
        assert tmbench.generate(model, padded, NEW).tolist() == expected
        full = session.calls
        for cache in ("dynamic", "static"):
            plain.cache_implementation = cache
            assert model.generate(**padded, generation_config=plain)[:, LENGTH:].tolist() == expected, cache
        assert session.calls == 3 * full, "one prefill each: what is decoded does not go through the patterns"


def test_an_observer_sees_each_text_without_its_padding(padded):
    model, seen = small("llama"), []
    with torch.inference_mode(), applied(model, "tri_mix", starting_layer=0, **TRIANGLE) as session:
        session.observer = lambda layer, pattern, q, k, scale: seen.append((layer, q.shape[2], k.shape[2]))
        model(**padded)
    assert seen == [(layer, LENGTH - offset, LENGTH - offset) for layer in range(4) for offset in OFFSETS]


def test_a_mask_of_a_whole_static_cache_serves_too(padded):
    model = small("llama")
    wider = torch.cat([padded["attention_mask"], torch.zeros(len(OFFSETS), 19, dtype=torch.long)], dim=1)
    with torch.inference_mode(), applied(model, "tri_mix", starting_layer=0, **TRIANGLE):
        expected = model(**padded).logits
        cache = StaticCache(config=model.config, max_cache_len=64)
        got = model(padded["input_ids"], attention_mask=wider, past_key_values=cache, use_cache=True).logits
    for row, offset in enumerate(OFFSETS):
        near(got[row, offset:], expected[row, offset:])


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("minference", "vertical_slash"),
        ("tri_mix_minference", "vertical_slash"),
        ("flexprefill", "flex_prefill"),
        ("xattention", "xattention"),
        ("flashprefill", "flash_prefill"),
    ],
)
def test_other_patterns_refuse_padding_by_name(method, name, padded):
    model = small("llama")
    with applied(model, method):
        for read in (lambda: model(**padded), lambda: tmbench.generate(model, padded, 2)):
            with pytest.raises(UnsupportedModelError, match=f"padded, which {method} does not serve with {name} attention"):
                read()
        model(padded["input_ids"], attention_mask=torch.ones(len(OFFSETS), LENGTH, dtype=torch.long))


def test_padding_that_is_not_in_front_is_refused(padded):
    model, ids = small("llama"), padded["input_ids"]
    right, hole, empty = (torch.ones_like(ids) for _ in range(3))
    right[1, -2:], hole[2, 7], empty[3] = 0, 0, 0
    for mask, words in (
        (right, "padding behind its texts or within them: pad in front"),
        (hole, "padding behind its texts or within them: pad in front"),
        (empty, "row 3 of the batch is padding alone"),
    ):
        with applied(model, "dense"):
            for read in (model, lambda **inputs: tmbench.generate(model, inputs, 2)):
                with pytest.raises(UnsupportedModelError, match=words):
                    read(input_ids=ids, attention_mask=mask)
    with pytest.raises(UserError, match=r"an attention_mask of the ids' shape \(4, 45\), not \(4, 44\)"):
        tmbench.generate(model, {"input_ids": ids, "attention_mask": right[:, 1:]}, 2)


def test_prepared_prefills_take_no_padding(padded):
    model = small("llama")
    with (
        torch.inference_mode(),
        applied(model, "dense") as session,
        prepared(model, session, EAGER) as prefill,
        pytest.raises(ValueError, match="padding takes a plain prefill"),
    ):
        prefill(padded["input_ids"], mask=padded["attention_mask"])


LONG: dict[str, Any] = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("changes", "rope", "served"),
    [
        ({"max_position_embeddings": 40}, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, False),
        ({"max_position_embeddings": 45}, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, True),
        ({"original_max_position_embeddings": 40}, LONG, False),
        ({"original_max_position_embeddings": 45}, LONG, True),
    ],
)
def test_texts_that_are_rotated_unlike_are_refused(changes, rope, served, make_model, padded):
    """One batch has one set of frequencies: that of its longest text."""
    family = "phi3" if rope["rope_type"] == "longrope" else "llama"
    model = make_model(family, sliding_window=None, rope_parameters=rope, **changes)
    with torch.inference_mode(), applied(model, "dense"):
        if not served:
            with pytest.raises(UnsupportedModelError, match="rotary embeddings depend on the length of each"):
                model(**padded)
            return
        got = model(**padded).logits
        for row, ids in enumerate(texts(padded)[:3]):
            near(got[row, OFFSETS[row] :], model(ids).logits[0])
