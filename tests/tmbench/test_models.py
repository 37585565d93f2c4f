"""Models by name, and one sentence for each that cannot be had."""

from __future__ import annotations

import json

import pytest
import torch

from tmbench import models
from tmbench.errors import UserError


@pytest.fixture
def checkpoint(make_model, tmp_path):
    """A checkpoint folder of a small model, without a tokenizer."""
    make_model("qwen2").save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_tiny_is_embedded_and_says_what_it_is():
    loaded = models.load("tiny", device="cpu")
    config = loaded.model.config
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert (config.model_type, config.num_hidden_layers) == ("llama", 8)
    assert 5e6 <= parameters <= 9e6
    assert loaded.dtype == "float32"
    assert loaded.max_length == 16384
    assert not loaded.model.training
    assert loaded.need_tokenizer("a test").decode(loaded.need_tokenizer("a test")("one 12")["input_ids"][1:]) == "one 12"


def test_random_weights_need_only_the_config(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    first, second = (models.load(str(checkpoint), weights="random", device="cpu") for _ in range(2))
    assert first.tokenizer is None
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="no tokenizer, which --prompt kv needs: use --prompt random"):
        first.need_tokenizer("--prompt kv")


def test_a_type_and_a_device_can_be_asked_for(checkpoint):
    assert models.load(str(checkpoint), weights="random", device="cpu", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(UserError, match="--dtype float8 is unknown: choose from float32"):
        models.load(str(checkpoint), dtype="float8", device="cpu")
    with pytest.raises(UserError, match="--device nonsense cannot be used here"):
        models.load(str(checkpoint), device="nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_absent_gpu_is_one_sentence(checkpoint):
    with pytest.raises(UserError, match="--device cuda cannot be used here .*: try --device cpu"):
        models.load(str(checkpoint), device="cuda")


def test_a_checkpoint_without_weights_or_config_is_one_sentence(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--model .*small cannot be loaded: "):
        models.load(str(checkpoint), device="cpu")
    with pytest.raises(UserError, match="--model .*nowhere cannot be loaded: "):
        models.load(str(tmp_path / "nowhere"), device="cpu")


def test_a_checkpoint_of_an_unknown_kind_is_one_sentence(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(UserError, match="--model .*small cannot be loaded: "):
        models.load(str(checkpoint), device="cpu")


def test_lengths_past_the_positions_are_refused(checkpoint):
    loaded = models.load(str(checkpoint), weights="random", device="cpu")
    loaded.check_length(512)
    with pytest.raises(UserError, match="--length 513 is more than the 512 positions"):
        loaded.check_length(513)
