"""Small models of several families with random weights, built from their configs, and the program in this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from report_rows import add_published
from tmbench import cli
from tmbench.measure import ttft
from tmbench.models import loading

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def make_model() -> MakeModel:
    """``make_model("llama", **config)``: a model in evaluation mode, float32, on the CPU."""

    def make(family: str, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](**(SMALL | changes))
        # Random weights of the usual size make attention nearly uniform: larger ones make a wrong mask show.
        config.initializer_range = 0.2
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model.eval()

    return make


@pytest.fixture
def prompt() -> Callable[[int, int], torch.Tensor]:
    """``prompt(length, batch)``: random token ids."""

    def make(length: int, batch: int = 1) -> torch.Tensor:
        return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))

    return make


@pytest.fixture
def tmbench(capsys, monkeypatch, tmp_path):
    """``tmbench("ttft", ...)`` in this process, in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tmbench", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def tokenizer():
    """The embedded model's."""
    return loading.load_tokenizer("tiny")


@pytest.fixture
def copy(tmp_path):
    """A folder with copies of the embedded model's files, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in Path(loading.model_path("tiny")).iterdir():
        if file.suffix in (".json", ".safetensors"):
            shutil.copy(file, folder)
    return folder


@pytest.fixture
def passes(monkeypatch):
    """The lengths of the prefills that were made."""
    made = []
    real = ttft.first_token
    monkeypatch.setattr(ttft, "first_token", lambda prefill, ids: made.append(ids.shape[1]) or real(prefill, ids))
    return made


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile was asked to compile; run as traced, which needs no C++ compiler."""
    seen = []

    def backend(graph, examples):
        seen.append(graph)
        return graph

    monkeypatch.setattr("tmbench.engine.compiled_layers.BACKEND", backend)
    return seen


@pytest.fixture
def short_chunks(monkeypatch):
    """MLPs run over 16 tokens at a time, whatever room a GPU has for more."""
    monkeypatch.setattr("tmbench.engine.chunked_mlp.CHUNK", 16)
    monkeypatch.setattr("tmbench.engine.chunked_mlp.MLP_SHARE", 0)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A results folder with the published figures; not to be written to."""
    root = tmp_path_factory.mktemp("published")
    add_published(root)
    return root
