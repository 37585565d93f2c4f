"""``--attn-native``: transformers' own attention as one more row, by the function that the model was loaded with."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tmbench.engine import own_attention
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN
from tmbench.engine.session import running
from tmbench.errors import UnsupportedModelError
from tmbench.methods.attn_native import BASELINE
from tmbench.methods.plan import ModelShape
from tmbench.methods.table import METHODS

SINKS = {"layer_types": ["full_attention"] * 4, "num_local_experts": 4, "num_experts_per_tok": 2}
CAPPED = {"layer_types": ["full_attention"] * 4, "attn_logit_softcapping": 2.0}


LLAMA: tuple[Any, ...] = ("llama", {}, "sdpa")
OTHERS: tuple[tuple[Any, ...], ...] = (
    ("gpt_oss", SINKS, "eager"), ("gemma2", CAPPED, None), ("qwen3", {"sliding_window": None}, "sdpa"),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "name", "kind"),
    [*((*one, kind) for one in (LLAMA, *OTHERS) for kind in (PLAIN, EAGER)), (*LLAMA, COMPILED)],
)
def test_it_is_what_the_model_computes(family, changes, name, kind, make_model, prompt):
    model, ids = make_model(family, **changes), prompt(60, 2)
    loaded_with = model.config._attn_implementation
    assert name in (None, loaded_with)
    with torch.inference_mode():
        expected = model(ids).logits[:, -1]
        with running(model, BASELINE.plan(ModelShape.of(model)), kind) as session, session.prefill() as prefill:
            got = prefill(ids)
            session.applied.check_complete()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert session.applied.backends == {f"attn_native:{loaded_with}"}
    assert model.config._attn_implementation == loaded_with


def test_the_function_runs_in_every_layer_and_under_no_method(make_model, prompt, monkeypatch):
    model, ids = make_model("llama"), prompt(60)
    ran = []

    def counted(*given, **about):
        ran.append(given[0].layer_idx)
        return before(*given, **about)

    before = own_attention.sdpa_attention_forward
    monkeypatch.setattr(own_attention, "sdpa_attention_forward", counted)
    shape = ModelShape.of(model)
    for plan, layers in ((METHODS["dense"].plan(shape), []), (BASELINE.plan(shape), [0, 1, 2, 3])):
        ran.clear()
        with torch.inference_mode(), running(model, plan, EAGER) as session, session.prefill() as prefill:
            prefill(ids)
        assert ran == layers


def test_a_model_that_was_loaded_with_something_else_is_refused(make_model):
    model = make_model("llama")
    model.config._attn_implementation = "flex_attention"
    plan, refused = BASELINE.plan(ModelShape.of(model)), "LlamaAttention was loaded with another, flex_attention: leave the"
    with pytest.raises(UnsupportedModelError, match=refused), running(model, plan, PLAIN):
        pass


@pytest.mark.slow
def test_what_it_cannot_show_is_refused_before_anything_is_measured(tmbench, tmp_path, monkeypatch):
    monkeypatch.setattr(own_attention, "SDPA", "none")
    code, out, err = tmbench("ttft", "--length", "512", "--attn-native", "--device", "cpu", "--output-dir", str(tmp_path))
    assert (code, out) == (2, "")
    assert "LlamaAttention was loaded with another, sdpa: leave the option out" in err
    assert not list(tmp_path.iterdir())


def test_it_is_no_method_of_the_table():
    assert BASELINE.name not in METHODS
    assert BASELINE.declared == {}


@pytest.mark.slow
def test_its_rows_have_a_name_of_their_own(tmbench, tmp_path):
    given = ("--attn-native", "--device", "cpu", "--output-dir", str(tmp_path))
    times = ("ttft", "--length", "512", "--method", "dense", "--repeats", "2", "--json")
    code, out, err = tmbench(*times, *given)
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["method"], row["backends"], row["coverage"]) for row in rows] == [
        ("dense", "dense:sdpa", 1.0),
        ("attn_native", "attn_native:sdpa", 1.0),
    ]
    assert rows[0]["interleaved"] == rows[1]["interleaved"] == "dense attn_native"
    assert rows[0]["flop"] == rows[1]["flop"]
    assert rows[1]["logit_error"] < 1e-4
    code, out, err = tmbench("agree", "--length", "256", "--samples", "1", "--new-tokens", "4", "--method", "dense", *given)
    assert code == 0, err
    code, out, err = tmbench("ruler", "--length", "768", "--task", "vt", "--samples", "1", "--method", "dense", "--offline",
                             *given)  # fmt: skip
    assert code == 0, err
    code, out, err = tmbench("ttft", "--length", "512", "--length", "1K", "--method", "dense", "--dry-run", *given)
    assert code == 0, err
    assert "attn_native" in out
    code, out, err = tmbench("report", "--results", str(tmp_path))
    assert code == 0, err
    assert (
        out.count("attn_native is dense attention by transformers' own backend, as the model loads (attn_native:sdpa).") == 3
    )
