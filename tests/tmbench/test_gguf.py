"""GGUF files: what they are named by, what they are refused for, and that they are the model that was written."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch

import small_gguf
from tmbench.engine.attention import applied
from tmbench.errors import UserError
from tmbench.measure.spec import ModelSource
from tmbench.models import gguf, loading
from tmbench.models.gguf import GgufFile, joined
from tmbench.report.settings import TtftSetting
from tmbench.results.rows import TtftRow
from tmbench.results.tables import read_all

readable = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in gguf.PACKAGES), reason="tmbench[gguf] is not installed"
)


@pytest.fixture
def model(make_model):
    return make_model("llama", vocab_size=3057, bos_token_id=0, eos_token_id=1, num_hidden_layers=2)


def test_names(tmp_path):
    (tmp_path / "a").mkdir()
    assert GgufFile.of(str(tmp_path)) is None
    assert GgufFile.of(str(tmp_path / "a" / "m.gguf")) == GgufFile(str(tmp_path / "a"), "m.gguf", local=True)
    assert GgufFile.of("owner/name/Q4/m.gguf") == GgufFile("owner/name", "Q4/m.gguf", local=False)
    assert GgufFile.of("./name/m.gguf") == GgufFile("name", "m.gguf", local=True)
    assert joined("owner/name/", "Q4/m.gguf") == "owner/name/Q4/m.gguf"
    assert joined("owner/name", None) == "owner/name"


def test_what_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--gguf-file m\.bin is not the name of a GGUF file, which ends in \.gguf"):
        loading.load("tiny", device="cpu", gguf_file="m.bin")
    with pytest.raises(
        UserError, match=r"--gguf-file m\.gguf is in the folder .*, and a\.gguf is a file itself: leave it out"
    ):
        loading.load("a.gguf", device="cpu", gguf_file="m.gguf")
    name = str(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf, "find_spec", lambda package: None if package == "accelerate" else "there")
    with pytest.raises(UserError, match=r"accelerate is not installed: pip install 'tmbench\[gguf\]'$"):
        loading.load(name, device="cpu")
    monkeypatch.setattr(gguf, "find_spec", lambda package: "there")
    with pytest.raises(UserError, match=r"m\.gguf cannot be loaded: No such file or directory; check the path"):
        loading.load(str(tmp_path), device="cpu", gguf_file="m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"version https://git-lfs")
    with pytest.raises(UserError, match=r"m\.gguf is no GGUF file, whatever its name: download it again"):
        loading.load(name, device="cpu")
    with pytest.raises(UserError, match=r"--revision v1 is of a Hugging Face id, but .* is a file of this machine"):
        loading.load(name, device="cpu", revision="v1")


@readable
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "error"), [("F32", 1e-5), ("Q8_0", 0.05)])
def test_it_is_the_model_that_was_written(kind, error, model, tmp_path, prompt):
    small_gguf.write(tmp_path / "m.gguf", model, kind)
    loaded = loading.load(str(tmp_path / "m.gguf"), device="cpu")
    assert loaded.quantization == loaded.row_fields()["quantization"] == f"gguf {kind}, dequantized"
    tokenizer = loaded.need_tokenizer("a test")
    assert tokenizer.decode(tokenizer("one 12")["input_ids"]) == "one 12"
    assert loaded.max_length == 512
    ids = prompt(300)
    with torch.inference_mode(), applied(loaded.model, "dense"):
        got = loaded.model(ids).logits
    with torch.inference_mode():
        expected = model(ids).logits
    assert (got - expected).square().mean().sqrt() < error * expected.square().mean().sqrt()
    # Named by its folder it is the same, and so is what loads it once more; another file is another model.
    again = loading.load(str(tmp_path), device="cpu", gguf_file="m.gguf", plan_only=True)
    assert again.row_fields() == loaded.row_fields() == ModelSource.of(loaded).load().row_fields()
    small_gguf.write(tmp_path / "other.gguf", model, "F16")
    assert loading.load(str(tmp_path / "other.gguf"), device="cpu").model_hash != loaded.model_hash
    drawn = loading.load(str(tmp_path / "m.gguf"), device="cpu", weights="random")
    assert (drawn.quantization, drawn.weights) == ("", "random")
    assert drawn.model_hash != loaded.model_hash


@readable
@pytest.mark.slow
def test_a_file_of_the_hub_is_known_by_its_commit(model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "cache" / "models--some--model"
    (kept / "refs").mkdir(parents=True)
    for branch, commit, kind in (("v1", "1" * 40, "F32"), ("main", "2" * 40, "F16")):
        folder = kept / "snapshots" / commit / "sub"
        folder.mkdir(parents=True)
        small_gguf.write(folder / "m.gguf", model, kind)
        (kept / "refs" / branch).write_text(commit)
    hashes = set()
    for revision, commit, kind in (("v1", "1" * 40, "F32"), (None, "2" * 40, "F16"), ("2" * 40, "2" * 40, "F16")):
        loaded = loading.load("some/model", device="cpu", revision=revision, gguf_file="sub/m.gguf")
        assert (loaded.name, loaded.revision) == ("some/model/sub/m.gguf", commit)
        assert loaded.quantization == f"gguf {kind}, dequantized"
        assert ModelSource.of(loaded).load(plan_only=True).row_fields() == loaded.row_fields()
        hashes.add(loaded.model_hash)
    assert len(hashes) == 2


@readable
@pytest.mark.slow
def test_commands_take_a_file(model, tmp_path, tmbench):
    small_gguf.write(tmp_path / "m.gguf", model, "Q8_0")
    given = ("ttft", "--model", str(tmp_path), "--length", "256", "--method", "dense", "--repeats", "1", "--device", "cpu",
             "--output-dir", str(tmp_path / "results"))  # fmt: skip
    code, out, err = tmbench(*given)
    assert (code, out) == (2, "")
    assert "is no checkpoint but holds a GGUF file: add --gguf-file m.gguf" in err
    code, out, err = tmbench(*given, "--gguf-file", "m.gguf", "--json")
    assert code == 0, err
    (row,) = read_all(tmp_path / "results", TtftRow)
    assert (row.model, row.quantization) == (str(tmp_path / "m.gguf"), "gguf Q8_0, dequantized")
    assert json.loads(out)[0]["quantization"] == row.quantization
    assert "checkpoint weights (gguf Q8_0, dequantized), float32" in TtftSetting.of(row, 0).subject
    shutil.rmtree(tmp_path / "results")
    for command in (
        ("list", "--model", str(tmp_path / "m.gguf")),
        ("ruler-data", "--model", str(tmp_path), "--gguf-file", "m.gguf", "--length", "1K", "--task", "vt", "--samples", "1",
         "--output", str(tmp_path / "data")),
        (*given, "--gguf-file", "m.gguf", "--dry-run"),
    ):  # fmt: skip
        code, out, err = tmbench(*command)
        assert code == 0, err
