"""A model that two ranks share, over gloo on the CPU: it answers as on one, and where one fails the other does not hang."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from command_lines import FAST_TTFT
from report_rows import COMMON, TTFT
from tmbench import cli
from tmbench.cli import main, ranks
from tmbench.engine.token_split import TokenSplit
from tmbench.errors import UserError
from tmbench.executors.ranks import AcrossRanks
from tmbench.measure.attempt import attempt
from tmbench.measure.spec import Item
from tmbench.models import parallel
from tmbench.models.context import check_split
from tmbench.models.loading import load
from tmbench.report.settings import TtftSetting
from tmbench.results.failures import describe
from tmbench.results.rows import RulerRow, TtftRow
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
    # torchrun's long report comes last, and would leave the sentence out of sight.
    report = done.stderr.partition("Root Cause")[2]
    assert "exitcode  : 2" in report
    assert f"traceback : {sentence.removeprefix('Error: ')}" in report
    assert "exitcode  : 1" not in done.stderr
    assert "UserError" not in done.stderr, "no traceback of ours"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("ruler", "--length", "abc"), "Invalid value for '--length': 'abc' is no number of tokens: give"),
        (("ttft", "--no-such"), "No such option: --no-such"),
        (("ttft", "--method", "nope"), "--method nope is unknown"),
        (("ttft", "--help"), ""),
    ],
)
def test_the_reason_that_torchrun_reports_is_whatever_was_refused(monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr("sys.argv", ["tmbench", *arguments])
    stop = ranks._ending(cli._main)
    assert (stop.code, stop.reason[: len(reason)]) == (2 if reason else 0, reason)
    assert bool(stop.reason) == bool(reason)


RULER = ("ruler", "--length", "1K", "--samples", "24", "--task", "niah_single_1", "--method", "dense", "--device", "cpu")


def kept(folder: Path) -> list[str]:
    """The samples that are there, a line each."""
    return [line for file in folder.rglob("*.jsonl") for line in file.read_text().splitlines()]


def interrupt(torchrun: psutil.Process, ranks: list[psutil.Process]) -> None:
    """As a terminal does on Ctrl-C, which torchrun then passes on."""
    for process in (torchrun, *ranks):
        process.send_signal(signal.SIGINT)


def kill_torchrun(torchrun: psutil.Process, ranks: list[psutil.Process]) -> None:
    """So that it ends none of its processes."""
    torchrun.kill()


STOPPED = "torchrun has ended this run, as another process has gone or it was told to"
GONE = rf"{STOPPED}|another of 2 processes cannot be reached \(.*\)"
"""Whichever comes first."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        pytest.param(interrupt, "the run was interrupted", id="Ctrl-C"),
        pytest.param(lambda torchrun, ranks: torchrun.terminate(), STOPPED, id="SIGTERM"),
        pytest.param(lambda torchrun, ranks: ranks[1].kill(), GONE, id="a rank killed"),
        pytest.param(kill_torchrun, "torchrun has died, and its processes end with it", id="torchrun killed"),
    ],
)
def test_a_run_that_is_stopped_ends_at_once_with_one_sentence_and_keeps_its_samples(tmp_path, stop, reason):
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            [*TWO, "-m", "tmbench", *RULER],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        torchrun, ranks = psutil.Process(process.pid), []
        try:
            deadline = time.monotonic() + 120
            while len(kept(tmp_path)) < 2 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            ranks = sorted(torchrun.children(), key=lambda rank: int(rank.environ()["RANK"]))
            stop(torchrun, ranks)
            expected = -signal.SIGKILL if stop is kill_torchrun else 1
            assert process.wait(20) == expected, "torchrun waits half a minute for those that do not heed it"
            _, left = psutil.wait_procs(ranks, timeout=10)
            assert not left, "they would hold their GPUs"
        finally:
            for one in (*ranks, torchrun):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        said.seek(0)
        lines = said.read().splitlines()
    (sentence,) = [line for line in lines if line.startswith("Error:")]
    assert re.fullmatch(f"Error: ({reason}); what was measured before is kept", sentence)
    assert not [line for line in lines if "tmbench/cli" in line], "no traceback of ours"
    before = kept(tmp_path)
    assert 2 <= len(before) < 24
    if stop is interrupt:
        # One process has another row, and so other samples; ranks go on.
        for command, samples in (((sys.executable,), 24 + len(before)), (TWO, 48)):
            done = run(*command, "-m", "tmbench", *RULER, cwd=tmp_path)
            assert done.returncode == 0, done.stderr[-2000:]
            assert len(kept(tmp_path)) == samples
        assert set(before) < set(kept(tmp_path))
        rows = read_all(tmp_path / "results", RulerRow)
        assert sorted((row.tensor_parallel_size, row.samples, row.score) for row in rows) == [(1, 24, 100), (2, 24, 100)]


@pytest.mark.slow
def test_a_rank_ends_where_nobody_reads_what_it_says(tmp_path):
    code = "from tmbench.models import parallel; parallel.end('enough', 3)"
    report = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "no folder" / "error.json")}
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | report, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(60) == 3
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | report, stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (3, "Error: enough; what was measured before is kept\n")


def test_what_rank_0_cannot_keep_ends_the_run_and_asks_no_other_rank(monkeypatch):
    def tell(message):
        raise UserError("--output-dir: x cannot be written")

    def measure_all(given):
        for _, worker in given:
            attempt(partial(worker.keep, "a sample"))

    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "send", lambda order: None)
    monkeypatch.setattr(parallel, "exchanged", lambda *given, **more: pytest.fail("they are at work"))
    spec: Any = SimpleNamespace(model=None, measure_all=measure_all)
    executor = AcrossRanks()
    monkeypatch.setattr(executor, "open", lambda source: None)
    with pytest.raises(UserError, match="--output-dir: x cannot be written"):
        executor.run(spec, [(0, Item(title="one"))], tell)


def test_what_one_rank_alone_refuses_names_it(monkeypatch):
    told = [(0, None, ""), (0, None, "--model x does not fit")]
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "exchanged", lambda value, trouble, ended: told)
    with pytest.raises(UserError, match=r"^on rank 1 of 2: --model x does not fit$"):
        attempt(lambda: None)
    told[0] = told[1]
    with pytest.raises(UserError, match="^--model x does not fit$"):
        attempt(lambda: None)


def test_an_error_of_nccl_says_its_reason():
    error = RuntimeError(
        "NCCL error in: NCCLUtils.cpp:94, NCCL version 2.27.5\nncclUnhandledCudaError: failed.\nno such GPU"
    )
    assert describe(error) == "RuntimeError: NCCL error in: NCCLUtils.cpp:94, NCCL version 2.27.5; no such GPU"
    assert describe(RuntimeError("one\ntwo")) == "RuntimeError: one"


def test_a_prompt_of_fewer_tokens_than_ranks_is_refused():
    loaded = replace(load("tiny", plan_only=True, device="cpu"), context_parallel_size=2)
    loaded.check_length(2)
    with pytest.raises(UserError, match="--length 1 has fewer tokens than the 2 GPUs .*: give 2 or more, or leave the"):
        loaded.check_length(1)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (("probe",), "torchrun is for tmbench ttft, ruler, suite, agree"),
        ((*FAST_TTFT, "--plan"), "--plan does not go with torchrun"),
        (
            ("agree", "--executor", "processes", "--device", "cpu"),
            "--executor does not go with torchrun, whose processes share one model: leave it out\n",
        ),
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


@pytest.mark.parametrize("length", [3, 5, 8])
def test_heads_that_lie_apart_are_sent_in_one_piece(monkeypatch, length):
    """As of a layer where queries, keys and values of a head lie together; the last of 3 ranks may have one token."""
    sent = []
    monkeypatch.setattr(parallel, "size", lambda: 3)
    monkeypatch.setattr(parallel, "rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda found, given, *sizes: sent.append(given))
    split = TokenSplit(length)
    together = torch.arange(split.own * 6 * 12.0).view(1, split.own, 6, 12)
    for x in together.transpose(1, 2).chunk(3, dim=-1):
        split.to_heads(x)
        assert sent[-1].is_contiguous()
        # To each rank its two heads, token by token.
        assert torch.equal(sent[-1].view(3, split.own, 2, 4), x[0].view(3, 2, split.own, 4).transpose(1, 2))
