"""``--rope-scaling``: what it reads, what it is refused for, and that its rows are of a model of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tmbench.errors import UserError
from tmbench.measure.spec import ModelSource
from tmbench.models import loading
from tmbench.models.rope_scaling import RopeScaling, obstacle
from tmbench.report.settings import TtftSetting
from tmbench.results.rows import RulerRow, TtftRow
from tmbench.results.tables import read_all

TINY = Path(loading.__file__).parent / "tiny"
YARN = "yarn:factor=2,original=512"


@pytest.fixture
def folder(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("yarn:original=32768, factor=4.0", "yarn:factor=4,original=32768"),
        ('{"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768, "truncate": false}',
         "yarn:factor=4,original=32768,truncate=false"),
        ('{"rope_type": "linear", "factor": 2.5}', "linear:factor=2.5"),
        ("dynamic:factor=2", "dynamic:factor=2"),
        ("llama3:factor=8,original=8192", "llama3:factor=8,original=8192,low_freq_factor=1,high_freq_factor=4"),
    ],
)  # fmt: skip
def test_one_text_for_what_is_the_same(text, meant):
    found = RopeScaling.parse(text)
    assert str(found) == meant
    assert RopeScaling.parse(meant) == found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ntk:factor=2", "has no type that is known: choose from yarn, linear, llama3, dynamic"),
        ('{"factor": 2}', "has no type that is known"),
        ("{", "is not JSON: give for instance yarn:factor=4"),
        ("yarn", "has no factor: give for instance yarn:factor=4"),
        ("yarn:factor", "'factor' gives no number"),
        ("linear:factor=two", "'factor=two' gives no number"),
        ("linear:factor=0.5", "factor must be a number of 1 or more"),
        ("linear:factor=Infinity", "'factor=Infinity' gives no number"),
        ("yarn:factor=2,original=0.5", "original must be a whole number of 1 or more"),
        ("linear:factor=2,original=512", "linear has no original; it reads factor"),
        ("yarn:factor=2,truncate=1", "truncate must be true or false"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text, sentence):
    with pytest.raises(UserError, match=f"^--rope-scaling .*{sentence}"):
        RopeScaling.parse(text)


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "llama3"])
def test_the_model_is_that_of_a_config_which_says_the_same(kind, folder, prompt, make_model):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = 512
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theta = loading.load_config(str(folder)).rope_parameters["rope_theta"]
    config = CONFIG_MAPPING["llama"].from_pretrained(folder, rope_parameters=rope | {"rope_theta": theta})
    expected = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    plain = loading.load(str(folder), device="cpu")
    loaded = loading.load(str(folder), device="cpu", rope_scaling=f"{kind}:factor=2")
    ids = prompt(700)
    with torch.inference_mode():
        got, wanted, without = (model(ids).logits for model in (loaded.model, expected, plain.model))
    assert torch.equal(got, wanted)
    assert not torch.allclose(got, without, atol=1e-3)
    assert (plain.max_length, loaded.max_length) == (512, 1024)
    loaded.check_length(1024)
    with pytest.raises(UserError, match=f"1025 is more than the 1024 positions of .* under --rope-scaling {kind}:factor=2"):
        loaded.check_length(1025)
    with pytest.raises(
        UserError, match="700 is more than the 512 positions .*: give 512 or less, --rope-scaling, or another"
    ):
        plain.check_length(700)


def test_what_loads_the_model_once_more_scales_it_too(folder):
    loaded = loading.load(str(folder), device="cpu", rope_scaling="yarn:factor=2")
    assert loaded.rope_scaling == loaded.row_fields()["rope_scaling"] == YARN
    again = ModelSource.of(loaded).load(plan_only=True)
    assert again.row_fields() == loaded.row_fields()
    plain = loading.load(str(folder), device="cpu")
    assert len({plain.model_hash, loaded.model_hash, ""}) == 3, "a probe or a head's pattern of one is not the other's"
    assert replace(loaded, rope_scaling="").row_fields() != loaded.row_fields()


def test_models_that_cannot_be_scaled(tmp_path, make_model):
    make_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}).save_pretrained(
        tmp_path / "scaled"
    )
    make_model("gemma3_text").save_pretrained(tmp_path / "kinds")
    config = CONFIG_MAPPING["gpt2"](vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    config.save_pretrained(tmp_path / "table")
    for name, sentence in {
        "scaled": "whose config has rotary embeddings of type linear already: leave it out",
        "kinds": "which has rotary embeddings of its own in each kind of layer: give their scaling in its config.json",
        "table": "which has no rotary embeddings: leave it out",
    }.items():
        with pytest.raises(UserError, match=f"^--rope-scaling does not go with --model .*{name}, {sentence}"):
            loading.load(str(tmp_path / name), weights="random", device="cpu", rope_scaling=YARN)
    # And it is not proposed where it would be refused.
    table = loading.load(str(tmp_path / "table"), weights="random", device="cpu")
    with pytest.raises(UserError, match="65 is more than the 64 positions of .*: give 64 or less, or another --model"):
        table.check_length(65)


def test_a_config_without_positions_has_nothing_to_scale():
    assert obstacle(CONFIG_MAPPING["llama"]()) == ""
    text = SimpleNamespace(rope_parameters={"rope_type": "default"})
    config = SimpleNamespace(get_text_config=lambda: text)
    assert obstacle(config).startswith("whose config does not say how many positions it has")


def test_a_model_that_does_not_heed_its_config(make_model):
    with pytest.raises(UserError, match="as LlamaForCausalLM has rotary embeddings that its config does not scale"):
        RopeScaling.parse(YARN).check_heeded("m", make_model("llama"))


@pytest.mark.slow
def test_rows_of_another_scaling_are_measured_anew(tmbench, tmp_path):
    given = (
        "ttft",
        "--length",
        "256",
        "--method",
        "dense",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--output-dir",
        str(tmp_path),
    )
    for option in (
        (),
        ("--rope-scaling", "yarn:factor=2"),
        ("--rope-scaling", "yarn:factor=4"),
        ("--rope-scaling", "yarn:factor=2"),
    ):
        code, _, err = tmbench(*given, *option)
        assert code == 0, err
    rows = read_all(tmp_path, TtftRow)
    scalings = ["", "yarn:factor=2,original=16384", "yarn:factor=4,original=16384"]
    assert [row.rope_scaling for row in rows] == scalings
    assert len({row.digest for row in rows}) == 3
    assert "nothing was measured" in err.lower() or "already" in err.lower()
    settings = [TtftSetting.of(row, 0) for row in rows]
    assert len(set(settings)) == 3
    assert settings[1].subject.endswith("checkpoint weights, float32, rope scaling yarn:factor=2,original=16384")
    code, out, err = tmbench("ttft", "--length", "32K", "--rope-scaling", "yarn:factor=2", "--device", "cpu", "--dry-run")
    assert code == 0, err
    assert "32768" in out
    code, out, err = tmbench("list", "--model", "tiny", "--rope-scaling", json.dumps({"rope_type": "linear", "factor": 2}))
    assert "32K" in out
    code, out, err = tmbench("list", "--rope-scaling", "yarn:factor=2")
    assert (code, out) == (2, "")
    assert "--rope-scaling says how --model is loaded, which is not given: leave it out" in err


@pytest.mark.slow
def test_workers_and_shards_scale_it_too(tmbench, tmp_path):
    given = ("ruler", "--length", "768", "--task", "vt", "--samples", "2", "--method", "dense", "--offline",
             "--device", "cpu", "--rope-scaling", "linear:factor=4")  # fmt: skip
    for name, options in {
        "here": (), "workers": ("--executor", "processes", "--workers", "1"), "shards": ("--shard", "1/1"),
    }.items():  # fmt: skip
        code, _, err = tmbench(*given, *options, "--output-dir", str(tmp_path / name))
        assert code == 0, err
    code, _, err = tmbench("merge", str(tmp_path / "shards"), "--output-dir", str(tmp_path / "shards"))
    assert code == 0, err
    rows = [row for name in ("here", "workers", "shards") for row in read_all(tmp_path / name, RulerRow)]
    assert [row.rope_scaling for row in rows] == ["linear:factor=4"] * 3
    assert len({(row.key, row.score) for row in rows}) == 1
