"""The loop and its executors: specs and items pickle, and whoever measures the items, the same rows come of them."""

from __future__ import annotations

import pickle
import threading
import time
from dataclasses import asdict, replace
from itertools import chain, islice
from typing import Any

import pytest
import torch

from plans import plan_of
from tmbench.engine import roofline
from tmbench.engine.prefill import EAGER
from tmbench.errors import UserError
from tmbench.measure.accuracy import AccuracySpec
from tmbench.measure.agree import AgreeSpec
from tmbench.measure.ahead import ahead
from tmbench.measure.executor import InProcess, work
from tmbench.measure.loop import run
from tmbench.measure.loss import LossSpec
from tmbench.measure.probe import ProbeSpec
from tmbench.measure.search import SearchSpec
from tmbench.measure.spec import ModelSource, Step
from tmbench.measure.sweep import SweepSpec, swept_plans
from tmbench.measure.ttft import TtftSpec
from tmbench.measure.tune import Choice, Limits, TuneSpec
from tmbench.methods.layers import Budget
from tmbench.methods.spec import MethodSpec
from tmbench.models import loading
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.tables import csv_paths
from tmbench.suites.ruler import Ruler
from tmbench_kernels import Triangle

WINDOW: dict[str, Any] = {"n_init": 3, "n_local": 7, "last_n": 5}
TIMES = {
    "time",
    "seconds_per_sample",
    "ttft_median_s",
    "ttft_min_s",
    "ttft_max_s",
    "samples_s",
    "ttft_over_floor",
    "compile_s",
    "measured_s",
}
"""The columns in which two measurements of the same differ."""
KINDS = ("ttft", "accuracy", "agree", "loss", "probe", "sweep", "search", "tune")


@pytest.fixture
def loaded(make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(roofline, "gemm_throughput", lambda device, dtype, prefill_s: 1e11)
    model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    return LoadedModel("small", model, tokenizer, "random", "")


@pytest.fixture
def specs(loaded):
    """``specs(kind, root)``: a small spec of each measurement."""

    def make(kind, root):
        source: dict[str, Any] = {"model": ModelSource.of(loaded)}
        about = source | {"environment": environment.current(torch.device("cpu")), "root": root}
        plans = [plan_of(loaded.shape, name, **WINDOW) for name in ("dense", "streaming", "minference")]
        ttft = TtftSpec(**about, plans=plans, lengths=(64, 48), prompt="random", repeats=1, prefill=EAGER)
        accuracy = AccuracySpec(
            **about, plans=plans, lengths=(600,), suite=Ruler(offline=True), tasks=("niah_single_1", "vt"), samples=2
        )
        if kind == "sweep":
            variants = [MethodSpec.of("tri_mix", WINDOW | {"last_n": last}) for last in (5, 0)]
            swept = swept_plans(variants, loaded.shape, 600)
            return SweepSpec(**about, plans={600: swept}, ttft=ttft, accuracy=replace(accuracy, tasks=("vt",), samples=1))
        if kind == "search":
            return SearchSpec(**source, output=root / "found.json", length=2600, prompt="random")
        if kind == "tune":
            return TuneSpec(
                **about, method="tri_mix", values=WINDOW, tasks=("random",), lengths=(40, 48), limits=Limits(2.0, 9.0),
                order=(1, 0), order_source="depth", rules=(Choice("half", (1,)),), compared=4, budget=90, held_lengths=(64,),
            )  # fmt: skip
        asked = about | {"lengths": (40,), "tasks": ("random", "kv"), "samples": 2}
        return {
            "ttft": ttft,
            "accuracy": accuracy,
            "agree": AgreeSpec(**about, plans=plans, lengths=(64,), prompt="random", samples=3, new_tokens=4),
            "loss": LossSpec(**(asked | {"lengths": (200,)}), plans=plans),
            "probe": ProbeSpec(**(asked | {"lengths": (200,)}), budget=Budget(0.3), window=Triangle(**WINDOW)),
        }[kind]

    return make


class Elsewhere(InProcess):
    """As several workers elsewhere would: all that passes is pickled, and the last job of those at work ends first."""

    elsewhere = True

    def __init__(self, loaded, workers=3):
        super().__init__(loaded)
        self.workers = workers
        self.measured = []
        self.rounds = 0

    def run(self, spec, jobs, tell):
        self.rounds += 1
        loaded, sent = self.open(spec.model), pickle.dumps(spec)
        jobs = iter(jobs)
        while batch := [pickle.dumps(job) for job in islice(jobs, self.workers)]:
            for number, item in map(pickle.loads, reversed(batch)):
                self.measured.append(item)
                work(pickle.loads(sent), [(number, item)], loaded, lambda told: tell(pickle.loads(pickle.dumps(told))))


def without_times(result):
    """All of a result that two measurements agree in."""
    values = asdict(result) if hasattr(result, "key") else {"found": result}
    return {name: value for name, value in values.items() if name not in TIMES}


def by_row(results):
    return sorted((without_times(one) for one in results), key=repr)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_and_its_items_pickle_and_make_the_same_rows_elsewhere(kind, specs, loaded, tmp_path):
    here = run(specs(kind, tmp_path / "here"), InProcess(loaded))
    spec = specs(kind, tmp_path / "there")
    assert len(pickle.dumps(spec)) < 10_000, "names and numbers"
    executor = Elsewhere(loaded)
    there = run(pickle.loads(pickle.dumps(spec)), executor)
    assert executor.measured
    assert by_row(there) == by_row(here)
    assert (
        len(here) == {"ttft": 6, "accuracy": 6, "agree": 3, "loss": 6, "probe": 20, "sweep": 6, "search": 4, "tune": 6}[kind]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "search"])
def test_what_is_handed_over_is_what_was_kept_and_a_second_run_measures_nothing(kind, specs, loaded, tmp_path):
    spec = specs(kind, tmp_path)
    steps: list[Step[Any]] = []
    first = run(spec, InProcess(loaded))
    size = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    executor = Elsewhere(loaded)
    second = run(spec, executor, steps.append)
    assert executor.measured == []
    assert sum(step.measured for step in steps) == 0
    assert {row.key: row for row in second} == {row.key: row for row in first}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == size
    assert sum(len(csv_paths(tmp_path, row)) for row in {type(row) for row in first}) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_progress_ends_where_it_said(kind, specs, loaded, tmp_path):
    for _ in range(1 if kind == "search" else 2):
        steps: list[Step[Any]] = []
        run(specs(kind, tmp_path), InProcess(loaded), steps.append)
        total = sum(step.part.total for step in steps if step.part is not None)
        assert sum(step.work for step in steps) == pytest.approx(total)


class Failing(Elsewhere):
    """One item of a target fails while others of it are at work."""

    def __init__(self, loaded, failing):
        super().__init__(loaded)
        self.failing = failing

    def run(self, spec, jobs, tell):
        real = type(spec).measure

        def measure(spec, item, worker):
            if item.title in self.failing:
                worker.ran.add("dense:half")
                raise MemoryError("no more")
            real(spec, item, worker)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(spec), "measure", measure)
            super().run(spec, jobs, tell)


@pytest.mark.slow
def test_an_item_that_fails_beside_others_makes_one_row_say_so_and_keeps_what_the_others_found(specs, loaded, tmp_path):
    spec = replace(specs("accuracy", tmp_path), tasks=("vt",), samples=5)
    executor = Failing(loaded, {"streaming on vt at 600, sample 2 of 5"})
    rows = run(spec, executor)
    assert [(row.method, row.status) for row in rows] == [
        ("dense", "ok"),
        ("streaming", "out_of_memory"),
        ("minference", "ok"),
    ]
    failed = rows[1]
    assert failed.error == "MemoryError: no more"
    assert failed.backends == "dense:half+triangle:torch-banded"
    assert failed.score is None
    asked = [item.index for item in executor.measured if item.plan == 1]
    assert len(asked) < 5, "what comes behind a failure is not measured any more"
    (file,) = tmp_path.glob("*/ruler/predictions/streaming/*.jsonl")
    assert file.read_bytes().count(b"\n") == len(asked) - 1


@pytest.mark.slow
def test_a_method_waits_for_the_text_of_dense(specs, loaded, tmp_path):
    """Two rounds: whatever an executor does at once, no method follows a text that is not there."""
    executor = Elsewhere(loaded, workers=100)
    run(specs("agree", tmp_path), executor)
    texts = [item.text for item in executor.measured]
    assert [text is None for text in texts] == [True] * 3 + [False] * 6


@pytest.mark.slow
def test_tasks_do_not_wait_for_each_other_where_samples_are_measured_elsewhere(specs, loaded, tmp_path):
    executor = Elsewhere(loaded)
    rows = run(specs("accuracy", tmp_path), executor)
    assert executor.rounds == 1
    assert [(row.task, row.method) for row in rows] == [
        (task, method) for task in ("niah_single_1", "vt") for method in ("dense", "streaming", "minference")
    ], "in the order in which they were asked for, whichever ended first"


def test_the_next_task_is_prepared_while_the_samples_of_one_are_measured(specs, loaded, tmp_path, monkeypatch):
    prepared, own = [], Ruler.samples

    def samples(self, task, *more):
        found = own(self, task, *more)
        prepared.append(task)
        return found

    class Slow(Elsewhere):
        def run(self, spec, jobs, tell):
            given = iter(jobs)
            first = next(given)
            deadline = time.monotonic() + 60
            while len(prepared) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert prepared == ["niah_single_1", "vt"], "with the first of many items still at work"
            super().run(spec, chain([first], given), tell)

    monkeypatch.setattr(Ruler, "samples", samples)
    rows = run(specs("accuracy", tmp_path), Slow(loaded))
    assert {row.status for row in rows} == {"ok"}


def test_what_is_made_ahead_is_made_while_the_one_before_is_used_and_fails_behind_it():
    made = []

    def make():
        for number in range(3):
            made.append(number)
            yield number
        raise UserError("no more")

    items = ahead(make())
    assert next(items) == 0
    deadline = time.monotonic() + 30
    while made != [0, 1, 2] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2]
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(UserError, match="no more"):
        next(items)


def test_what_is_made_ahead_ends_with_who_wanted_it():
    def make():
        try:
            yield from range(1000)
        finally:
            ended.set()

    ended = threading.Event()
    items = ahead(make())
    assert next(items) == 0
    items.close()
    assert ended.wait(30)


def test_a_run_that_is_interrupted_leaves_no_thread_in_the_code_of_a_library(specs, loaded, tmp_path):
    """The interpreter would end under it, and abort."""

    class Interrupted(Elsewhere):
        def run(self, spec, jobs, tell):
            next(iter(jobs))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(specs("accuracy", tmp_path), Interrupted(loaded))
    assert "ahead" not in [thread.name for thread in threading.enumerate()]


def test_an_executor_refuses_another_model(specs, loaded, tmp_path):
    spec = specs("ttft", tmp_path)
    with pytest.raises(ValueError, match="this executor holds .*'small'.*, not .*'other'"):
        run(replace(spec, model=replace(spec.model, name="other")), InProcess(loaded))


def test_an_executor_without_a_model_loads_that_of_the_spec(tmp_path):
    source = ModelSource("tiny", "checkpoint", "cpu", "float32")
    executor = InProcess()
    here = environment.current(torch.device("cpu"))
    plan = plan_of(loading.load("tiny", device="cpu", plan_only=True).shape, "dense")
    spec = AgreeSpec(model=source, environment=here, root=tmp_path, plans=[plan], lengths=(64,), samples=1, new_tokens=2)
    (row,) = run(spec, executor)
    assert (row.model, row.weights, row.status, row.dtype) == ("tiny", "checkpoint", "ok", "float32")
    assert executor.open(source) is executor.open(spec.model)
