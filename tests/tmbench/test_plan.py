"""``--plan``: what is there is counted, and what is not is estimated from what was measured, else from the roofline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plans import plan_of
from ruler_tasks import Sources, examples, write_dataset
from tmbench.engine import roofline
from tmbench.engine.prefill import EAGER
from tmbench.measure import answering
from tmbench.measure.accuracy import AccuracySpec
from tmbench.measure.agree import AgreeSpec
from tmbench.measure.answering import Answer
from tmbench.measure.estimate import FREE, Estimator
from tmbench.measure.executor import InProcess
from tmbench.measure.loop import run
from tmbench.measure.loss import LossSpec
from tmbench.measure.outlook import outlook
from tmbench.measure.probe import ProbeSpec
from tmbench.measure.spec import ModelSource, RowSpec
from tmbench.measure.ttft import TtftSpec, expected_flop
from tmbench.methods.layers import Budget
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.rows import RulerRow, TtftRow, now
from tmbench.results.shards import Shard
from tmbench.results.tables import append, read_all
from tmbench.results.words import duration
from tmbench.suites.ruler import Ruler
from tmbench_kernels import Triangle

FLOPS, BYTES = 1e9, 1e8
"""What the roofline divides by."""


@pytest.fixture
def loaded(make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(roofline, "gemm_throughput", lambda device, dtype, prefill_s=0.0: FLOPS)
    monkeypatch.setattr(roofline, "copy_rate", lambda device: BYTES)
    model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    return LoadedModel("small", model, tokenizer, "random", "")


@pytest.fixture
def spec(loaded, tmp_path):
    """``spec(**changes)``: two methods, two tasks, four samples."""

    def make(**changes):
        plans = [plan_of(loaded.shape, name, n_init=3, n_local=7) for name in ("dense", "streaming")]
        about = {"model": ModelSource.of(loaded), "environment": environment.current(torch.device("cpu")), "root": tmp_path}
        asked = {"suite": Ruler(offline=True), "tasks": ("niah_single_1", "vt"), "samples": 4, "lengths": (600,)}
        return AccuracySpec(**(about | asked | {"plans": plans, "prefill": EAGER} | changes))

    return make


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    """Stands in for decoding: dense takes a second for a sample and one more for each before it, streaming half."""

    real = answering.alone

    def answer(spec, loaded, item, ran, last):
        if not isinstance(spec, AccuracySpec):
            return real(spec, loaded, item, ran, last)
        seconds = (1.0 + item.index) / (1 + item.plan)
        return spec.sample(loaded, item, Answer([5], seconds, 1.0, "dense:sdpa", None))

    monkeypatch.setattr(answering, "alone", answer)


def lines(work, loaded):
    return [(line.plan.method, line.wanted, line.there, line.seconds, line.bases) for line in outlook(work, loaded).lines]


def test_without_rows_the_roofline_says_how_long_and_what_it_takes(spec, loaded):
    found = outlook(spec(tasks=("vt",)), loaded)
    dense, streaming = found.lines
    assert (dense.wanted, dense.there, dense.left, dense.bases) == (4, 0, 4, ("the roofline",))
    new, shape = 30, loaded.geometry
    weights = sum(p.numel() for p in loaded.model.parameters()) - loaded.model.get_input_embeddings().weight.numel()
    step = 4 * (weights + 600 * shape.layers * shape.kv_heads * 2 * 16)
    plan = plan_of(loaded.shape, "dense")
    expected = 4 * (expected_flop(loaded, plan, 600 - new) / FLOPS + (new - 1) * step / BYTES)
    assert dense.seconds == pytest.approx(expected)
    assert streaming.seconds < dense.seconds
    assert found.seconds == dense.seconds + streaming.seconds
    assert found.notes == (
        "The roofline is a lower bound: a GEMM throughput of 0.001 TFLOP/s, measured now, and in each decoding step all "
        "weights read once at 0.1 GB/s, measured now.",
    )


def test_what_is_there_is_counted_and_times_the_rest(spec, loaded, tmp_path):
    run(spec(samples=2), InProcess(loaded))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    dense, streaming = lines(spec(), loaded)
    assert dense == ("dense", 8, 4, 2 * 2 * 1.5, ("its samples so far",))
    assert streaming == ("streaming", 8, 4, 2 * 2 * 0.75, ("its samples so far",))
    assert [line[1:4] for line in lines(spec(samples=2), loaded)] == [(4, 4, 0.0)] * 2
    assert [line[1:3] for line in lines(spec(overwrite=True), loaded)] == [(8, 0)] * 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, "nothing is written"


def test_rows_of_the_same_but_for_the_seed_say_how_long(spec, loaded):
    run(spec(), InProcess(loaded))
    found = outlook(spec(seed=7), loaded)
    assert [(line.there, line.seconds, line.bases) for line in found.lines] == [
        (0, 8 * 2.5, ("rows",)),
        (0, 8 * 1.25, ("rows",)),
    ]
    assert found.notes == ()


def test_rows_of_another_length_are_scaled_by_the_roofline(spec, loaded):
    run(spec(tasks=("vt",)), InProcess(loaded))
    floor = {600: outlook(replace(spec(tasks=("vt",), seed=7), root=Path("none")), loaded)}
    floor[1200] = outlook(replace(spec(tasks=("vt",), lengths=(1200,)), root=Path("none")), loaded)
    found = outlook(spec(tasks=("vt",), lengths=(1200,)), loaded)
    for number, mean in enumerate((2.5, 1.25)):
        ratio = floor[1200].lines[number].seconds / floor[600].lines[number].seconds
        assert ratio > 1.2
        assert found.lines[number].seconds == pytest.approx(4 * mean * ratio)
        assert found.lines[number].bases == ("rows at 600",)
    assert found.notes


def test_rows_of_another_task_or_of_dense_are_the_last_that_are_taken(spec, loaded):
    run(spec(plans=spec().plans[:1], tasks=("vt",)), InProcess(loaded))
    found = lines(spec(tasks=("vt", "niah_single_1")), loaded)
    assert found[0][4] == ("its samples so far", "rows on vt")[1:]
    assert found[1][4] == ("rows of dense", "rows of dense on vt")


def test_times_to_first_token_say_how_long_a_prompt_takes(spec, loaded, tmp_path):
    here = environment.current(torch.device("cpu"))
    for plan, seconds in zip(spec().plans, (10.0, 5.0), strict=True):
        known: dict[str, Any] = here.row_fields() | loaded.row_fields() | plan.row_fields() | {"time": now(), "seed": 42}
        asked: dict[str, Any] = {"length": 570, "prompt": "kv", "repeats": 1, "warmup": 1, "interleaved": ""}
        row = TtftRow(**known, **asked, prefill=EAGER, ttft_median_s=seconds, matrix_rate_flops=2 * FLOPS)
        append(tmp_path, row)
    found = outlook(spec(tasks=("vt",)), loaded)
    floor = outlook(replace(spec(tasks=("vt",)), root=tmp_path / "none"), loaded)
    for line, alone, seconds in zip(found.lines, floor.lines, (10.0, 5.0), strict=True):
        decoding = alone.seconds / 4 - expected_flop(loaded, line.plan, 570) / FLOPS
        assert line.seconds == pytest.approx(4 * (seconds + decoding))
        assert line.bases == ("rows at 570 of tmbench ttft, and the roofline",)
    assert "a GEMM throughput of 0.002 TFLOP/s, as tmbench ttft measured" in found.notes[0]


def test_rows_of_another_device_model_or_prefill_say_nothing(spec, loaded, tmp_path):
    run(spec(), InProcess(loaded))
    rows = read_all(tmp_path, RulerRow)
    others: list[dict[str, Any]] = [{"device": "other"}, {"model_hash": "other"}, {"dtype": "float16"}, {"prefill": "plain"}]
    for changes in others:
        for row in rows:
            append(tmp_path / str(changes), replace(row, **changes))
        found = lines(spec(root=tmp_path / str(changes)), loaded)
        assert [line[4] for line in found] == [("the roofline",)] * 2


def test_a_shard_plans_its_own_part(spec, loaded):
    for of in (2, 3):
        parts = [outlook(spec(shard=Shard(number, of)), loaded) for number in range(1, of + 1)]
        assert sum(line.wanted for part in parts for line in part.lines) == 2 * 2 * 4
        assert sum(part.seconds for part in parts) == pytest.approx(outlook(spec(), loaded).seconds)
    run(spec(shard=Shard(1, 2)), InProcess(loaded))
    assert [line.left for line in outlook(spec(shard=Shard(1, 2)), loaded).lines] == [0, 0]
    assert [line.left for line in outlook(spec(shard=Shard(2, 2)), loaded).lines] == [4, 4]


def test_prepared_samples_are_counted_by_numbers_of_their_own(spec, loaded, tokenizer, tmp_path):
    made = examples("vt", 600, [1, 3, 5], tokenizer=tokenizer, sources=Sources(offline=True))
    write_dataset(tmp_path / "data", made)
    work = spec(suite=Ruler(data=tmp_path / "data"), tasks=("vt",), samples=3)
    for of in (Shard(1, 2), Shard(2, 2), None):
        own = replace(work, shard=of)
        wanted = len(own.places(3, 600, "vt"))
        assert [line[1:3] for line in lines(own, loaded)] == [(wanted, 0)] * 2
        run(own, InProcess(loaded))
        assert [line[1:3] for line in lines(own, loaded)] == [(wanted, wanted)] * 2


def test_questions_are_counted_that_every_context_has(spec, loaded):
    """Of these contexts the fifth has no second question that fits."""
    asking = {"tasks": ("niah_multikey_1",), "lengths": (700,), "questions": 2}
    for samples, wanted in ((5, 5), (4, 8)):
        work = spec(samples=samples, **asking)
        before = [line[1] for line in lines(work, loaded)]
        run(work, InProcess(loaded))
        assert before == [wanted] * 2
        assert [line[1:3] for line in lines(work, loaded)] == [(wanted, wanted)] * 2
        parts = [lines(replace(work, shard=Shard(number, 2)), loaded) for number in (1, 2)]
        assert sum(line[1] for part in parts for line in part) == 2 * wanted


@pytest.mark.slow
def test_what_did_not_fit_in_memory_is_not_planned_again(spec, loaded, monkeypatch):
    def answer(*given):
        raise MemoryError("no more")

    monkeypatch.setattr(answering, "alone", answer)
    work = spec(tasks=("vt",))
    assert {row.status for row in run(work, InProcess(loaded))} == {"out_of_memory"}
    assert [line.left for line in outlook(work, loaded).lines] == [0, 0]
    assert [line.left for line in outlook(replace(work, samples=6), loaded).lines] == [6, 6]


@pytest.mark.slow
def test_every_measurement_of_samples_has_a_plan(spec, loaded):
    asked = spec()
    about = {"model": asked.model, "environment": asked.environment, "root": asked.root}
    agree = AgreeSpec(**about, plans=asked.plans, lengths=(64,), prompt="random", samples=3, new_tokens=4)
    sampled = about | {"lengths": (200,), "tasks": ("random", "kv"), "samples": 2}
    window = Triangle(n_init=3, n_local=7, last_n=5)
    probe = ProbeSpec(**sampled, budget=Budget(0.3), window=window)
    loss = LossSpec(**sampled, plans=asked.plans)
    ttft = TtftSpec(**about, plans=asked.plans, lengths=(64,), prompt="random", repeats=2, prefill=EAGER)
    works: list[tuple[RowSpec[Any], list[int]]] = [(agree, [3, 3]), (probe, [4]), (loss, [4, 4]), (ttft, [3, 3])]
    for work, wanted in works:
        before = outlook(work, loaded)
        assert [(line.wanted, line.there) for line in before.lines] == [(count, 0) for count in wanted]
        assert before.seconds > 0
        run(work, InProcess(loaded))
        after = outlook(work, loaded)
        assert [(line.wanted, line.there) for line in after.lines] == [(count, count) for count in wanted]
        assert after.seconds == 0
    # Rows of the measurement itself come before times to first token.
    (later, *_) = outlook(replace(agree, seed=7), loaded).lines
    assert later.bases == ("rows",)


def test_texts_decode_together_as_far_as_all_that_their_slots_keep_goes(make_model, tmp_path):
    """Layers with windows keep every key; a model with a recurrence decodes one text at a time."""
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    model = make_model("gemma3_text", **windows)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    slot = 4 * 2 * (16 + 16) * 4 * 100
    room = replace(environment.current(torch.device("cpu")), memory_bytes=int((weights + 5.5 * slot) / FREE))
    loaded = LoadedModel("small", model, None, "random", "")
    assert Estimator(loaded, room, tmp_path, {"prefill": EAGER}, batch_size=64).texts(100) == 5
    hybrid = LoadedModel("small", make_model("lfm2", layer_types=["conv", "full_attention"] * 2), None, "random", "")
    assert Estimator(hybrid, room, tmp_path, {"prefill": EAGER}, batch_size=64).texts(100) == 1


def test_workers_that_share_the_cores_of_one_machine_save_no_time(tmbench):
    asked = ("ruler", "--plan", "--length", "1K", "--task", "vt", "--samples", "4", "--method", "dense", "--device", "cpu")
    code, out, err = tmbench(*asked, "--executor", "processes", "--workers", "4")
    assert code == 0, err
    assert "CPU-hours, which 4 workers would share;" in " ".join(out.split())


def test_durations_are_easily_read():
    assert [duration(seconds) for seconds in (1.234, 100, 300, 7000, 36_000, 3.6e9)] == [
        "1.23 s", "100 s", "5 min", "117 min", "10 h", "1,000,000 h"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_context_that_is_read_for_several_questions_counts_once(spec, loaded, monkeypatch):
    def answer(spec, loaded, item, ran, last):
        return spec.sample(loaded, item, Answer([5], 1.0 if "question" in item.title else 4.0, 1.0, "dense:sdpa", None))

    monkeypatch.setattr(answering, "alone", answer)
    asking = {"tasks": ("niah_multikey_2",), "lengths": (1000,), "ask_later": True, "plans": spec().plans[:1]}
    once, three = (spec(**asking, questions=questions) for questions in (1, 3))
    (whole,), (all_three,) = lines(once, loaded), lines(three, loaded)
    assert (whole[1:3], all_three[1:3]) == ((4, 0), (12, 0))
    shape = loaded.geometry
    weights = sum(p.numel() for p in loaded.model.parameters()) - loaded.model.get_input_embeddings().weight.numel()
    decoding = 4 * 127 * 4 * (weights + 1000 * shape.layers * shape.kv_heads * 2 * 16) / BYTES
    assert all_three[3] == pytest.approx(whole[3] + 2 * decoding)
    with monkeypatch.context() as patch:
        patch.setattr(Estimator, "keeps_contexts", False)
        assert lines(three, loaded)[0][3] == pytest.approx(3 * whole[3])
    # The first question is answered already, so the second has the contexts read.
    run(once, InProcess(loaded))
    assert lines(three, loaded)[0][2:4] == (4, pytest.approx(4 * 4.0 * (1 + decoding / whole[3])))
    # Times of later questions say nothing of one that has its context read.
    run(three, InProcess(loaded))
    assert lines(replace(once, seed=7), loaded)[0][3:] == (4 * 4.0, ("rows",))
