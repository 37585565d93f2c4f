"""Samples whose texts decode together: the same rows as one by one, whatever memory does meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from plans import plan_of
from tmbench.engine.batch import STEPPED, Batch
from tmbench.engine.prefill import EAGER
from tmbench.errors import UserError
from tmbench.measure import answering
from tmbench.measure.accuracy import AccuracySpec
from tmbench.measure.agree import AgreeSpec
from tmbench.measure.executor import InProcess
from tmbench.measure.loop import run
from tmbench.measure.spec import ModelSource
from tmbench.models import loading
from tmbench.results import environment
from tmbench.suites.ruler import Ruler

pytestmark = pytest.mark.slow
WINDOW: dict[str, Any] = {"n_init": 8, "n_local": 64, "last_n": 8}
ALIKE = ("status", "error", "score", "nulls", "samples", "prompt_tokens_mean", "coverage", "backends")


@pytest.fixture(scope="module")
def loaded():
    return loading.load("tiny", device="cpu")


@pytest.fixture
def spec(loaded, tmp_path):
    plans = [plan_of(loaded.shape, "dense"), plan_of(loaded.shape, "tri_mix", starting_layer=4, **WINDOW)]
    return AccuracySpec(
        model=ModelSource.of(loaded),
        environment=environment.current(torch.device("cpu")),
        root=tmp_path / "together",
        plans=plans,
        lengths=(600,),
        suite=Ruler(offline=True),
        tasks=("vt",),
        samples=3,
        prefill=EAGER,
        batch_size=4,
    )


@pytest.fixture
def alone(spec, loaded, tmp_path):
    """The rows of the same samples, answered one by one."""
    return run(replace(spec, root=tmp_path / "alone", batch_size=None), InProcess(loaded))


def alike(rows):
    return [{name: getattr(row, name) for name in ALIKE} for row in rows]


def answers(spec):
    return {path.name: path.read_text().splitlines() for path in spec.root.rglob("*.jsonl")}


def test_rows_are_those_of_one_by_one(spec, alone, loaded):
    rows = run(spec, InProcess(loaded))
    assert alike(rows) == alike(alone)
    assert (rows[0].score or 0) > 50
    assert {(row.decode, row.batch_size) for row in alone} == {("plain", 1)}
    assert {row.decode for row in rows} == {STEPPED}
    assert max(row.batch_size for row in rows) == 4
    assert all((row.seconds_per_sample or 0) > 0 for row in rows)


@pytest.mark.parametrize(("name", "at", "left"), [("read", 3, 1), ("advance", 1, 2)])
def test_memory_that_runs_out_makes_fewer_at_a_time(name, at, left, spec, alone, loaded, monkeypatch):
    """In the third prompt, with two at work, and in the first step of four: what was begun is begun again."""
    calls, sizes = 0, []
    real, resize = getattr(Batch, name), Batch.resize

    def failing(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Batch, "resize", lambda self, slots: sizes.append(slots) or resize(self, slots))
    monkeypatch.setattr(Batch, name, failing)
    rows = run(spec, InProcess(loaded))
    assert alike(rows) == alike(alone)
    assert sizes == [4, left]
    lines = [line for file in answers(spec).values() for line in file]
    assert len(lines) == 6, "each sample is kept once"


@pytest.mark.parametrize("name", ["read", "advance"])
def test_memory_that_does_not_suffice_for_one_is_a_row(name, spec, loaded, monkeypatch):
    def call(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Batch, name, call)
    rows = run(spec, InProcess(loaded))
    assert [row.status for row in rows] == ["out_of_memory"] * 2
    assert answers(spec) == {}


def test_a_step_that_fails_fails_those_at_work(spec, loaded, monkeypatch):
    def call(self, *args, **kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Batch, "advance", call)
    rows = run(spec, InProcess(loaded))
    assert [(row.status, row.error) for row in rows] == [
        ("failed", "RuntimeError: an illegal memory access was encountered")
    ] * 2


def test_texts_of_all_tasks_are_one_batch(spec, loaded, tmp_path, monkeypatch):
    spec = replace(spec, tasks=("vt", "niah_single_1"), samples=1, plans=spec.plans[:1])
    expected = run(replace(spec, root=tmp_path / "alone", batch_size=None), InProcess(loaded))
    made, real = [], answering.Together
    monkeypatch.setattr(answering, "Together", lambda *given: made.append(given) or real(*given))
    rows = run(spec, InProcess(loaded))
    assert len(made) == 1
    assert alike(rows) == alike(expected)
    assert [(row.task, row.batch_size) for row in rows] == [("vt", 2), ("niah_single_1", 2)]


def test_texts_of_other_sizes_are_another_batch(spec, loaded, monkeypatch):
    rooms = []
    real = Batch.__init__

    def made(self, model, capacity, most_new, **more):
        rooms.append((capacity, most_new))
        real(self, model, capacity, most_new, **more)

    monkeypatch.setattr(Batch, "__init__", made)
    rows = run(replace(spec, lengths=(600, 700), samples=1), InProcess(loaded))
    assert [row.length for row in rows] == [600, 600, 700, 700]
    assert rooms[0][0] < rooms[1][0]


def test_agreement_is_that_of_one_by_one(loaded, tmp_path):
    plans = [plan_of(loaded.shape, "dense"), plan_of(loaded.shape, "streaming", n_init=4, n_local=32)]
    about: dict[str, Any] = {
        "model": ModelSource.of(loaded),
        "environment": environment.current(torch.device("cpu")),
        "plans": plans,
    }
    spec = AgreeSpec(**about, root=tmp_path / "one", lengths=(200,), samples=3, new_tokens=12, prefill=EAGER)
    one = run(spec, InProcess(loaded))
    several = run(replace(spec, root=tmp_path / "several", batch_size=2), InProcess(loaded))
    figures = ("agreement", "divergence_median", "identical", "backends", "status")
    assert [[getattr(row, name) for name in figures] for row in several] == [
        [getattr(row, name) for name in figures] for row in one
    ]
    assert 0 < (one[1].agreement or 0) < 1, "a method that differs"
    assert {(row.decode, row.batch_size) for row in several} == {(STEPPED, 2)}


def test_several_at_once_that_cannot_be_had_are_refused(spec, loaded, monkeypatch):
    monkeypatch.setattr(answering, "step_kind", lambda *_: (None, "as its rotary embeddings depend on a text's length"))
    with pytest.raises(
        UserError,
        match=r"^--batch-size 4: tiny decodes one text at a time, as its rotary .* length: leave the option out$",
    ):
        run(spec, InProcess(loaded))


def test_a_gpu_that_decodes_one_text_at_a_time_is_said(spec, loaded, monkeypatch):
    why = "as its rotary embeddings depend on a text's length"
    monkeypatch.setattr(answering, "step_kind", lambda model, prefill: (None, why))
    assert spec.notes(loaded) == (), "a CPU always does"
    monkeypatch.setattr(type(loaded), "device", torch.device("cuda"))
    assert spec.notes(loaded) == (f"tiny decodes one text at a time, {why}: that takes long",)
    monkeypatch.setattr(answering, "step_kind", lambda *_: (STEPPED, ""))
    assert spec.notes(loaded) == ()
