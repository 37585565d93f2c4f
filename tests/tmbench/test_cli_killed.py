"""Runs that are interrupted or killed: what is finished stays, and the next run goes on from there."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from command_lines import PROGRAM, SEARCH
from tmbench.results.rows import RulerRow, TtftRow
from tmbench.results.tables import read_all


def start(*arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*PROGRAM, *arguments], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(count, condition, process, seconds=60.0):
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and condition() < count:
        time.sleep(0.02)


def lines_in(folder: Path, pattern: str) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(pattern))


@pytest.mark.slow
def test_ctrl_c_keeps_finished_rows_and_exits_with_130(tmp_path):
    process = start(
        "ttft", "--method", "dense", "--length", "256", "--length", "16K", "--device", "cpu", cwd=tmp_path
    )  # fmt: skip
    wait_for(2, lambda: lines_in(tmp_path, "results/*/ttft/dense.csv"), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert [row.length for row in read_all(tmp_path / "results", TtftRow)] == [256]


RULER = ("ruler", "--method", "dense", "--method", "streaming", "--length", "768", "--samples", "3", "--offline",
         "--task", "vt", "--task", "qa_1", "--device", "cpu")  # fmt: skip


@pytest.mark.slow
def test_a_killed_ruler_run_ends_with_the_rows_of_one_never_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert start(*RULER, cwd=whole).wait(300) == 0
    for lines in (2, 7):
        process = start(*RULER, cwd=killed)
        wait_for(lines, lambda: lines_in(killed, "results/*/ruler/predictions/*/*.jsonl"), process)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL, "it should have been killed in its middle"
    assert start(*RULER, cwd=killed).wait(300) == 0

    def outcome(folder):
        rows = [row for row in read_all(folder / "results", RulerRow) if isinstance(row, RulerRow)]
        return {
            (row.key, row.samples, row.score, row.nulls, row.prompt_tokens_mean, row.status, row.backends) for row in rows
        }

    assert outcome(killed) == outcome(whole)
    assert len(outcome(whole)) == 4
    assert lines_in(killed, "results/*/ruler/predictions/*/*.jsonl") == 12


@pytest.mark.slow
def test_a_killed_search_writes_the_file_of_one_never_killed(tmbench, tmp_path):
    assert tmbench(*SEARCH)[0] == 0
    killed = tmp_path / "killed"
    killed.mkdir()
    partial = killed / "found.json.partial"
    process = start(*SEARCH, cwd=killed)
    wait_for(4, lambda: lines_in(killed, partial.name), process)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL, "it should have been killed in its middle"
    before = partial.read_bytes()
    assert before.count(b"\n") >= 4
    process = start(*SEARCH, cwd=killed)
    wait_for(before.count(b"\n") + 1, lambda: lines_in(killed, partial.name), process)
    if partial.exists():
        assert partial.read_bytes().startswith(before), "what was measured is not measured again"
    assert process.wait(300) == 0
    assert (killed / "found.json").read_text() == Path("found.json").read_text()
    assert sorted(path.name for path in killed.iterdir()) == ["found.json"]


@pytest.mark.slow
def test_a_killed_ttft_run_ends_with_the_rows_of_one_never_killed(tmp_path):
    arguments = ("ttft", "--length", "256", "--length", "512", "--length", "1K", "--repeats", "1", "--device", "cpu")
    for rows in (2, 7):
        process = start(*arguments, cwd=tmp_path)
        wait_for(rows, lambda: lines_in(tmp_path, "results/*/ttft/*.csv"), process)
        process.kill()
        process.wait(60)
    assert start(*arguments, cwd=tmp_path).wait(300) == 0
    keys = [row.key for row in read_all(tmp_path / "results", TtftRow)]
    assert len(keys) == len(set(keys)) == 12
    assert lines_in(tmp_path, "results/*/ttft/*.csv") == 12 + 4, "nothing is measured twice"
