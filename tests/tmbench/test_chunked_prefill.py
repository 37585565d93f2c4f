"""A prompt that is fed in chunks reads as in one piece where rules go by positions, in every kind of prefill."""

from __future__ import annotations

import json
from typing import Any

import pytest
import served_families
import torch

import masked
import plans
from tmbench.engine.chunk_kind import check_chunks
from tmbench.engine.chunks import Chunks
from tmbench.engine.kv_cache import CacheSlot, KvCache
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN, Kind, tensors_of
from tmbench.engine.session import running
from tmbench.errors import UnsupportedModelError, UserError

LENGTH = 150
SIZES = (pytest.param(1, marks=pytest.mark.slow), 7, 64, 100, LENGTH)
WINDOW = {"n_init": 2, "n_local": 9, "last_n": 12}
SLIDING: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64, "head_dim": 16},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64, "head_dim": 16},
}

pytestmark = pytest.mark.usefixtures("graphs", "short_chunks")


def plan_of(model, name="tri_mix"):
    return plans.plan_of(model, name, **WINDOW)


@torch.inference_mode()
def read(model, plan, ids, chunks, kind=EAGER):
    """The last position's logits and the cache."""
    with running(model, plan, kind, chunks) as session, session.prefill() as prefill:
        logits = prefill(ids)
        session.applied.check_complete()
        return logits, tensors_of(prefill.cache)


def same(got, expected):
    for one, other in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["dense", "tri_mix", "streaming"])
def test_rules_of_positions_read_chunks_as_one_piece(method, size, make_model, prompt):
    model, ids = make_model("llama"), prompt(LENGTH)
    plan = plan_of(model, method)
    same(read(model, plan, ids, Chunks(size)), read(model, plan, ids, None))


def test_of_an_unknown_length_every_chunk_has_last_rows_of_its_own(make_model, prompt):
    model, ids = make_model("llama"), prompt(LENGTH)
    plan = plan_of(model)
    (got,), _ = read(model, plan, ids, Chunks(50, known=False))
    whole = masked.logits_under(model, ids, masked.masks_of(plan, LENGTH))[-1]
    pieces = masked.logits_under(model, ids, masked.masks_of(plan, LENGTH, [(0, 50), (50, 100), (100, 150)]))[-1]
    torch.testing.assert_close(got, pieces, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [EAGER, pytest.param(COMPILED, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", SLIDING)
def test_windows_reach_back_into_earlier_chunks(family, kind, make_model, prompt):
    model, ids = make_model(family, **SLIDING[family]), prompt(LENGTH)
    plan = plan_of(model)
    for size in (30, 100):
        same(read(model, plan, ids, Chunks(size), kind), read(model, plan, ids, None))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid", "minimax", "lfm2", "gemma4_text", "mimo_v2_flash"])
def test_hybrid_models_read_chunks_as_one_piece(family, prompt):
    model, ids = served_families.small(family), prompt(100)
    for size in (7, 33):
        same(read(model, plan_of(model), ids, Chunks(size)), read(model, plan_of(model), ids, None))


@pytest.mark.slow
def test_compiled_layers_read_chunks(make_model, prompt):
    model, ids = make_model("llama"), prompt(LENGTH, 2)
    plan = plan_of(model)
    for size in (1, 64, 100):
        same(read(model, plan, ids, Chunks(size), COMPILED), read(model, plan, ids, None))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_one_compiled_model_reads_chunks_of_all_sizes(family, prompt):
    """Two kinds of layer, slots and caches, and chunks of one token, which have graphs of their own: too many for torch."""
    model, ids = served_families.small(family), prompt(45)
    plan = plan_of(model)
    whole = read(model, plan, ids, None)
    for size in (44, 7, 1, 45):
        same(read(model, plan, ids, Chunks(size), COMPILED), whole)
        with torch.inference_mode(), running(model, plan, COMPILED, Chunks(size)) as session:
            logits = session.read_into(ids, CacheSlot(KvCache(1, 45), 0))
        torch.testing.assert_close(logits, whole[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EAGER, COMPILED])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe_lite"])
@torch.inference_mode()
def test_latents_of_earlier_chunks_are_made_keys_of_again(family, kind, prompt):
    """The cache holds the latents of all chunks, and attention gets the keys and values of all of them."""
    model, ids = served_families.small(family), prompt(100)
    model.generation_config.eos_token_id = None
    check_chunks(family, model, kind, "--chunk")
    for method in ("tri_mix", "dense"):
        plan = plan_of(model, method)
        whole = read(model, plan, ids, None)
        for size in (7, 32):
            same(read(model, plan, ids, Chunks(size), kind), whole)
    with running(model, plan, kind) as session:
        written = session.generate(ids, 5).tolist()
        # A question that is asked later is one more chunk; under dense attention nothing else changes.
        assert session.generate(ids, 5, 60).tolist() == written
    with running(model, plan, kind, Chunks(32)) as session:
        assert session.generate(ids, 5).tolist() == written
        # A slot of a static cache holds keys and values.
        cache = KvCache(1, 103)
        logits = session.read_into(ids, CacheSlot(cache, 0))
    torch.testing.assert_close(logits, whole[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_chunks_fill_a_slot_and_are_decoded_after(make_model, prompt):
    model, ids = make_model("llama"), prompt(LENGTH)
    model.generation_config.eos_token_id = None
    plan = plan_of(model)
    with running(model, plan, EAGER, Chunks(64)) as session:
        written = session.generate(ids, 5).tolist()
    with running(model, plan, EAGER) as session:
        assert session.generate(ids, 5).tolist() == written
    caches = []
    for chunks in (Chunks(64), None):
        cache = KvCache(2, LENGTH + 3)
        slot = CacheSlot(cache, 1)
        for _ in range(2):
            with running(model, plan, EAGER, chunks) as session:
                session.read_into(ids, slot)
        caches.append(cache)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_window_that_no_pattern_honours_is_refused_though_a_chunk_fits_it(make_model, prompt):
    model = make_model("mistral", sliding_window=100)
    read(model, plan_of(model), prompt(100), Chunks(30))
    for chunks in (None, Chunks(30)):
        with pytest.raises(UnsupportedModelError, match="layer 0 has a sliding window of 100 tokens, which .* give it 100"):
            read(model, plan_of(model), prompt(101), chunks)


@pytest.mark.slow
def test_models_that_read_chunks_otherwise_are_refused(make_model, prompt):
    check_chunks("llama", make_model("llama"), EAGER, "--chunk")
    for family, sizes in SLIDING.items():
        check_chunks(family, make_model(family, **sizes), EAGER, "--chunk")
    dynamic = make_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    refused: list[tuple[Any, Kind, str]] = [
        (make_model("llama"), PLAIN, "as they are read as transformers reads them"),
        (dynamic, EAGER, "as its rotary embeddings depend on a prompt's length"),
        (
            served_families.small("llama4_text"),
            EAGER,
            "as it has layers of chunked attention, whose own chunks lie elsewhere",
        ),
        (served_families.small("jamba"), EAGER, "as it answers a short prompt otherwise than in one piece"),
    ]
    for model, kind, words in refused:
        with pytest.raises(UserError, match=f"--chunk: prompts of a-model cannot be fed in chunks, .*{words}.*: leave"):
            check_chunks("a-model", model, kind, "--chunk")
    with pytest.raises(ValueError, match="a plain prefill reads a prompt in one piece"):
        read(make_model("llama"), plan_of(make_model("llama")), prompt(9), Chunks(4), PLAIN)


@pytest.mark.slow
def test_rows_in_chunks_stand_beside_those_in_one_piece(tmbench, tmp_path):
    asked = ("--task", "niah_single_1", "--length", "1K", "--samples", "2", "--method", "dense", "--method", "tri_mix")
    rows = {}
    for how in ((), ("--chunk", "300"), ("--chunk", "300", "--prompt-length", "unknown")):
        code, out, err = tmbench("ruler", *asked, *how, "--json")
        assert code == 0, err
        rows[how] = json.loads(out)
    said = [{(row["chunk"], row["prompt_length"]) for row in own} for own in rows.values()]
    assert said == [{(0, "")}, {(300, "known")}, {(300, "unknown")}]
    assert len({row["predictions"] for own in rows.values() for row in own}) == 6
    whole, known, unknown = (own[1] for own in rows.values())
    assert known["score"] == whole["score"]
    assert known["coverage"] == pytest.approx(whole["coverage"])
    assert unknown["coverage"] > whole["coverage"]
    code, out, err = tmbench("ttft", "--length", "500", "--chunk", "200", "--method", "dense", "--repeats", "1", "--json")
    assert code == 0, err
    assert [(row["chunk"], row["coverage"]) for row in json.loads(out)] == [(200, 1.0)]
    code, out, _ = tmbench("report")
    assert code == 0
    assert "in chunks of 300, prompt length unknown" in out
    assert "in chunks of 200, prompt length known" in out


def test_options_of_chunks_are_refused_where_they_have_no_meaning(tmbench):
    whole = "--attn-native shows attention over whole prompts and does not go with --chunk: leave it out"
    for arguments, words in (
        (("ttft", "--prompt-length", "known"), "--prompt-length is about prompts in chunks and needs --chunk: leave it out"),
        (("ttft", "--chunk", "1K", "--attn-native"), whole),
        (("probe", "--chunk", "1K"), "--chunk needs --loss, as a probe is of dense attention: leave it out"),
    ):
        code, _, err = tmbench(*arguments)
        assert code == 2
        assert words in err.replace("\n", " ")
