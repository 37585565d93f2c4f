"""Models by name, and one sentence for each that cannot be had."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tmbench.engine.roofline import linear_flop_by_layer
from tmbench.errors import UserError
from tmbench.methods.plan import HALF, ModelShape, default_layers
from tmbench.models import loading
from tmbench.models.attention_modules import attention_modules
from tmbench.models.loading import LoadedModel
from tmbench.models.presets import preset_names
from tmbench.suites.prompts import check_prompt


@pytest.fixture
def checkpoint(make_model, tmp_path):
    """A checkpoint folder of a small model, without a tokenizer."""
    make_model("qwen2").save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_tiny_is_embedded_and_says_what_it_is():
    loaded = loading.load("tiny", device="cpu")
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
    first, second = (loading.load(str(checkpoint), weights="random", device="cpu") for _ in range(2))
    assert first.tokenizer is None
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="no tokenizer, which RULER needs: use another --model"):
        first.need_tokenizer("RULER")
    with pytest.raises(UserError, match="no tokenizer, which --prompt kv needs: use --prompt random"):
        check_prompt("kv", first)


def test_a_type_and_a_device_can_be_asked_for(checkpoint):
    assert loading.load(str(checkpoint), weights="random", device="cpu", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(UserError, match="--dtype float8 is unknown: choose from float32"):
        loading.load(str(checkpoint), dtype="float8", device="cpu")
    with pytest.raises(UserError, match="--device nonsense cannot be used here"):
        loading.load(str(checkpoint), device="nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_absent_gpu_is_one_sentence(checkpoint):
    with pytest.raises(UserError, match="--device cuda cannot be used here .*: try --device cpu"):
        loading.load(str(checkpoint), device="cuda")


def test_a_checkpoint_without_weights_or_config_is_one_sentence(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--model .*small cannot be loaded: "):
        loading.load(str(checkpoint), device="cpu")
    with pytest.raises(UserError, match="--model .*nowhere cannot be loaded: "):
        loading.load(str(tmp_path / "nowhere"), device="cpu")


def test_a_checkpoint_of_an_unknown_kind_is_one_sentence(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(UserError, match="--model .*small cannot be loaded: "):
        loading.load(str(checkpoint), device="cpu")


def test_lengths_past_the_positions_are_refused(checkpoint):
    loaded = loading.load(str(checkpoint), weights="random", device="cpu")
    loaded.check_length(513)
    trained = replace(loaded, weights="checkpoint")
    trained.check_length(512)
    with pytest.raises(UserError, match="--length 513 is more than the 512 positions"):
        trained.check_length(513)


def test_random_weights_do_not_lengthen_a_table_of_positions(tmp_path):
    config = CONFIG_MAPPING["gpt2"](vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--length 65 is more than the 64 positions"):
        loading.load(str(tmp_path), weights="random", device="cpu").check_length(65)


@pytest.mark.parametrize(
    ("name", "parameters", "layers", "heads", "kv_heads", "start", "rope"),
    [
        (
            "llama-3.1-8b", 8_030_261_248, 32, 32, 8, 16,
            {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192},
        ),
        ("qwen2.5-7b", 7_615_616_512, 28, 28, 4, 20, {"rope_type": "default", "rope_theta": 1000000.0}),
        (
            "llama-3.1-70b", 70_553_706_496, 80, 64, 8, None,
            {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192},
        ),
        ("qwen2.5-72b", 72_706_203_648, 80, 64, 8, None, {"rope_type": "default", "rope_theta": 1000000.0}),
    ],
)  # fmt: skip
def test_presets_are_the_published_configurations(name, parameters, layers, heads, kv_heads, start, rope):
    config = loading.load_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    loaded = LoadedModel(name, model, None, "random", "")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert [x.shape for x in loaded.qkv(5)] == [(1, heads, 5, 128), (1, kv_heads, 5, 128), (1, kv_heads, 5, 128)]
    assert config.rope_parameters == rope
    assert loaded.max_length is None
    assert len(attention_modules(model)) == layers
    # Nothing is published for the large ones.
    first, source = (layers // 2, HALF) if start is None else (start, "published")
    assert default_layers(ModelShape.of(model))[:2] == (tuple(range(first, layers)), source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "active", "full", "deep", "sizes"),
    [
        ("qwen3-8b", 8_190_735_360, 6.95e9, 36, 18, (32, 8, 128, 128)),
        ("qwen3-30b-a3b", 30_532_122_624, 2.72e9, 48, 24, (32, 4, 128, 128)),
        ("gemma-3-12b", 11_766_034_176, 10.76e9, 8, 4, (16, 8, 256, 256)),
        ("gpt-oss-20b", 20_914_757_184, 3.03e9, 12, 6, (64, 8, 64, 64)),
        ("qwen3.5-9b", 8_953_803_264, 6.92e9, 8, 4, (16, 4, 256, 256)),
        ("llama-4-scout-layers", 28_494_197_760, 3.78e9, 3, 2, (40, 8, 128, 128)),
        ("glm-4-lite", 29_943_390_976, 3.26e9, 47, 24, (20, 20, 256, 256)),
    ],
)  # fmt: skip
def test_presets_of_newer_families(name, parameters, active, full, deep, sizes):
    """``active`` are the weights that work on a token, the head's aside."""
    loaded = loading.load(name, weights="random", device="cpu", plan_only=True)
    model, shape = loaded.model, loaded.geometry
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (shape.heads, shape.kv_heads, shape.qk_head_dim, shape.v_head_dim) == sizes
    assert len(loaded.shape.full) == full
    assert len(default_layers(loaded.shape).layers) == deep
    work = linear_flop_by_layer(model, 4096)
    # Of the last layer little is done: all others stand for it.
    done = sum(flop for layer, flop in work.items() if layer is not None and layer < shape.layers - 1)
    assert done / 8192 * shape.layers / (shape.layers - 1) == pytest.approx(active, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer", "attention", "router", "experts"),
    [
        ("qwen3-30b-a3b", 5, 2048 * 128 * (32 + 4 + 4 + 32), 2048 * 128, 8 * 3 * 2048 * 768),
        ("gpt-oss-20b", 5, 2880 * 64 * (64 + 8 + 8 + 64), 2880 * 32, 4 * 3 * 2880 * 2880),
        ("llama-4-scout-layers", 5, 5120 * 128 * (40 + 8 + 8 + 40), 5120 * 16, (1 + 1) * 3 * 5120 * 8192),
        (
            "glm-4-lite",
            5,
            2048 * 768 + 768 * 20 * (192 + 64) + 2048 * (512 + 64) + 512 * 20 * (192 + 256) + 20 * 256 * 2048,
            2048 * 64,
            (4 + 1) * 3 * 2048 * 1536,
        ),
        # Its first layer has an MLP.
        (
            "glm-4-lite",
            0,
            2048 * 768 + 768 * 20 * (192 + 64) + 2048 * (512 + 64) + 512 * 20 * (192 + 256) + 20 * 256 * 2048,
            0,
            3 * 2048 * 10240,
        ),
        (
            "deepseek_v3",
            4,
            7168 * 1536 + 1536 * 128 * (128 + 64) + 7168 * (512 + 64) + 512 * 128 * (128 + 128) + 128 * 128 * 7168,
            7168 * 256,
            (8 + 1) * 3 * 7168 * 2048,
        ),
    ],
)
def test_the_roofline_counts_the_experts_of_a_token_and_no_others(name, layer, attention, router, experts):
    """Each weight that works on a token does two operations: by the published sizes, experts that all tokens share too."""
    config = CONFIG_MAPPING[name](num_hidden_layers=6) if name in CONFIG_MAPPING else loading.load_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert linear_flop_by_layer(model, 1000)[layer] == 2 * 1000 * (attention + router + experts)


def test_auto_is_the_type_that_the_config_says(checkpoint):
    path = checkpoint
    config = json.loads((path / "config.json").read_text())
    for said, loaded in (("bfloat16", "bfloat16"), ("float32", "float32")):
        (path / "config.json").write_text(json.dumps(config | {"dtype": said}))
        assert loading.load(str(path), weights="random", device="cpu", dtype="auto").dtype == loaded
    others: list[tuple[str | None, str]] = [("float64", "says float64"), (None, "says no type")]
    for other, words in others:
        (path / "config.json").write_text(json.dumps(config | {"dtype": other}))
        with pytest.raises(UserError, match=f"--dtype auto: the config of .* {words}: choose from float32, bfloat16"):
            loading.load(str(path), weights="random", device="cpu", dtype="auto")


def test_a_revision_is_of_a_hugging_face_id(checkpoint, make_model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    make_model("llama").save_pretrained(tmp_path / "old")
    for name, words in ((str(checkpoint), "a folder"), ("tiny", "the embedded model")):
        with pytest.raises(UserError, match=f"--revision v1 is of a Hugging Face id, but .* is {words}: leave it out"):
            loading.load(name, device="cpu", revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "cache" / "models--some--model"
    for branch, commit, folder in (("v1", "1" * 40, tmp_path / "old"), ("main", "2" * 40, checkpoint)):
        shutil.copytree(folder, kept / "snapshots" / commit)
        (kept / "refs").mkdir(exist_ok=True)
        (kept / "refs" / branch).write_text(commit)
    for revision, family, commit in (("v1", "llama", "1" * 40), (None, "qwen2", "2" * 40)):
        loaded = loading.load("some/model", device="cpu", weights="random", revision=revision)
        assert (loaded.model.config.model_type, loaded.revision) == (family, commit)


def test_slow_code_of_a_models_own_layers_is_said_aloud(monkeypatch):
    cuda, config = torch.device("cuda"), loading.load_config("qwen3.5-9b")
    monkeypatch.setattr(loading, "find_spec", lambda module: None if module == "fla" else module)
    note = loading.kernels_note("m", config, cuda)
    assert note.startswith("m has layers of linear or recurrent attention, which transformers computes by reference code")
    assert "where flash-linear-attention is missing" in note
    assert not loading.kernels_note("m", config, torch.device("cpu"))
    assert not loading.kernels_note("m", loading.load_config("qwen3-8b"), cuda)
    monkeypatch.setattr(loading, "find_spec", lambda module: module)
    assert not loading.kernels_note("m", config, cuda)


def test_a_preset_has_neither_weights_nor_tokenizer():
    for name in preset_names():
        drawn = name.startswith(("llama-3", "qwen2", "qwen3-"))
        kinds = "--weights random or --weights structured" if drawn else "--weights random"
        checkpoint = loading.load_config(name)._name_or_path
        with pytest.raises(
            UserError, match=f"--model {name} is a preset, .*: add {kinds}, or give the real checkpoint, {checkpoint} or"
        ):
            loading.load(name, device="cpu")
        with pytest.raises(UserError, match=f"--model {name} is a preset, a config without a tokenizer"):
            loading.load_tokenizer(name)


def test_a_folder_comes_before_a_preset_of_its_name(checkpoint, monkeypatch):
    checkpoint.rename(checkpoint.with_name("qwen2.5-7b"))
    monkeypatch.chdir(checkpoint.parent)
    assert loading.load("qwen2.5-7b", weights="random", device="cpu").model.config.hidden_size == 64


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("CUDA error: device-side assert"), "cannot be made: CUDA error: device-side assert$"),
        (MemoryError(), "does not fit in memory: try a smaller --dtype$"),
        (torch.OutOfMemoryError("CUDA out of memory."), "in memory: try a smaller --dtype, or several GPUs by torchrun$"),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 139.80 GiB of which "
                "1.25 GiB is free. Including non-PyTorch memory, this process has 70.00 GiB memory in use."
            ),
            r"memory \(GPU 1 has a total capacity of 139\.80 GiB of which 1\.25 GiB is free\): try a smaller --dtype, or",
        ),
    ],
)
@pytest.mark.parametrize("name", ["tiny", "llama-3.1-70b"])
def test_a_model_that_is_made_here_is_not_looked_for_at_the_hub(monkeypatch, name, error, sentence):
    def fail(*given: object) -> None:
        raise error

    monkeypatch.setattr(loading, "_drawn", fail)
    with pytest.raises(UserError, match=sentence):
        loading.load(name, weights="random", device="cpu")
