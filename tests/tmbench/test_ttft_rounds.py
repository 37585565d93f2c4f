"""Rounds of a TTFT that a killed run has kept: what goes on with them, and what does not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from bound_specs import timed
from tmbench.engine import roofline
from tmbench.errors import UserError
from tmbench.measure import ttft
from tmbench.measure.outlook import outlook
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.rows import TtftRow
from tmbench.results.tables import read_all

RATE = 1e11


@pytest.fixture
def job(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "gemm_throughput", lambda device, dtype, prefill_s=0.0: RATE)

    def make(**changes):
        loaded = LoadedModel("small", make_model("llama"), None, "random", "")
        return timed(loaded, changes.pop("names"), tmp_path, {"n_init": 2, "n_local": 16, "last_n": 8}, **changes)

    return make


def rows_of(job):
    return {(row.method, row.length): row for row in read_all(job.root, TtftRow)}


@pytest.fixture
def killed(job, monkeypatch):
    """Stop a measurement of three rounds of two methods in the second round, behind its first method."""

    def kill(work):
        real, left = ttft.first_token, iter(range(2 + 2 + 1))

        def first(prefill, ids):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(prefill, ids)

        with monkeypatch.context() as patch:
            patch.setattr(ttft, "first_token", first)
            with pytest.raises(KeyboardInterrupt):
                work.run()
        (path,) = work.root.glob("*/ttft/unfinished-*.jsonl")
        assert len(path.read_text().splitlines()) == 2, "a round is kept when all of it is done"
        assert not rows_of(work)
        return path

    return kill


TWO: dict[str, Any] = {"names": ("dense", "streaming"), "lengths": (96,), "repeats": 3}


def test_a_killed_run_goes_on_with_the_next_round(job, killed, passes):
    path = killed(job(**TWO))
    before = [json.loads(line) for line in path.read_text().splitlines()]
    passes.clear()
    work = job(**TWO)
    lines = outlook(work.spec, work.loaded).lines
    assert [(line.wanted, line.there) for line in lines] == [(1 + 3, 1)] * 2, "a round is kept, and a warm-up is made again"
    steps = work.steps()
    assert len(passes) == 2 + 2 * 2, "a warm-up and two rounds"
    (total,) = (step.part.total for step in steps if step.part is not None)
    assert sum(step.work for step in steps) == pytest.approx(total), "the progress bar must end where it says"
    rows = rows_of(work)
    for kept, method in zip(before, TWO["names"], strict=True):
        row = rows[method, 96]
        assert row.samples_s.split()[0] == f"{kept['seconds']:.6f}"
        assert (row.repeats, len(row.samples_s.split())) == (3, 3)
        assert row.matrix_rate_flops == RATE
    assert not path.exists(), "it says nothing more than the rows"


def test_a_round_that_lacks_a_method_is_timed_again(job, killed, passes):
    path = killed(job(**TWO))
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    passes.clear()
    (work := job(**TWO)).run()
    assert len(passes) == 2 + 3 * 2
    assert {row.repeats for row in rows_of(work).values()} == {3}


@pytest.mark.parametrize("about", ["environment", "warmup", "overwrite"])
def test_rounds_of_another_measurement_are_not_gone_on_with(job, killed, passes, about):
    killed(job(**TWO))
    passes.clear()
    other = replace(environment.current(torch.device("cpu")), commit="another")
    changes: dict[str, Any] = {"environment": other, "warmup": 2, "overwrite": True}
    job(**TWO, **{about: changes[about]}).run()
    assert len(passes) == (4 if about == "warmup" else 2) + 3 * 2


def test_rounds_that_are_all_kept_make_their_rows(job, monkeypatch, passes):
    work = job(**TWO)
    with monkeypatch.context() as patch:
        patch.setattr(ttft, "keep", Stop())
        with pytest.raises(KeyboardInterrupt):
            work.run()
    passes.clear()
    (work := job(**TWO)).run()
    assert not passes
    assert {method for method, _ in rows_of(work)} == set(TWO["names"])


def test_a_file_of_rounds_that_is_not_ours_is_refused(job, killed, passes):
    path = killed(job(**TWO))
    path.write_text(path.read_text().replace('"status": "ok"', '"status": "fine"'))
    passes.clear()
    with pytest.raises(UserError, match="unfinished-.*jsonl.*line 1"):
        job(**TWO).run()
    assert not passes


class Stop:
    """Stands for a process that is stopped where this is called."""

    def __call__(self, *arguments):
        raise KeyboardInterrupt


@pytest.mark.parametrize(("prefill_s", "timed_s"), [(0.0, 0.08), (0.001, 0.08), (0.25, 0.25), (9.0, 0.5)])
def test_the_rate_is_what_a_hot_chip_sustains(monkeypatch, prefill_s, timed_s):
    """One that needs twice as long for a product once it has worked for as long as the prefill took."""
    busy, runs = 0, []

    def seconds(a, b, out, products):
        nonlocal busy
        took = sum(0.02 if prefill_s and busy + n > 100 * timed_s else 0.01 for n in range(products))
        busy += products
        runs.append(products)
        return took

    monkeypatch.setattr(roofline, "_seconds", seconds)
    rate = roofline.gemm_throughput(torch.device("cpu"), torch.float32, prefill_s)
    count = round(100 * timed_s)
    assert runs == [1, 1, *[count] * (2 if prefill_s else 1)]
    assert rate == pytest.approx(2.0 * 2048**3 / (0.02 if prefill_s else 0.01), rel=0.03)


def test_the_longest_prefill_of_a_round_heats_the_chip(job, monkeypatch):
    heated = []
    monkeypatch.setattr(roofline, "gemm_throughput", lambda device, dtype, prefill_s: heated.append(prefill_s) or RATE)
    work = job(names=("dense", "tri_mix"), lengths=(64,), repeats=2)
    (dense, tri_mix) = work.run()
    slowest = [max(pair) for pair in zip(*(map(float, row.samples_s.split()) for row in (dense, tri_mix)), strict=True)]
    assert heated == pytest.approx(slowest, abs=1e-6)
