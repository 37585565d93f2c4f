"""A sweep measures every combination once, its controls cost what they say, and a killed one ends with the same rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bound_specs import Bound
from tmbench.errors import UserError
from tmbench.measure import keeping
from tmbench.measure.accuracy import AccuracySpec
from tmbench.measure.spec import ModelSource
from tmbench.measure.sweep import SweepSpec, same_cost, swept_method, swept_plans, variants
from tmbench.measure.ttft import TtftSpec
from tmbench.methods.plan import ModelShape
from tmbench.methods.spec import MethodSpec
from tmbench.models import loading
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.rows import RulerRow, TtftRow
from tmbench.results.tables import read_all
from tmbench.suites.ruler import Ruler


def test_every_combination_is_made_once():
    mixed = MethodSpec.of("tri_mix_xattention:stride=8")
    made = variants(mixed, {"n_init": [4, 8], "n_local": [64], "last_n": [0, 128, 0]})
    assert [tuple(one.values[name] for name in ("n_init", "n_local", "last_n", "stride")) for one in made] == [
        (4, 64, 0, 8),
        (4, 64, 128, 8),
        (8, 64, 0, 8),
        (8, 64, 128, 8),
    ]
    assert variants(mixed, {}) == [mixed]
    with pytest.raises(UserError, match="--n-local must be 0 or more, not -1"):
        variants(mixed, {"n_local": [-1, 2]})


@pytest.mark.parametrize("name", ["dense", "streaming", "xattention"])
def test_a_method_without_a_triangle_is_refused(name):
    with pytest.raises(
        UserError, match=f"--method {name} has no triangle whose parameters could be swept: choose from tri_mix"
    ):
        swept_method(name)
    spec = swept_method("tri_mix_xattention:stride=8")
    assert (spec.method.name, spec.values) == ("tri_mix_xattention", {"stride": 8})


def variant(layers=None, **values):
    """A variant of tri_mix; ``layers`` of a model with four."""
    return MethodSpec.of("tri_mix", values).with_layers(ModelShape("", 4, 4), layers)


def brute_force_pairs(n_init, n_local, last_n, length):
    queries, keys = torch.arange(length)[:, None], torch.arange(length)[None]
    near = (keys < n_init) | (queries - keys < n_local) | (queries >= length - last_n)
    return int((near & (keys <= queries)).sum())


@pytest.mark.parametrize(("n_init", "n_local", "last_n"), [(8, 64, 128), (0, 1, 7), (8, 512, 128), (3, 99, 600), (8, 0, 40)])
def test_a_control_computes_as_many_pairs_in_another_shape(n_init, n_local, last_n):
    length = 1000
    control = same_cost(variant(layers="3-", n_init=n_init, n_local=n_local, last_n=last_n), length)
    assert control is not None
    assert control.layers is not None
    assert control.layers.layers == (3,)
    assert (control.values["n_init"], control.values["last_n"]) == (n_init, 0)
    wanted = brute_force_pairs(n_init, n_local, last_n, length)
    found = control.values["n_local"]
    distances = {
        window: abs(brute_force_pairs(n_init, window, 0, length) - wanted) for window in range(max(found - 2, 1), found + 3)
    }
    assert distances[found] == min(distances.values()), "no other window comes nearer"
    assert found > n_local


@pytest.mark.parametrize(("n_local", "last_n"), [(64, 0), (1000, 128), (4, 1000), (990, 12), (95, 900)])
def test_what_has_nothing_to_exchange_has_no_control(n_local, last_n):
    assert same_cost(variant(n_init=8, n_local=n_local, last_n=last_n), 1000) is None


@pytest.fixture
def job(make_model, tmp_path):
    tokenizer = loading.load_tokenizer("tiny")
    model = make_model("llama", vocab_size=len(tokenizer))
    loaded = LoadedModel("small", model, tokenizer, "random", "")
    here = environment.current(torch.device("cpu"))

    def make(settings, **changes):
        common = {"environment": here, "root": tmp_path}
        half = common | {"model": ModelSource.of(loaded), "plans": (), "lengths": ()}
        return Bound(
            SweepSpec,
            loaded,
            **common,
            plans={200: swept_plans(settings, loaded.shape, 200, **changes)},
            ttft=TtftSpec(**half, prompt="random", repeats=1),
            accuracy=AccuracySpec(**half, suite=Ruler(offline=True), tasks=("vt",), samples=1),
        )

    return make


class Timed(Bound):
    """The first half of a sweep alone."""

    def __init__(self, work):
        self.loaded, self.spec = work.loaded, work.timing(200)


def timed(work):
    """What of a sweep is to be timed."""
    return Timed(work).pending_plans().get(200, [])


def parameters(plans):
    return [(plan.method, plan.parameters.get("n_local"), plan.parameters.get("last_n")) for plan in plans]


def test_plans_are_dense_the_variants_and_their_controls_each_once(job):
    settings = [variant(n_local=16, last_n=last) for last in (0, 10)]
    work = job(settings, controls=True)
    control = same_cost(settings[1], 200)
    assert control is not None
    expected = [("dense", None, None), ("tri_mix", 16, 0), ("tri_mix", 16, 10), ("tri_mix", control.values["n_local"], 0)]
    assert parameters(work.plans[200]) == expected
    # A control that is a variant already is measured once.
    assert parameters(job([*settings, control], controls=True).plans[200]) == expected
    assert parameters(job(settings).plans[200]) == expected[:3]
    assert work.asking(200).plans == work.plans[200]


@pytest.mark.slow
def test_further_variants_are_interleaved_with_dense_and_no_other_again(job):
    few, more = [variant(n_local=16, last_n=0)], [variant(n_local=16, last_n=last) for last in (0, 10)]
    assert parameters(timed(job(few))) == [("dense", None, None), ("tri_mix", 16, 0)]
    Timed(job(few)).run()
    assert timed(job(few)) == []
    assert parameters(timed(job(more))) == [("dense", None, None), ("tri_mix", 16, 10)]
    Timed(job(more)).run()
    assert timed(job(more)) == []
    rows = read_all(job(more).root, TtftRow)
    window = [(row.settings["n_local"], row.settings["last_n"]) for row in rows if row.method == "tri_mix"]
    assert sorted(window) == [(16, 0), (16, 10)]


@pytest.mark.slow
def test_times_that_a_killed_sweep_had_measured_are_appended_by_the_next(job, monkeypatch):
    work = job([variant(n_local=16, last_n=last) for last in (0, 10)])
    monkeypatch.setattr(AccuracySpec, "parts", lambda spec, loaded: iter(()))
    monkeypatch.setattr(AccuracySpec, "check", lambda spec, loaded: None)
    real = keeping.append
    appended: list[object] = []

    def append(root, row):
        if appended:
            raise KeyboardInterrupt
        appended.append(real(root, row))

    monkeypatch.setattr(keeping, "append", append)
    with pytest.raises(KeyboardInterrupt):
        work.run()
    monkeypatch.setattr(keeping, "append", real)
    assert timed(work) == [], "nothing is to be timed"
    assert {row.status for row in work.run()} == {"ok"}
    rows = read_all(work.root, TtftRow)
    assert len(rows) == 3
    together = "dense tri_mix (last_n 0) tri_mix (last_n 10)"
    assert all(row.logit_error is not None and row.interleaved == together for row in rows)


SWEEP = (
    "sweep", "--starting-layer", "4", "--n-local", "64", "--last-n", "0", "--last-n", "32", "--task", "vt",
    "--length", "768", "--samples", "2", "--repeats", "1", "--device", "cpu", "--offline",
)  # fmt: skip


def start(cwd):
    program = [sys.executable, "-c", "from tmbench.cli import main; main()", *SWEEP]
    # Decoding waits for its threads at every token, which takes long where other processes hold the cores.
    environ = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(program, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def lines_in(folder, pattern):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(pattern))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was_and_measures_nothing_twice(tmp_path):
    # Three plans, dense and two variants, and a task of two samples.
    predictions, times = "results/*/ruler/predictions/*/*.jsonl", "results/*/ttft/*.csv"
    for lines in (1, 3):
        process = start(tmp_path)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and lines_in(tmp_path, predictions) < lines:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it should have been killed in its middle"
        assert lines <= lines_in(tmp_path, predictions) < 6
    process = start(tmp_path)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "What one change does" in out
    assert "last_n: 0 to 32" in out
    assert lines_in(tmp_path, predictions) == 6, "no sample is answered twice"
    assert lines_in(tmp_path, times) == 3 + 2, "three rows in two files with a header: nothing is timed twice"
    rows = read_all(tmp_path / "results", RulerRow)
    last = sorted((row.method, row.settings.get("last_n", 0)) for row in rows)
    assert last == [("dense", 0), ("tri_mix", 0), ("tri_mix", 32)]
    assert {(row.task, row.status, row.samples) for row in rows} == {("vt", "ok", 2)}
