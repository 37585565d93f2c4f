"""A sweep measures every combination once, its controls cost what they say, and a killed one ends with the same rows."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

from ruler_tasks import Frame, Sources, load_wording
from tmbench import environment, models, ttft
from tmbench.errors import UserError
from tmbench.methods import METHODS, Settings
from tmbench.models import LoadedModel
from tmbench.results import RulerRow, TtftRow, read_all
from tmbench.ruler import RulerJob
from tmbench.sweep import SweepJob, same_cost, swept_method, variants
from tmbench.ttft import TtftJob


def test_every_combination_is_made_once():
    made = variants([{"starting_layer": 2}, {"starting_layer": 4}], (), (64,), (0, 128, 0), {"stride": 8})
    assert [(one.starting_layer, one.n_init, one.n_local, one.last_n, one.stride) for one in made] == [
        (2, 8, 64, 0, 8),
        (2, 8, 64, 128, 8),
        (4, 8, 64, 0, 8),
        (4, 8, 64, 128, 8),
    ]
    assert variants([], (), (), (), {}) == [Settings()]
    with pytest.raises(UserError, match="--n-local must be 0 or more, not -1"):
        variants([], (), (-1, 2), (), {})


@pytest.mark.parametrize("name", ["dense", "streaming", "xattention"])
def test_a_method_without_a_triangle_is_refused(name):
    with pytest.raises(
        UserError, match=f"--method {name} has no triangle whose parameters could be swept: choose from tri_mix"
    ):
        swept_method(name)
    assert swept_method("tri_mix_xattention:stride=8") == (METHODS["tri_mix_xattention"], {"stride": 8})


def brute_force_pairs(settings, length):
    queries, keys = torch.arange(length)[:, None], torch.arange(length)[None]
    near = (keys < settings.n_init) | (queries - keys < settings.n_local) | (queries >= length - settings.last_n)
    return int((near & (keys <= queries)).sum())


@pytest.mark.parametrize(("n_init", "n_local", "last_n"), [(8, 64, 128), (0, 1, 7), (8, 512, 128), (3, 99, 600), (8, 0, 40)])
def test_a_control_computes_as_many_pairs_in_another_shape(n_init, n_local, last_n):
    length = 1000
    settings = Settings(starting_layer=3, n_init=n_init, n_local=n_local, last_n=last_n)
    control = same_cost(settings, length)
    assert (control.starting_layer, control.n_init, control.last_n) == (3, n_init, 0)
    wanted = brute_force_pairs(settings, length)
    distances = {
        window: abs(brute_force_pairs(Settings(n_init=n_init, n_local=window, last_n=0), length) - wanted)
        for window in range(max(control.n_local - 2, 1), control.n_local + 3)
    }
    assert distances[control.n_local] == min(distances.values()), "no other window comes nearer"
    assert control.n_local > n_local


@pytest.mark.parametrize(("n_local", "last_n"), [(64, 0), (1000, 128), (4, 1000), (990, 12), (95, 900)])
def test_what_has_nothing_to_exchange_has_no_control(n_local, last_n):
    assert same_cost(Settings(n_init=8, n_local=n_local, last_n=last_n), 1000) is None


@pytest.fixture
def job(make_model, tmp_path):
    tokenizer = models.load_tokenizer("tiny")
    model = make_model("llama", vocab_size=len(tokenizer))
    loaded = LoadedModel("small", model, tokenizer, "random", "")
    here = environment.current(torch.device("cpu"))

    def make(settings, **changes):
        ruler = RulerJob(
            loaded=loaded, tokenizer=tokenizer, plans=(), lengths=(), tasks=("vt",), samples=1, environment=here,
            root=tmp_path, wording=load_wording(None), sources=Sources(offline=True), frame=Frame(),
        )  # fmt: skip
        timed = TtftJob(loaded, (), (), here, tmp_path, prompt="random", repeats=1)
        return SweepJob(METHODS["tri_mix"], settings, timed, ruler, (200,), **changes)

    return make


def parameters(plans):
    return [(plan.method, plan.parameters.get("n_local"), plan.parameters.get("last_n")) for plan in plans]


def test_plans_are_dense_the_variants_and_their_controls_each_once(job):
    settings = [Settings(n_local=16, last_n=last) for last in (0, 10)]
    work = job(settings, controls=True)
    control = same_cost(settings[1], 200)
    expected = [("dense", None, None), ("tri_mix", 16, 0), ("tri_mix", 16, 10), ("tri_mix", control.n_local, 0)]
    assert parameters(work.plans(200)) == expected
    # A control that is a variant already is measured once.
    assert parameters(job([*settings, control], controls=True).plans(200)) == expected
    assert parameters(job(settings).plans(200)) == expected[:3]
    assert work.asking(200).plans == work.plans(200)


def test_further_variants_are_timed_in_turns_with_dense_and_no_other_again(job):
    few, more = [Settings(n_local=16, last_n=0)], [Settings(n_local=16, last_n=last) for last in (0, 10)]
    assert parameters(job(few).timing(200).plans) == [("dense", None, None), ("tri_mix", 16, 0)]
    list(ttft.run(job(few).timing(200)))
    assert job(few).timing(200) is None
    assert parameters(job(more).timing(200).plans) == [("dense", None, None), ("tri_mix", 16, 10)]
    list(ttft.run(job(more).timing(200)))
    assert job(more).timing(200) is None
    rows = read_all(job(more).ttft.root, TtftRow)
    assert sorted((row.method, row.n_local, row.last_n) for row in rows if row.method != "dense") == [
        ("tri_mix", 16, 0),
        ("tri_mix", 16, 10),
    ]


SWEEP = (
    "sweep", "--starting-layer", "2", "--starting-layer", "4", "--n-local", "64", "--last-n", "0", "--last-n", "32",
    "--same-cost", "--task", "vt", "--task", "niah_single_1", "--length", "768", "--samples", "2", "--repeats", "1",
    "--device", "cpu", "--offline",
)  # fmt: skip


def start(cwd):
    program = [sys.executable, "-c", "from tmbench.cli import main; main()", *SWEEP]
    return subprocess.Popen(program, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def lines_in(folder, pattern):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(pattern))


def wait_for(lines, folder, pattern, process):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and lines_in(folder, pattern) < lines:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_rows_of_one_never_killed_and_measures_nothing_twice(tmp_path):
    # Seven plans (dense, four variants, two controls), two tasks of two samples: 28 predictions and 14 + 7 rows.
    predictions, times = "results/*/ruler/predictions/*/*.jsonl", "results/*/ttft/*.csv"
    for lines, pattern in ((3, times), (3, predictions), (13, predictions)):
        process = start(tmp_path)
        wait_for(lines, tmp_path, pattern, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it should have been killed in its middle"
    process = start(tmp_path)
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0
    assert "What one change does" in out
    assert "shape at the same cost" in out
    assert lines_in(tmp_path, predictions) == 28, "no sample is answered twice"
    rows = read_all(tmp_path / "results", RulerRow)
    assert len(rows) == 14
    assert {row.status for row in rows} == {"ok"}
    assert {row.samples for row in rows} == {2}
    timed = read_all(tmp_path / "results", TtftRow)
    assert len(timed) == 7
    before = {path: path.read_bytes() for path in tmp_path.glob("results/**/*.*")}
    process = start(tmp_path)
    process.communicate(timeout=280)
    assert process.returncode == 0
    assert {path: path.read_bytes() for path in tmp_path.glob("results/**/*.*")} == before, "all was measured before"
    # The answers are those of a run of the single command that was never killed.
    whole = tmp_path / "whole"
    whole.mkdir()
    arguments = [
        "ruler", "--method", "tri_mix", "--starting-layer", "2", "--n-local", "64", "--last-n", "32", *SWEEP[10:17],
        "--device", "cpu", "--offline", "--task", "niah_single_1",
    ]  # fmt: skip
    program = [sys.executable, "-c", "from tmbench.cli import main; main()", *arguments]
    subprocess.run(program, cwd=whole, check=True, capture_output=True)
    single = {row.key: row.score for row in read_all(whole / "results", RulerRow)}
    assert single
    swept = {row.key: row.score for row in rows}
    assert single == {key: swept[key] for key in single}
