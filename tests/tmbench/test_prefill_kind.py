"""How a model's prompts can be read: where to compile, what is read as transformers reads it, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch

from tmbench.engine.prefill import COMPILED, EAGER, PLAIN
from tmbench.engine.prefill_kind import compiles, kind_wanted, obstacle_of
from tmbench.errors import UserError

pytestmark = pytest.mark.usefixtures("short_chunks")

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "changes"), [("diffllama", {}), ("gpt2", {}), ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 96})]
)
def test_layers_of_another_build_run_plainly(family, changes, make_model, prompt):
    assert obstacle_of(make_model(family, **changes))


def test_a_model_that_differs_runs_plainly(make_model, monkeypatch):
    model = make_model("llama")
    assert not obstacle_of(model)
    last = type(model.model.layers[-1].mlp)
    forward = last.forward

    def mixes_positions(self, x):
        return forward(self, x) + x.mean(1, keepdim=True)

    monkeypatch.setattr(last, "forward", mixes_positions)
    assert obstacle_of(model)


def test_somebody_elses_wrapper_is_left_in_place(make_model):
    model = make_model("llama")
    model.model.layers[1].mlp.forward = lambda x: x
    assert obstacle_of(model)
    assert "forward" in vars(model.model.layers[1].mlp)


def test_where_to_compile(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert not compiles(cpu, None)
    assert compiles(cpu, True)
    assert compiles(cuda, None)
    assert not compiles(cuda, False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compiles(cuda, None)
    assert not compiles(cpu, False)
    with pytest.raises(UserError, match="--compile needs a compiler.*--no-compile"):
        compiles(cpu, True)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert not compiles(cuda, None)
    with pytest.raises(UserError, match="--compile does not go with TORCHDYNAMO_DISABLE"):
        compiles(cuda, True)


def test_compiling_that_was_asked_for_and_cannot_be_had_is_refused(make_model, monkeypatch, graphs):
    monkeypatch.setenv("CXX", "c++")
    wrapped, other = make_model("llama"), make_model("gpt2")
    assert [kind_wanted(wrapped, CPU, wish) for wish in (True, False, None)] == [COMPILED, EAGER, EAGER]
    wrapped.model.layers[1].mlp.forward = lambda x: x
    for model, name in ((wrapped, "LlamaForCausalLM"), (other, "GPT2LMHeadModel")):
        with pytest.raises(UserError, match=rf"^--compile: {name} cannot be compiled here, as .*: leave the option out$"):
            kind_wanted(model, CPU, True)
        assert [kind_wanted(model, CPU, wish) for wish in (False, None)] == [PLAIN, PLAIN]
    differs = make_model("llama")
    monkeypatch.setattr("tmbench.engine.prefill_kind.agree", lambda got, expected: False)
    with pytest.raises(
        UserError, match=r"^--compile: LlamaForCausalLM cannot be compiled here, as it answers a short prompt"
    ):
        kind_wanted(differs, CPU, True)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"^--compile needs a compiler"):
        kind_wanted(differs, CPU, True)
