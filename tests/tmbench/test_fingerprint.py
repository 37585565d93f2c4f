"""What a checkpoint is known by: its files' contents, and nothing else about them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tmbench.models import fingerprint, loading
from tmbench.models.fingerprint import of_folder, of_ids
from tmbench.models.loading import content_hash

TINY = Path(loading.__file__).parent / "tiny"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the embedded model's files."""
    folder = tmp_path / "ckpt"
    shutil.copytree(TINY, folder)
    return folder


def changed(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


EDITS = {
    "the last weight": lambda folder: flipped(folder / "model.safetensors", -1),
    "a weight in the middle": lambda folder: flipped(folder / "model.safetensors", 7_000_000),
    "config": lambda folder: changed(folder / "config.json", rope_theta=7.0),
    "generation config": lambda folder: changed(folder / "generation_config.json", repetition_penalty=1.1),
    "a generation config less": lambda folder: (folder / "generation_config.json").unlink(),
    "tokenizer": lambda folder: changed(folder / "tokenizer.json", truncation=None, version="1.1"),
    "tokenizer config": lambda folder: changed(folder / "tokenizer_config.json", add_bos_token=True),
    "special tokens": lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
    "vocabulary": lambda folder: (folder / "vocab.json").write_text("{}"),
    "sentence pieces": lambda folder: (folder / "tokenizer.model").write_bytes(b"pieces"),
    "a template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "a further template": lambda folder: (
        (folder / "additional_chat_templates").mkdir(),
        (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_every_file_that_is_read_counts(checkpoint, edit):
    before = content_hash(str(checkpoint), "checkpoint")
    EDITS[edit](checkpoint)
    assert content_hash(str(checkpoint), "checkpoint") != before


def test_what_is_not_read_does_not_count(checkpoint, tmp_path):
    before = content_hash(str(checkpoint), "checkpoint")
    assert before == content_hash("tiny", "checkpoint"), "a copy under another name is the same model"
    assert len(before) == 12
    (checkpoint / "README.md").write_text("another card")
    for name in ("training_args.bin", "consolidated.safetensors", "pytorch_model.bin", "optimizer.pt", ".gitattributes"):
        (checkpoint / name).write_bytes(b"not read: model.safetensors is there")
    (checkpoint / "original").mkdir()
    (checkpoint / "original" / "model.safetensors").write_bytes(b"x")
    for path in checkpoint.iterdir():
        os.utime(path, (1, 1))
    assert content_hash(str(checkpoint), "checkpoint") == before
    # As the Hub's cache keeps a snapshot: every file is a link.
    (tmp_path / "links").mkdir()
    for path in checkpoint.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert content_hash(str(tmp_path / "links"), "checkpoint") == before


def test_drawn_weights_are_known_by_what_they_are_drawn_for(checkpoint):
    random, structured = content_hash(str(checkpoint), "random"), content_hash(str(checkpoint), "structured")
    assert len({random, structured, content_hash(str(checkpoint), "checkpoint")}) == 3
    flipped(checkpoint / "model.safetensors", -1)
    (checkpoint / "generation_config.json").unlink()
    assert content_hash(str(checkpoint), "random") == random
    changed(checkpoint / "tokenizer_config.json", add_bos_token=True)
    assert content_hash(str(checkpoint), "random") != random
    changed(checkpoint / "config.json", hidden_size=512)
    assert content_hash(str(checkpoint), "structured") != structured
    presets = {content_hash(name, kind) for name in ("llama-3.1-8b", "qwen2.5-7b") for kind in ("random", "structured")}
    assert len(presets) == 4


@pytest.mark.slow
def test_rows_have_the_hash_that_is_known_before_loading(checkpoint):
    loaded = loading.load(str(checkpoint), device="cpu")
    assert loaded.row_fields()["model_hash"] == loaded.shape.model_hash == content_hash(str(checkpoint), "checkpoint")


def test_shards_count_by_their_index(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert fingerprint.files_read(checkpoint, weights=True)[-1] == "tokenizer_config.json"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard, value in zip(index["weight_map"].values(), (1.0, 2.0), strict=True):
        save_file({"x": torch.full((4,), value)}, checkpoint / shard)
    (checkpoint / "model-00009-of-00009.safetensors").write_bytes(b"left over")
    read = fingerprint.files_read(checkpoint)
    assert [name for name in read if name.startswith("model")] == [
        *index["weight_map"].values(),
        "model.safetensors.index.json",
    ]
    before = of_folder(checkpoint)
    save_file({"x": torch.full((4,), 3.0)}, checkpoint / "model-00002-of-00002.safetensors")
    assert of_folder(checkpoint) != before


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_of_large_weights_a_change_of_any_one_tensor_shows(tmp_path, monkeypatch, end):
    """Every tensor here is larger than what is read of it, and is changed by a little noise everywhere."""
    monkeypatch.setattr(fingerprint, "WHOLE", 2**16)
    monkeypatch.setattr(fingerprint, "BLOCK", 64)
    monkeypatch.setattr(fingerprint, "OTHER_BLOCKS", 8)
    monkeypatch.setattr(fingerprint, "END", 2**12)
    names = [f"layers.{number}.weight" for number in range(9)]
    whole = {name: torch.randn(5000, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(names)}
    (tmp_path / "config.json").write_text("{}")

    def made(tensors):
        if end == "bin":
            torch.save(tensors, tmp_path / "pytorch_model.bin")
        else:
            save_file(tensors, tmp_path / "model.safetensors")
        return of_folder(tmp_path)

    read = []
    real = fingerprint._spaced
    monkeypatch.setattr(fingerprint, "_spaced", lambda *a: (read.append(part) or part for part in real(*a)))
    assert made(whole) == made(whole)
    assert sum(end - begin for begin, end in read) < 2 * 9 * 5000 * 4 / 10, "cheap: a part is read"
    hashes = {made(whole | {name: whole[name] * (1 + 1e-3)}) for name in names}
    assert len(hashes | {made(whole)}) == 10
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert made(whole) not in hashes


def test_a_hub_models_files_are_those_of_its_snapshot(checkpoint, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    kept = tmp_path / "cache" / "models--some--model"
    shutil.copytree(checkpoint, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    for revision in (commit, ""):
        assert content_hash("some/model", "checkpoint", revision) == content_hash("tiny", "checkpoint")
    assert content_hash("some/other", "checkpoint") == ""


def test_ids_are_told_apart_by_where_they_part():
    assert len({of_ids(ids) for ids in ((1, 23), (12, 3), (1, 2, 3), (123,), ())}) == 5
