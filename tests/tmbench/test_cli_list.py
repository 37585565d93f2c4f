"""What ``tmbench list`` and ``tmbench env`` print: methods, tasks, models, backends, and what can be saved on a model."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_list_says_what_a_method_can_save_on_a_model(tmbench):
    """Of 32 layers 8 have full attention, 16 heads of 256: 4 * 256 operations for each of 128K * 128K / 2 pairs."""
    code, out, err = tmbench("list", "--model", "qwen3.5-9b", "--length", "128K", "--length", "32K")
    assert code == 0
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert lines["full attention"][2:4] == ["8", "3,7,11,15,19,23,27,31"]
    # The last layer needs one row of pairs.
    assert float(lines["full attention"][-1]) == pytest.approx(7 * 16 * 4 * 256 * 131072 * 131073 / 2 / 1e12, rel=0.01)
    assert lines["linear or recurrent attention"][-1] == "0"
    assert "saved by tri_mix in layers 19,23,27,31" in out
    shares = [
        float(cell.rstrip("%")) for line in out.splitlines() if line.strip().startswith("128K ") for cell in line.split()[2:]
    ]
    assert shares[-1] == pytest.approx(35.9, abs=0.1)
    assert "A method acts on 8 layers of 32" in err


def test_list_shows_no_length_beyond_a_window_that_every_layer_has(tmbench, tmp_path):
    """A method reads none, and dense attention of one would be of fewer pairs."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "sliding_window": 4096}))
    code, out, _ = tmbench("list", "--model", str(tmp_path))
    assert code == 0
    assert "4K" in out
    assert "32K" not in out
    code, _, err = tmbench("list", "--model", str(tmp_path), "--length", "8K")
    assert code == 2
    assert "--length 8192 reaches beyond the sliding window of 4096 tokens in layer 0" in err


def test_lengths_of_no_model_are_refused(tmbench):
    code, _, err = tmbench("list", "--length", "8K")
    assert code == 2
    assert "--length says at which lengths --model is looked at" in err


def test_list_and_env(tmbench):
    code, out, _ = tmbench("list")
    assert code == 0
    for word in (
        "tri_mix_minference",
        "tri_mix_flashprefill",
        "first_chunk=0",
        "torch-blocks",
        "2502.20766",
        "niah_multiquery",
        "2507.21526",
        "qwen2.5-7b",
        "torch",
    ):
        assert word in out
    # Both rules have a threshold, and neither is the other's.
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "attention that a query block's key blocks hold" in lines["threshold of xattention"]
    assert "below which a tile is skipped" in lines["threshold of skip_softmax"]
    assert "threshold" not in lines
    code, out, _ = tmbench("env", "--json", "--device", "cpu")
    assert code == 0
    backends = json.loads(out)["backends"]
    dense = backends["dense"]
    assert dense["sdpa flash_attention"] == "works"
    assert (dense["sdpa"], dense["flash-attn-4"]) == ("works, picked", "runs on cuda, not on cpu")
    assert backends["key blocks"]["torch-blocks"] == backends["triangle"]["torch-banded"] == "works, picked"
    assert backends["skip-softmax"]["torch-blocks"] == "works, picked"
    for pattern in ("vertical slashes", "skip-softmax"):
        assert backends[pattern]["cuda-hopper"] == "runs on cuda, not on cpu"
