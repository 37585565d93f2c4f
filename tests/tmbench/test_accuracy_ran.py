"""What RULER runs decode, what that takes, and which backends rows name."""

from __future__ import annotations

import json
import time

import pytest
import torch

import under_plan
from accuracy_runs import job_maker, rows_of, samples_of
from plans import plan_of
from tmbench.engine.attention import applied
from tmbench.engine.prefill import EAGER, PLAIN
from tmbench.engine.session import Session
from tmbench.methods.plan import ModelShape, Plan
from tmbench.results.predictions import kept_predictions, read_predictions
from tmbench_kernels import VerticalSlash


@pytest.fixture
def job(make_model, tokenizer, tmp_path):
    return job_maker(make_model, tokenizer, tmp_path)


@pytest.mark.slow
def test_what_an_answer_costs_does_not_hold_what_counting_costs(job, tmp_path, monkeypatch):
    """The pairs of a dynamic pattern are those of its definition, and the time that counting takes is taken off."""
    budgets = tmp_path / "budgets.json"
    budgets.write_text(json.dumps([{str(head): ["vertical_and_slash", 30, 100, 1.0] for head in range(4)}] * 4))
    plan = plan_of(ModelShape("", 4, 4), "minference", patterns=budgets)
    work = job(samples=2, tasks=("vt",), plans=[plan])
    kept, causal = 0, 0

    def look(layer, pattern, q, k, scale):
        nonlocal kept, causal
        mask = pattern.mask(q, k, scale=scale)
        kept, causal = kept + int(mask.sum()), causal + int(torch.ones_like(mask).tril().sum())

    example = samples_of(work, "vt", 1024)[0]
    with torch.inference_mode(), applied(work.loaded.model, "minference", patterns=budgets) as session:
        session.observer = look
        work.loaded.model(torch.tensor([work.loaded.tokenizer(example.prompt)["input_ids"]]))
    pairs = VerticalSlash.pairs
    monkeypatch.setattr(VerticalSlash, "pairs", lambda *a, **kw: time.sleep(5) or pairs(*a, **kw))
    clock, real = [0.0], time.perf_counter
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: real() + clock[0])
    work.run()
    row = rows_of(work.root)["minference", "vt", 1024]
    assert clock[0] == 4 * 5, "one sample of two is counted"
    assert row.seconds_per_sample < 5
    assert row.coverage == pytest.approx(kept / causal)
    assert 0.1 < row.coverage < 0.95


@pytest.mark.slow
def test_rows_name_the_backends_that_ran(job, monkeypatch):
    """Not those that would run for the nominal length, and none where attention was not reached."""
    monkeypatch.setattr(Plan, "backends", lambda plan, q, k, v: "dense:planned")
    work = job(samples=1, tasks=("vt",))
    work.run()
    rows = rows_of(work.root)
    expected = {"dense": "dense:sdpa", "streaming": "triangle:torch-banded"}
    assert {method: row.backends for (method, _, _), row in rows.items()} == expected
    for path in work.root.glob("*/ruler/*.csv"):
        path.unlink()
    work.run()
    assert {method: row.backends for (method, _, _), row in rows_of(work.root).items()} == expected, "from kept samples"
    other = job(samples=1, tasks=("vt",), root=work.root / "failed", plans=work.plans[:1])
    monkeypatch.setattr(Session, "generate", lambda *_: (_ for _ in ()).throw(RuntimeError("before attention")))
    other.run()
    assert [(row.status, row.backends) for row in rows_of(other.root).values()] == [("failed", "")]


@pytest.mark.slow
def test_a_failure_behind_attention_still_names_what_ran(job, monkeypatch):
    real = Session.generate

    def fail(*arguments):
        real(*arguments)
        raise RuntimeError("behind attention")

    monkeypatch.setattr(Session, "generate", fail)
    work = job(samples=1, tasks=("vt",))
    work.run()
    assert {(row.status, row.backends) for row in rows_of(work.root).values()} == {
        ("failed", "dense:sdpa"),
        ("failed", "triangle:torch-banded"),
    }


@pytest.mark.slow
def test_real_answers_decode_what_the_model_generates(job):
    work = job(samples=1, tasks=("vt",), plans=[plan_of(ModelShape("", 4, 4), "dense")])
    work.run()
    row = rows_of(work.root)["dense", "vt", 1024]
    prediction = read_predictions(kept_predictions(work.root, row).path)[0]
    example = samples_of(work, "vt", 1024)[0]
    ids = torch.tensor([work.loaded.tokenizer(example.prompt)["input_ids"]])
    # Under the same method: random weights leave near ties, which another kernel's rounding would turn.
    with applied(work.loaded.model, "dense"):
        new = work.loaded.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)[
            0, ids.shape[1] :
        ]
    assert prediction.prediction == work.loaded.tokenizer.decode(new, skip_special_tokens=True)
    assert prediction.new_tokens == len(new) <= 30
    assert row.backends == "dense:sdpa"
    assert ids.shape[1] + 30 <= 1024


def test_generation_ends_at_the_models_end_token(make_model, prompt):
    model, ids = make_model("llama"), prompt(20)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "dense")
    for kind in (PLAIN, EAGER):
        model.generation_config.eos_token_id = None
        free = under_plan.generate(model, plan, ids, 8, kind)
        model.generation_config.eos_token_id = free[3]
        assert under_plan.generate(model, plan, ids, 8, kind) == free[: free.index(free[3]) + 1]
    assert len(free) == 8
