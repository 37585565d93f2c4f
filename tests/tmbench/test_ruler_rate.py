"""benchmarks/ruler_rate.py: each commit's own code runs, and its rate is of what it kept."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

CODE = """
import json, pathlib, sys, time
TIMES = {times}

def main():
    words = sys.argv[1:]
    assert words[0] == "ruler" and "--offline" in words, words
    samples = int(words[words.index("--samples") + 1])
    ruler = pathlib.Path(words[words.index("--output-dir") + 1], "gpu", "ruler")
    kept = ruler / "predictions" / "dense"
    kept.mkdir(parents=True)
    for number in range(samples):
        time.sleep(TIMES)
        with (kept / "vt.jsonl").open("a") as file:
            file.write("{{}}" + chr(10))
    head = "time,device_name,torch,transformers,dtype,length,task,samples,score,seconds_per_sample"
    (ruler / "dense.csv").write_text(f"{{head}}\\nnow,GPU,2,5,float32,4096,vt,{{samples}},{score},{{TIMES}}\\n")
"""


@pytest.fixture
def script(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import ruler_rate

    return ruler_rate


@pytest.fixture
def checkout(tmp_path):
    def make(name, times, score=50.0):
        folder = tmp_path / name / "tmbench"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "cli.py").write_text(CODE.format(times=times, score=score))
        return f"{name}={folder.parent}"

    return make


def options(script, *checkouts, samples):
    about = {"model": "tiny", "name": None, "method": "dense", "length": "4K", "timeout": 60.0, "samples": samples}
    return argparse.Namespace(checkout=[script._checkout(one) for one in checkouts], **about)


@pytest.mark.slow
def test_each_commit_runs_its_own_code_on_its_own_number_of_samples(script, checkout):
    asked = options(script, checkout("before", 0.2), checkout("now", 0.1), samples=[4, 8])
    before, now = script.measure(asked, ["--offline"])
    assert (before["commit"], before["samples"], before["status"]) == ("before", 4, "ok")
    assert (now["commit"], now["samples"], now["status"]) == ("now", 8, "ok")
    assert float(before["seconds"]) >= 4 * 0.2
    assert 60 < float(before["begun_samples_per_minute"]) <= 60 / 0.2 * 1.5
    assert (before["model_seconds_per_sample"], now["model_seconds_per_sample"]) == ("0.20000", "0.10000")
    assert before.keys() == set(script.COLUMNS)


@pytest.mark.slow
def test_a_command_without_a_score_has_no_rate(script, checkout):
    (row,) = script.measure(options(script, checkout("now", 0.01, score=""), samples=[2]), ["--offline"])
    assert (row["status"], row["begun_samples_per_minute"], row["model_seconds_per_sample"]) == ("failed", "", "")


def test_a_checkout_is_a_folder_of_code(script, tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="has tmbench's code"):
        script._checkout(f"now={tmp_path}")


def test_the_table_says_how_many_times_the_first_commit_that_is(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import decoding_tables

    about = {"status": "ok", "model": "a/model", "device": "NVIDIA H200", "length": "4096", "seconds": "50"}
    before = about | {"commit": "before", "samples": "39", "begun_samples_per_minute": "20", "model_seconds_per_sample": "3"}
    now = about | {"commit": "now", "samples": "520", "begun_samples_per_minute": "800", "model_seconds_per_sample": "0.06"}
    table = decoding_tables.rate(SimpleNamespace(lines=lambda path: [before, now]))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert cells == [
        ["before", "a/model", "H200", "4K", "39", "50", "20", "", "3", ""],
        ["now", "a/model", "H200", "4K", "520", "50", "800", "40.0", "0.06", "50.0"],
    ]
    with pytest.raises(ValueError, match="commands that failed: now"):
        decoding_tables.rate(SimpleNamespace(lines=lambda path: [before, now | {"status": "failed"}]))
