"""benchmarks/workers.py: whole commands are timed, and what they kept is seen as it comes."""

from __future__ import annotations

import argparse
import sys
import time

import pytest

PROGRAM = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1], "gpu/ruler/predictions/dense")
folder.mkdir(parents=True)
for number in range(4):
    time.sleep(0.2)
    with (folder / f"task-{number % 2}.jsonl").open("a") as file:
        file.write("{}" + chr(10))
sys.exit(int(sys.argv[2]))
"""
WORKER = """
import sys, time
while True:
    with open(sys.argv[1], "a") as file:
        file.write(".")
    time.sleep(0.02)
"""
ENDLESS = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""
ROW = "task,length,method,score,time,torch,transformers,tmbench,commit,dtype,device_name"


@pytest.fixture
def script(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import workers

    return workers


def options():
    about: dict[str, object] = {"model": "tiny", "name": None, "method": "dense", "length": "1K", "tasks": ["vt"]}
    about |= {"samples": 4, "rounds": 2, "executors": ["processes"], "workers": [1, 2], "timeout": 10.0}
    return argparse.Namespace(**about)


@pytest.mark.slow
def test_samples_are_seen_as_they_come(script, tmp_path):
    run = script.watched([sys.executable, "-c", PROGRAM, str(tmp_path), "0"], tmp_path, 60.0)
    assert run.status == script.OK
    assert run.kept[-1][1] == 4
    assert [count for _, count in run.kept] == sorted({count for _, count in run.kept})
    assert 0.8 <= run.kept[-1][0] <= run.seconds


@pytest.mark.slow
def test_a_command_that_fails_or_takes_too_long_has_failed(script, tmp_path, capfd):
    code = "import sys; sys.exit('no such model')"
    assert script.watched([sys.executable, "-c", code], tmp_path, 60.0).status == script.FAILED
    assert "no such model" in capfd.readouterr().err
    alive = tmp_path / "alive"
    run = script.watched([sys.executable, "-c", ENDLESS, WORKER, str(alive)], tmp_path, 2.0)
    assert run.status == script.TIMED_OUT
    assert 2 <= run.seconds < 20
    written = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == written


def test_samples_count_from_when_a_quarter_is_there(script):
    assert script.begun_rate([(10.0, 1), (12.0, 2), (14.0, 3), (22.0, 8)]) == pytest.approx(60 * 6 / 10)
    assert script.begun_rate([(10.0, 8)]) is None


def ran(script, monkeypatch, *scores, kept=4):
    """Rows of commands that left these scores."""
    left = iter(scores)
    commands = []

    def watched(command, root, timeout):
        commands.append(command)
        folder = root / "gpu" / "ruler"
        folder.mkdir(parents=True)
        (folder / "dense.csv").write_text(f"{ROW}\nvt,1024,dense,{next(left)},now,2,5,0.1,abc,float32,GPU\n")
        return script.Run(script.OK, 30.0, [(10.0, 1), (20.0, kept)])

    monkeypatch.setattr(script, "watched", watched)
    return list(script.measure(options(), ["--offline"])), commands


def test_rows_say_how_many_samples_a_minute_that_is(script, monkeypatch):
    rows, commands = ran(script, monkeypatch, "50.0", "50.0", "50.0", "75.0")
    assert [(row["workers"], row["round"], row["same_scores"]) for row in rows] == [
        (1, 1, "yes"),
        (2, 1, "yes"),
        (1, 2, "yes"),
        (2, 2, "no"),
    ]
    assert {row["samples_per_minute"] for row in rows} == {"8.00"}
    assert {row["begun_samples_per_minute"] for row in rows} == {"18.00"}
    assert rows[0].keys() == set(script.COLUMNS)
    asked = " ".join(commands[1])
    assert "--length 1K --samples 4 --task vt --offline --executor processes --workers 2 --output-dir" in asked


def test_a_row_without_a_score_or_without_a_sample_is_no_figure(script, monkeypatch):
    rows, _ = ran(script, monkeypatch, "", "50.0", "50.0", "50.0")
    assert [row["status"] for row in rows] == [script.FAILED, script.OK, script.OK, script.OK]
    assert rows[0]["samples_per_minute"] == rows[0]["same_scores"] == ""
    assert {row["same_scores"] for row in rows[1:]} == {"yes"}
    rows, _ = ran(script, monkeypatch, *["50.0"] * 4, kept=3)
    assert {row["status"] for row in rows} == {script.FAILED}
