"""Interleaved rows stay together: a run that dies between them leaves all of them to the next one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

import made_rows
from tmbench.errors import UserError
from tmbench.results import row_sets
from tmbench.results.row_sets import finish, kept_together, known
from tmbench.results.rows import TtftRow
from tmbench.results.tables import CorruptResultsError, append, csv_path, newest, read_all

ROW = TtftRow(**made_rows.COMMON, method="dense", length=4096, prompt="kv", repeats=3, warmup=1, interleaved="dense tri_mix",
              ttft_median_s=0.5, logit_error=0.0)  # fmt: skip
OTHER = replace(ROW, method="tri_mix", ttft_median_s=0.25, logit_error=float("nan"))
DEVICE = ROW.device


def left_over(root):
    return sorted(path.name for path in (root / DEVICE / "ttft").iterdir() if path.suffix != ".csv")


def die_after(root, count):
    """Append so many rows of a set and leave it, as a killed process does."""

    def run():
        with kept_together(root, [ROW, OTHER]):
            for row in [ROW, OTHER][:count]:
                append(root, row)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_next_run_appends_what_is_missing(tmp_path, count):
    die_after(tmp_path, count)
    assert len(read_all(tmp_path, TtftRow)) == count
    assert [len(known(tmp_path, TtftRow, DEVICE, name)) for name in ("dense", "tri_mix", "other")] == [1, 1, 0]
    for _ in range(2):
        finish(tmp_path, TtftRow, DEVICE)
        rows = read_all(tmp_path, TtftRow)
        assert [(row.method, row.ttft_median_s) for row in rows] == [("dense", 0.5), ("tri_mix", 0.25)]
    assert left_over(tmp_path) == []
    assert csv_path(tmp_path, TtftRow, DEVICE, "dense").read_bytes().count(b"\n") == 2, "nothing twice"


def test_a_set_that_was_appended_leaves_nothing(tmp_path):
    with kept_together(tmp_path, [ROW, OTHER]):
        assert len(left_over(tmp_path)) == 1
        append(tmp_path, ROW)
        append(tmp_path, OTHER)
    assert left_over(tmp_path) == []


def test_a_later_measurement_stays_the_newest(tmp_path):
    die_after(tmp_path, 0)
    later = replace(ROW, time="2026-01-03T00:00:00+00:00", ttft_median_s=9.0)
    append(tmp_path, later)
    assert known(tmp_path, TtftRow, DEVICE, "dense") == {ROW.key: later}
    finish(tmp_path, TtftRow, DEVICE)
    assert newest(tmp_path, TtftRow, DEVICE, "dense") == {ROW.key: later}
    assert newest(tmp_path, TtftRow, DEVICE, "tri_mix")[OTHER.key].ttft_median_s == 0.25


def test_a_set_whose_process_is_still_at_it_is_left_to_it(tmp_path):
    with kept_together(tmp_path, [ROW, OTHER]):
        finish(tmp_path, TtftRow, DEVICE)
        assert len(left_over(tmp_path)) == 1
        assert read_all(tmp_path, TtftRow) == []
        append(tmp_path, ROW)
        append(tmp_path, OTHER)


def test_a_set_that_was_never_whole_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(row_sets.os, "fsync", lambda descriptor: os._exit(9))
    if (child := os.fork()) == 0:
        with kept_together(tmp_path, [ROW]):
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(left_over(tmp_path)) == 1
    assert known(tmp_path, TtftRow, DEVICE, "dense") == {}
    finish(tmp_path, TtftRow, DEVICE)
    assert left_over(tmp_path) == []


def test_a_disk_that_takes_no_set_may_take_rows(tmp_path, monkeypatch):
    (tmp_path / DEVICE / "ttft").mkdir(parents=True)
    monkeypatch.setattr(row_sets.os, "write", lambda descriptor, content: 3)
    with kept_together(tmp_path, [ROW]):
        append(tmp_path, ROW)
    assert read_all(tmp_path, TtftRow) == [ROW]
    assert left_over(tmp_path) == []


def append_both(root):
    with kept_together(root, [ROW, OTHER]):
        append(root, ROW)
        append(root, OTHER)


def test_what_a_file_refuses_is_kept(tmp_path):
    foreign = csv_path(tmp_path, TtftRow, DEVICE, "tri_mix")
    foreign.parent.mkdir(parents=True)
    foreign.write_text("a,b\n1,2\n")
    with pytest.raises(CorruptResultsError):
        append_both(tmp_path)
    assert len(left_over(tmp_path)) == 1
    with pytest.raises(UserError, match=r"tri_mix\.csv is not a results file"):
        finish(tmp_path, TtftRow, DEVICE)
    foreign.unlink()
    finish(tmp_path, TtftRow, DEVICE)
    assert {row.method for row in read_all(tmp_path, TtftRow)} == {"dense", "tri_mix"}


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from tmbench.engine import roofline
from tmbench.engine.prefill import EAGER
from tmbench.methods.plan import ModelShape
from tmbench.methods.table import METHODS
from tmbench.models.loading import LoadedModel
from tmbench.measure import keeping
from tmbench.measure.executor import InProcess
from tmbench.measure.loop import run
from tmbench.measure.spec import ModelSource
from tmbench.measure.ttft import TtftSpec
from tmbench.results import environment, files, row_sets
from tmbench.results.rows import TtftRow
from tmbench.results.tables import read_all
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

torch.set_num_threads(1)
roofline.gemm_throughput = lambda device, dtype, prefill_s: 1e11
config = CONFIG_MAPPING["llama"](vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
config.initializer_range = 0.2
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config).eval()
loaded = LoadedModel("small", model, None, "random", "")
names = ("dense", "tri_mix", "minference", "streaming")
window = {"n_init": 2, "n_local": 16, "last_n": 8}
own = {name: {key: window[key] for key in METHODS[name].declared if key in window} for name in names}
plans = [METHODS[name].plan(ModelShape.of(model), own[name]) for name in names]
# One method in two settings, whose rows are in one file.
plans.append(METHODS["tri_mix"].plan(ModelShape.of(model), own["tri_mix"] | {"n_local": 32}))

def job(root):
    here = environment.current(torch.device("cpu"))
    return TtftSpec(model=ModelSource.of(loaded), environment=here, root=root, plans=plans, lengths=(96,),
        prompt="random", repeats=2, prefill=EAGER)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def at_append(number, after):
    real, calls = keeping.append, []
    def append(root, row):
        calls.append(row)
        if len(calls) == number and not after:
            die()
        real(root, row)
        if len(calls) == number:
            die()
    keeping.append = append

def within_append(number):
    real, calls = os.pwrite, []
    def pwrite(descriptor, content, at):
        if content.count(b"\\n") == 1 and content.startswith(b'"'):
            calls.append(at)
            if len(calls) == number:
                real(descriptor, content[:300], at)
                die()
        return real(descriptor, content, at)
    os.pwrite = pwrite

def before_the_set():
    row_sets._write = lambda path, text: die()

points = {f"before {n}": (at_append, n, False) for n in (1, 2, 3, 5)}
points |= {f"after {n}": (at_append, n, True) for n in (1, 4, 5)}
points |= {f"within {n}": (within_append, n) for n in (1, 3)}
points |= {"before the set": (before_the_set,)}
outcome = {}
for name, (inject, *arguments) in points.items():
    root = Path(sys.argv[1]) / name
    codes = []
    for process in (1, 2):
        child = os.fork()
        if child == 0:
            if process == 1:
                inject(*arguments)
            run(job(root), InProcess(loaded))
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    rows = read_all(root, TtftRow)
    outcome[name] = {
        "codes": codes,
        "lines": sum(path.read_bytes().count(b"\\n") - 1 for path in root.glob("*/ttft/*.csv")),
        "rows": [[row.method, row.interleaved, row.logit_error is not None, row.same_token_as_dense is not None]
                 for row in rows],
        "left": [path.name for path in root.glob("*/ttft/*") if path.suffix != ".csv"],
        "pending": {str(n): [plan.method for plan in lacks.plans] for n, lacks in job(root).pending(loaded).items()},
    }
print(json.dumps(outcome))
"""


@pytest.mark.slow
def test_a_run_killed_at_any_point_between_its_rows_loses_no_figure(tmp_path):
    """Two processes for each point: one that is killed there, and the one that goes on."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    methods = "dense tri_mix (n_local 16) minference streaming tri_mix (n_local 32)"
    whole = sorted([name, methods, True, True] for name in ("dense", "tri_mix", "minference", "streaming", "tri_mix"))
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert len(outcome) == 10
    for point, found in outcome.items():
        assert found["codes"] == [-9, 0], point
        assert sorted(found["rows"]) == whole, point
        assert found["lines"] == 5, f"{point}: nothing is measured twice"
        assert found["left"] == [], point
        assert found["pending"] == {}, point
