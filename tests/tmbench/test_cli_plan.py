"""``--plan`` on the command line: before a weight is loaded, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tmbench.models import loading

RULER = (
    "ruler",
    "--device",
    "cpu",
    "--offline",
    "--length",
    "600",
    "--task",
    "vt",
    "--method",
    "streaming",
    "--samples",
    "2",
)


@pytest.mark.slow
def test_a_plan_says_what_is_there_and_then_what_is_not(tmbench, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
        code, out, err = tmbench(*RULER, "--plan")
        assert code == 0, err
        assert "2 samples" in out
        assert "the roofline" in out
        assert "CPU-hours; loading the model and making prompts come on top" in out
        assert not Path("results").exists()
        code, out, _ = tmbench(*RULER, "--plan", "--shard", "1/2")
        assert "The plan of shard 1/2 of a run of tiny on cpu" in out
        assert "1 sample " in out
    assert tmbench(*RULER)[0] == 0
    code, out, _ = tmbench(*RULER, "--plan")
    assert "Nothing is to be measured: all was measured before." in out
    code, out, _ = tmbench(*RULER, "--plan", "--samples", "3")
    assert "1 sample " in out
    assert "its samples so far" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("agree", "--prompt", "random", "--length", "2K"),
        ("probe", "--task", "random", "--length", "2K"),
        ("probe", "--loss", "--task", "random", "--length", "2K"),
        ("ruler", "--length", "4K", "--offline"),
        ("ttft", "--length", "32K"),
    ],
)
def test_presets_are_planned_without_a_download(command, tmbench):
    code, out, err = tmbench(*command, "--model", "llama-3.1-8b", "--weights", "random", "--device", "cpu", "--plan")
    assert code == 0, err
    assert "dense" in out
    assert "h on one CPU" in out or "min on one CPU" in out


@pytest.mark.parametrize("command", ["ruler", "agree", "probe"])
def test_a_model_without_a_config_has_no_plan(command, tmbench, tmp_path):
    (tmp_path / "empty").mkdir()
    code, out, err = tmbench(command, "--model", "empty", "--plan", *(("--offline",) if command == "ruler" else ()))
    assert (code, out) == (2, "")
    assert "--model empty has no config.json, so it is no checkpoint" in err
    assert err.count("Error:") == 1


@pytest.mark.slow
def test_a_damaged_file_is_refused_by_a_plan_too(tmbench):
    assert tmbench(*RULER)[0] == 0
    path = next(Path("results").glob("*/ruler/predictions/streaming/*.jsonl"))
    path.write_text(json.dumps({"index": "none"}) + "\n")
    code, _, err = tmbench(*RULER, "--plan")
    assert code == 2
    assert "line 1 is not a prediction" in err
