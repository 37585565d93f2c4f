"""A model that two ranks share, over gloo on the CPU: it answers as on one, and where one fails the other does not hang."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from command_lines import FAST_TTFT
from report_rows import COMMON, TTFT
from tmbench.cli import main
from tmbench.errors import UserError
from tmbench.models import parallel
from tmbench.models.context import check_split
from tmbench.models.loading import load
from tmbench.models.sharding import draw, plan_of
from tmbench.report.settings import TtftSetting
from tmbench.results.rows import TtftRow
from tmbench.results.tables import read_all

PROGRAM = str(Path(__file__).with_name("ranks_program.py"))
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*command: str, cwd: Path, seconds: float = 240.0) -> subprocess.CompletedProcess[str]:
    # As torchrun sets it for its ranks: threads that wait for one another take minutes on a machine with other work.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["read", "context"])
def test_two_ranks_answer_as_one_and_split_the_model_or_the_prompts(tmp_path, task):
    for command in ((sys.executable, PROGRAM, "read"), (*TWO, PROGRAM, task)):
        done = run(*command, str(tmp_path), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    whole, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for about, expected in whole.items():
        if about[1] == "parameters":
            assert first[about] == second[about]
            # Norms are whole on both.
            assert expected / 2 <= first[about] < 0.51 * expected if task == "read" else first[about] == expected
            continue
        if about[0] == "compiled":
            for part in (first[about], second[about]):
                torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
            continue
        for part in (first[about], second[about]):
            torch.testing.assert_close(part["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
            assert part["new"] == expected["new"]
            assert part["counted"] == expected["counted"]
    assert whole["checkpoint", "minference"]["counted"][1] < 0.9, "a pattern that keeps all would tell no heads apart"


def test_a_model_that_is_drawn_is_never_held_whole(monkeypatch):
    """While it is drawn a rank holds its part, and one module of the whole."""

    def held() -> int:
        return sum(one.numel() for one in gc.get_objects() if type(one) is nn.Parameter and not one.is_meta)

    monkeypatch.setattr(parallel, "size", lambda: 2)
    model = load("tiny", plan_only=True, device="cpu").model
    plan = plan_of("tiny", model, 2)
    largest = max(parameter.numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    most, init = [], model._init_weights
    monkeypatch.setattr(model, "_init_weights", lambda module: (most.append(held()), init(module)))
    # What is there already is not looked at.
    gc.freeze()
    try:
        draw(model, plan, torch.device("cpu"), 0)
    finally:
        gc.unfreeze()
    part = sum(parameter.numel() for parameter in model.parameters())
    assert part < 0.75 * whole
    assert part / 2 < max(most) <= part + largest < whole


@pytest.mark.slow
def test_what_fails_on_one_rank_has_failed_on_both_and_the_run_goes_on(tmp_path):
    done = run(*TWO, PROGRAM, "fail", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    reason = "on rank 1 of 2: OutOfMemoryError: CUDA out of memory"
    failed = f"Failure(status='out_of_memory', error='{reason}')"
    assert done.stdout.splitlines() == [f"{failed} {failed} 8"] * 2


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_run_with_one_sentence(tmp_path):
    done = run(*TWO, PROGRAM, "wait", str(tmp_path), cwd=tmp_path, seconds=60)
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert sentence == (
        "Error: rank 1 of 2 failed, RuntimeError: this GPU has had enough, and the others wait for it; "
        "what was measured before is kept"
    )


@pytest.mark.slow
def test_bad_input_is_one_sentence_for_all_ranks(tmp_path):
    done = run(*TWO, "-m", "tmbench", "ttft", "--length", "64", "--prompt", "vt", "--device", "cpu", cwd=tmp_path)
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert sentence.startswith("Error: --length 64 is too short for --prompt vt")
    # torchrun ends what is left once one rank has ended.
    assert "exitcode  : 2" in done.stderr
    assert "exitcode  : 1" not in done.stderr
    assert "UserError" not in done.stderr, "no traceback of ours"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (("probe",), "torchrun is for tmbench ttft, ruler, suite, agree"),
        ((*FAST_TTFT, "--plan"), "--plan does not go with torchrun"),
        (("agree", "--executor", "processes", "--device", "cpu"), "--executor does not go with torchrun"),
        (("ttft", "--context-parallel", "--plan"), "--plan does not go with torchrun"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(monkeypatch, tmp_path, capsys, command, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr("sys.argv", ["tmbench", *command])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith(f"Error: {sentence}")


@pytest.mark.slow
def test_rank_0_alone_prints_and_keeps_rows_that_name_the_gpus(tmp_path):
    command = ("ttft", "--method", "dense", "--method", "streaming", "--length", "256", "--repeats", "1", "--device", "cpu")
    done = run(*TWO, "-m", "tmbench", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Time to first token of 256 tokens") == 1
    rows = read_all(tmp_path / "results", TtftRow)
    assert sorted((row.method, row.status, row.tensor_parallel_size) for row in rows) == [
        ("dense", "ok", 2),
        ("streaming", "ok", 2),
    ]


@pytest.mark.parametrize(
    ("column", "words"),
    [("tensor_parallel_size", "split over 4 GPUs"), ("context_parallel_size", "prompts split over 4 GPUs")],
)
def test_a_row_of_several_gpus_measured_something_else(column, words):
    one = TtftRow(**{**COMMON, **TTFT})
    assert getattr(one, column) == 1
    split: Any = {column: 4}
    several = replace(one, **split)
    assert several.key != one.key
    assert several.digest != one.digest
    settings = [TtftSetting.of(row, 0) for row in (one, several)]
    assert settings[0] != settings[1], "times of one and of four GPUs stand in no table together"
    assert settings[1].subject == f"{settings[0].subject}, {words}"


@pytest.mark.slow
def test_a_row_of_split_prompts_says_how_long_its_gpus_waited_for_each_other(tmp_path):
    command = ("ttft", "--method", "tri_mix", "--length", "256", "--repeats", "1", "--device", "cpu", "--context-parallel")
    done = run(*TWO, "-m", "tmbench", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = read_all(tmp_path / "results", TtftRow)
    assert (row.status, row.tensor_parallel_size, row.context_parallel_size) == ("ok", 1, 2)
    assert row.communication_s is not None
    assert row.ttft_median_s is not None
    assert 0 < row.communication_s < row.ttft_median_s


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        (
            "llama",
            {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
            "6 query heads and 3 key heads, which 2 GPUs",
        ),
        ("mistral", {"sliding_window": 64}, "layers with a sliding window, whose prompts are not split"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "that depend on a prompt's",
        ),
        (
            "deepseek_v3",
            {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "first_k_dense_replace": 4},
            "caches the latents that its keys and values are made from",
        ),
    ],
)
def test_prompts_that_cannot_be_split_are_refused(monkeypatch, make_model, family, config, reason):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(UserError, match=reason):
        check_split("small", make_model(family, **config))
    check_split("small", make_model("llama"))


def test_prompts_that_one_process_would_split_are_refused(tmbench):
    code, _, err = tmbench("ttft", "--length", "256", "--context-parallel")
    assert code == 2
    assert err.startswith("Error: --context-parallel splits prompts over several GPUs: start the command by torchrun")


@pytest.mark.parametrize(("ranks", "reason"), [(3, "evenly: give --nproc-per-node"), (4, "4 query heads and 2 key heads")])
def test_heads_that_cannot_be_shared_are_refused(ranks, reason):
    with pytest.raises(UserError, match=reason):
        plan_of("tiny", load("tiny", plan_only=True, device="cpu").model, ranks)
