"""TTFT rows: what they hold, what is skipped, and what a failure becomes."""

from __future__ import annotations

import json
import time
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from bound_specs import timed
from plans import plan_of
from tmbench.engine import roofline
from tmbench.engine.attention import applied_plan
from tmbench.engine.first_token import first_token
from tmbench.engine.prefill import EAGER, PLAIN, Prefill
from tmbench.errors import UserError
from tmbench.measure import keeping, ttft
from tmbench.methods.plan import Plan
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results import failures, files
from tmbench.results.rows import TtftRow
from tmbench.results.tables import CorruptResultsError, csv_path, read_all
from tmbench.suites.prompts import prompt_ids

NAMES = ("dense", "tri_mix", "minference", "streaming")


RATE = 1e11


@pytest.fixture
def job(make_model, tmp_path, monkeypatch):
    # A large matrix product for every test would take longer than the tests.
    monkeypatch.setattr(roofline, "gemm_throughput", lambda device, dtype, prefill_s: RATE)

    def make(names=NAMES, lengths=(96, 160), dense_backend=None, parameters=None, **changes):
        model = make_model("llama")
        loaded = LoadedModel("small", model, None, "random", "")
        settings = {"n_init": 2, "n_local": 16, "last_n": 8, "dense_backend": dense_backend or "", **(parameters or {})}
        return timed(loaded, names, tmp_path, settings, lengths=lengths, **changes)

    return make


def rows_of(job):
    return {(row.method, row.length): row for row in read_all(job.root, TtftRow)}


def test_a_first_token_is_the_models_own(make_model, prompt):
    model, ids = make_model("llama"), prompt(40)
    first = first_token(Prefill(model), ids)
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    torch.testing.assert_close(first.logits[0], logits)
    assert first.tokens == (int(logits.argmax()),)
    assert first.seconds > 0


@pytest.mark.slow
def test_the_gemm_throughput_is_a_rate():
    start = time.perf_counter()
    rate = roofline.gemm_throughput(torch.device("cpu"), torch.float32)
    seconds = time.perf_counter() - start
    assert rate > 2 * 2 * 2048**3 / seconds, "two products and more fit into the time that all of it took"
    assert rate < 1e14


@pytest.mark.slow
def test_rows_hold_what_was_measured(job):
    work = job()
    steps = work.steps()
    (total,) = (step.part.total for step in steps if step.part is not None)
    assert total > 0
    assert sum(step.work for step in steps) == pytest.approx(total), "the progress bar must end where it says"
    rows = rows_of(work)
    assert set(rows) == {(name, length) for name in NAMES for length in (96, 160)}
    for row in rows.values():
        assert row.status == "ok"
        samples = [float(text) for text in row.samples_s.split()]
        assert len(samples) == row.repeats == 2
        assert row.ttft_min_s == pytest.approx(min(samples), abs=1e-6)
        assert row.ttft_min_s <= row.ttft_median_s <= row.ttft_max_s
        assert row.matrix_rate_flops == RATE
        assert row.floor_s == pytest.approx(row.flop / RATE)
        assert row.ttft_over_floor == pytest.approx(row.ttft_median_s / row.floor_s)
        assert row.interleaved == " ".join(NAMES)
        assert row.transformers
        assert row.environment == work.environment.name


def test_density_and_flop_are_counted_from_the_definition(job):
    work = job(lengths=(96,))
    work.run()
    rows = rows_of(work)
    causal = 96 * 97 // 2
    triangle = sum(1 for i in range(96) for j in range(i + 1) if j < 2 or i - j < 16 or i >= 88)
    assert rows["dense", 96].coverage == 1
    assert rows["tri_mix", 96].coverage == pytest.approx((2 * causal + 2 * triangle) / (4 * causal))
    assert rows["minference", 96].coverage == 1, "a budget above the length is dense"
    # Per layer: q and o 64x64, k and v 64x32, three of 64x96. Of the last layer only k and v work on every position, and one
    # row of attention is needed; the head of 97 works on one position.
    key_value, rest = 2 * 64 * 32, 2 * 64 * 64 + 3 * 64 * 96
    linear = 2 * (96 * (4 * key_value + 3 * rest) + rest + 64 * 97)
    assert roofline.linear_flop(work.loaded.model, 96) == linear
    assert rows["dense", 96].flop == linear + 4 * 16 * 4 * (3 * causal + 96)
    assert rows["tri_mix", 96].flop == linear + 4 * 16 * 4 * (2 * causal + triangle + 96)


@pytest.mark.slow
def test_the_density_of_a_dynamic_method_is_that_of_its_definition(job, tmp_path, make_model):
    """Counted once, outside of the repeats, on the very prompt."""
    budgets = tmp_path / "budgets.json"
    budgets.write_text(json.dumps([{str(head): ["vertical_and_slash", 30, 100, 1.0] for head in range(4)}] * 4))
    model = make_model("llama")
    plan = plan_of(model, "minference", patterns=budgets)
    work = job(names=(), lengths=(400,), plans=[plan])
    counted = []

    def look(layer, pattern, q, k, scale):
        counted.append(int(pattern.mask(q, k, scale=scale).sum()))

    with torch.inference_mode(), applied_plan(work.loaded.model, plan) as session:
        session.observer = look
        work.loaded.model(prompt_ids("random", 400, work.loaded, work.seed))
    work.run()
    (row,) = rows_of(work).values()
    assert row.coverage == pytest.approx(sum(counted) / (4 * 4 * 400 * 401 / 2))
    assert 0.2 < row.coverage < 0.95


@pytest.mark.slow
def test_rows_of_block_sparse_methods(job):
    """With next to no mass to cover, XAttention keeps the first block and the own one, whatever the data: 2 of 3 at most."""
    names = ("dense", "flexprefill", "tri_mix_xattention", "flashprefill")
    (work := job(names=names, lengths=(300,), parameters={"threshold": 1e-9, "min_budget": 200})).run()
    rows = rows_of(work)
    causal, sparse = 300 * 301 // 2, 300 * 301 // 2 - 44 * 128
    triangle: Any = sum(1 for i in range(300) for j in range(i + 1) if j < 2 or i - j < 16 or i >= 292)
    assert rows["tri_mix_xattention", 300].coverage == pytest.approx((2 * sparse + 2 * triangle) / (4 * causal))
    assert rows["tri_mix_xattention", 300].backends == "triangle:torch-banded+xattention:torch-blocks"
    assert rows["flexprefill", 300].backends == "flex_prefill:torch-blocks"
    assert rows["flashprefill", 300].coverage == 1, "its window of four blocks is the whole prompt"
    assert rows["flashprefill", 300].logit_error == pytest.approx(0, abs=1e-4)
    triangle = {"layers": "2-", "n_init": 2, "n_local": 16, "last_n": 8}
    assert {name: dict(row.settings) for (name, _), row in rows.items()} == {
        "dense": {},
        "flexprefill": {"gamma": 0.95, "tau": 0.1, "min_budget": 200},
        "tri_mix_xattention": {**triangle, "stride": 16, "threshold": 1e-9, "first_chunk": 0},
        "flashprefill": {"alpha": 0.1},
    }
    assert work.pending_plans() == {}, "parameters survive being written and read"


def test_how_the_model_ran_and_what_was_not_counted(job, monkeypatch):
    work = job(names=("dense",), lengths=(96,))
    passes = iter([5.0, 0.5, 0.25])
    real = ttft.first_token
    monkeypatch.setattr(ttft, "first_token", lambda prefill, ids: replace(real(prefill, ids), seconds=next(passes)))
    work.run()
    (row,) = rows_of(work).values()
    assert row.prefill == EAGER
    assert row.compile_s == pytest.approx(4.75, abs=0.1), "the first warm-up against the fastest repeat"
    assert job(names=("dense",), lengths=(96,)).pending_plans() == {}
    assert set(job(names=("dense",), lengths=(96,), prefill=PLAIN).pending_plans()) == {96}, "another prefill, another row"


def test_the_rate_is_measured_after_every_turn(job, monkeypatch):
    rates = iter([1e9, 3e9, 2e9, 7e9, 7e9, 7e9])
    order = []
    real = ttft.first_token
    monkeypatch.setattr(ttft, "first_token", lambda prefill, ids: order.append("pass") or real(prefill, ids))
    monkeypatch.setattr(roofline, "gemm_throughput", lambda *_: order.append("rate") or next(rates))
    work = job(names=("dense", "streaming"), repeats=3)
    work.run()
    assert order == 2 * (["pass"] * 2 + ["pass", "pass", "rate"] * 3)
    assert {(length, row.matrix_rate_flops) for (_, length), row in rows_of(work).items()} == {(96, 2e9), (160, 7e9)}


def test_memory_is_released_once_the_failed_pass_is_forgotten(job, monkeypatch):
    work = job(names=("dense", "streaming"), lengths=(96,))
    real, caches = ttft.first_token, []
    alive: list[bool] = []

    def first(prefill, ids):
        seconds = real(prefill, ids)
        caches.append(weakref.ref(prefill.cache))
        if prefill.session.plan.method == "dense":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return seconds

    monkeypatch.setattr(ttft, "first_token", first)
    monkeypatch.setattr(failures, "release_memory", lambda: alive.extend(cache() is not None for cache in caches))
    work.run()
    assert alive == [False]
    assert all(cache() is None for cache in caches)
    assert {method: row.status for (method, _), row in rows_of(work).items()} == {
        "dense": "out_of_memory",
        "streaming": "ok",
    }


def test_fidelity_is_measured_against_dense(job):
    work = job(lengths=(96,))
    work.run()
    rows = rows_of(work)
    assert rows["dense", 96].logit_error == 0
    assert rows["minference", 96].logit_error == pytest.approx(0, abs=1e-4)
    assert rows["minference", 96].same_token_as_dense
    assert rows["streaming", 96].logit_error > 0.01


@pytest.mark.slow
def test_rows_name_the_backends_that_ran(job, monkeypatch):
    """At other lengths or types another backend may serve: what ran counts, and nothing where nothing did."""
    monkeypatch.setattr(Plan, "backends", lambda plan, q, k, v: "dense:planned")
    work = job(names=("dense", "tri_mix"), lengths=(96,))
    fail_for(monkeypatch, "tri_mix", RuntimeError("a kernel broke"))
    work.run()
    rows = rows_of(work)
    assert (rows["dense", 96].backends, rows["tri_mix", 96].backends) == ("dense:sdpa", "")


def test_a_forced_backend_is_a_measurement_of_its_own(job):
    job(names=("dense", "streaming"), lengths=(96,)).run()
    forced = job(names=("dense", "streaming"), lengths=(96,), dense_backend="sdpa")
    assert [plan.method for plan in forced.pending_plans()[96]] == ["dense"]
    forced.run()
    rows = [row for row in read_all(forced.root, TtftRow) if row.method == "dense"]
    assert [(row.parameters, row.backends) for row in rows] == [("", "dense:sdpa"), ("dense_backend=sdpa", "dense:sdpa")]


def test_without_dense_there_is_no_fidelity(job):
    work = job(names=("streaming",), lengths=(96,))
    work.run()
    assert rows_of(work)["streaming", 96].logit_error is None


@pytest.mark.slow
def test_rows_that_are_there_are_skipped(job):
    job(lengths=(96,)).run()
    assert job(lengths=(96,)).pending_plans() == {}
    assert set(job(lengths=(96, 160)).pending_plans()) == {160}
    assert set(job(lengths=(96,), repeats=3).pending_plans()) == {96}, "more repeats are a new measurement"
    assert set(job(lengths=(96,), overwrite=True).pending_plans()) == {96}
    assert [step.part.total for step in job(lengths=(96,)).steps() if step.part is not None] == [0]


def fail_for(monkeypatch, method, error):
    real = ttft.first_token

    def first(prefill, ids):
        if prefill.session.plan.method == method:
            raise error
        return real(prefill, ids)

    monkeypatch.setattr(ttft, "first_token", first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory"),
        (RuntimeError("a kernel broke\nwith details"), "failed"),
    ],
)
def test_a_failure_is_a_row_and_the_rest_goes_on(job, monkeypatch, error, status):
    work = job(lengths=(96,))
    fail_for(monkeypatch, "tri_mix", error)
    work.run()
    rows = rows_of(work)
    assert rows["tri_mix", 96].status == status
    assert rows["tri_mix", 96].ttft_median_s is None
    assert "\n" not in rows["tri_mix", 96].error
    assert rows["streaming", 96].status == rows["dense", 96].status == "ok"
    assert ("tri_mix" in [plan.method for plan in job(lengths=(96,)).pending_plans().get(96, [])]) == (status == "failed")


def test_ctrl_c_keeps_what_was_finished(job, monkeypatch):
    work = job()
    real = ttft.first_token

    def first(prefill, ids):
        if ids.shape[1] == 160:
            raise KeyboardInterrupt
        return real(prefill, ids)

    monkeypatch.setattr(ttft, "first_token", first)
    with pytest.raises(KeyboardInterrupt):
        work.run()
    assert {length for _, length in rows_of(work)} == {96}
    assert work.loaded.model.config._attn_implementation == "sdpa"


def test_a_foreign_file_is_refused_before_anything_is_measured(job, passes):
    work = job(names=("dense", "streaming"), lengths=(96,), overwrite=True)
    path = csv_path(work.root, TtftRow, work.environment.device, "streaming")
    path.parent.mkdir(parents=True)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(CorruptResultsError, match="streaming.csv .*its columns differ"):
        work.run()
    assert path.read_text() == "a,b\n1,2\n"
    assert not passes


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(job, passes, monkeypatch):
    work = job(names=("dense",), lengths=(96,))

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(UserError, match="--output-dir: .*dense.csv cannot be written .Permission denied"):
        work.run()
    assert not passes


def test_what_one_file_refuses_costs_the_other_methods_nothing(job, monkeypatch):
    work = job(names=("dense", "tri_mix", "streaming"), lengths=(96,))
    real = keeping.append

    def append(root, row):
        if row.method == "dense":
            raise UserError("the disk went away")
        return real(root, row)

    monkeypatch.setattr(keeping, "append", append)
    with pytest.raises(UserError, match="the disk went away"):
        work.run()
    assert {method for method, _ in rows_of(work)} == {"tri_mix", "streaming"}


def test_each_prompt_is_built_once(job, monkeypatch):
    built = []
    real = ttft.batch_ids
    monkeypatch.setattr(ttft, "batch_ids", lambda *given: built.append(given[1]) or real(*given))
    job(names=("dense", "tri_mix"), lengths=(64, 96)).run()
    assert sorted(built) == [64, 96]


def test_a_prompt_that_reads_otherwise_is_measured_anew(job, monkeypatch):
    work = job(names=("dense",), lengths=(96,))
    work.run()
    assert rows_of(work)["dense", 96].prompt_hash == of_ids(prompt_ids("random", 96, work.loaded, 42)[0].tolist())
    assert not job(names=("dense",), lengths=(96,)).pending_plans()
    monkeypatch.setattr(ttft, "batch_ids", lambda kind, length, loaded, seed, size: torch.full((size, length), 7))
    again = job(names=("dense",), lengths=(96,))
    assert again.pending_plans()
    again.run()
    assert len(read_all(work.root, TtftRow)) == 2
