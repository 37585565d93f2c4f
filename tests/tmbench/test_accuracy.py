"""RULER runs: samples shared by all methods, predictions that survive, chat templates, and prepared data."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import under_plan
from bound_specs import Bound
from plans import plan_of
from ruler_tasks import TASKS, Example, encode_prompt, write_dataset
from tmbench.engine.attention import applied
from tmbench.engine.prefill import EAGER, PLAIN
from tmbench.engine.session import Session
from tmbench.errors import UserError
from tmbench.measure import answering, keeping
from tmbench.measure.accuracy import AccuracySpec
from tmbench.methods.plan import ModelShape, Plan
from tmbench.models import loading
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.predictions import Prediction, kept_predictions, read_predictions
from tmbench.results.rows import RulerRow
from tmbench.results.tables import read_all
from tmbench.suites.ruler import Ruler
from tmbench_kernels import VerticalSlash


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer("tiny")


@pytest.fixture
def job(make_model, tokenizer, tmp_path):
    def make(**changes):
        model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
        loaded = LoadedModel("small", model, tokenizer, "random", "")
        plans = [plan_of(model, name) for name in ("dense", "streaming")]
        values = {
            "plans": plans, "lengths": (1024,), "samples": 3, "tasks": ("niah_single_1", "vt"),
            "environment": environment.current(torch.device("cpu")), "root": tmp_path, "suite": Ruler(offline=True),
        }  # fmt: skip
        return Bound(AccuracySpec, loaded, **(values | changes))

    return make


@pytest.fixture
def answers(monkeypatch):
    """Stands in for generation: answers with the right reference for dense, with nothing for any other method."""
    asked = []

    def answer(spec, loaded, item, ran):
        method, sample = spec.plans[item.plan].method, item.sample
        asked.append((method, item.task, sample.index, sample.prompt))
        text = " ".join(sample.references) if method == "dense" else " "
        score = TASKS[item.task].score(text, sample.references)
        coverage = {"dense": 1.0, "streaming": 0.25}[method] if item.count else None
        backends = {"dense": "dense:sdpa", "streaming": "triangle:torch-banded"}[method]
        ran.add(backends)
        about = (400, 5, 0.5, coverage, backends, sample.prompt_hash)
        return Prediction(sample.index, text, sample.references, score, *about)

    monkeypatch.setattr(answering, "alone", answer)
    return asked


def samples_of(work, task, length):
    """The samples that every method is asked."""
    return work.suite.samples(task, length, range(work.samples), work.seed, work.loaded.tokenizer)


def rows_of(root):
    return {(row.method, row.task, row.length): row for row in read_all(root, RulerRow)}


@pytest.mark.slow
def test_all_methods_answer_the_same_samples(job, answers):
    work = job()
    assert sum(step.work for step in work.steps()) == 2 * 2 * 3
    rows = rows_of(work.root)
    assert set(rows) == {(method, task, 1024) for method in ("dense", "streaming") for task in ("niah_single_1", "vt")}
    dense, other = rows["dense", "vt", 1024], rows["streaming", "vt", 1024]
    assert (dense.score, dense.nulls, dense.samples) == (100.0, 0, 3)
    assert (other.score, other.nulls, other.samples) == (0.0, 3, 3)
    assert (dense.source, dense.wording, dense.prompt_tokens_mean, dense.seconds_per_sample) == (
        "noise",
        "tmbench-1",
        400,
        0.5,
    )
    prompts = {method: [entry[1:] for entry in answers if entry[0] == method] for method in ("dense", "streaming")}
    assert prompts["dense"] == prompts["streaming"]
    assert len({entry[-1] for entry in prompts["dense"]}) == 6


def test_answers_of_control_characters_are_null(job, answers, monkeypatch):
    real = answering.alone
    monkeypatch.setattr(answering, "alone", lambda *a: replace(real(*a), prediction=["\x00\x07", "7", " "][a[2].index]))
    work = job(tasks=("vt",))
    work.run()
    assert [row.nulls for row in rows_of(work.root).values()] == [2, 2]


def test_how_often_the_words_of_cwe_repeat_is_kept_with_each_prediction(job, answers):
    work = job(tasks=("cwe", "vt"), lengths=(2048,))
    work.run()
    for row in rows_of(work.root).values():
        path = kept_predictions(work.root, row).path
        found = [json.loads(line).get("parameters") for line in path.read_text().splitlines()]
        assert found == [{"freq_cw": 6, "freq_ucw": 1} if row.task == "cwe" else None] * 3
        assert len(read_predictions(path)) == 3


def test_cwe_of_tiny_at_4k_is_of_two_kinds_and_each_sample_says_which(job, tokenizer):
    """As docs/accuracy.md and the model's card have it: many small tokens leave some samples no room for 30 repeats."""
    work = job(tasks=("cwe",), samples=10)
    kinds = {}
    for example in work.suite.examples("cwe", 4096, range(10), 42, tokenizer):
        counts = Counter(re.findall(r"\d+\. (\S+)", example.input.rpartition("Here is a numbered list")[2]))
        kinds[example.index] = {counts[word] for word in example.outputs}
        assert kinds[example.index] == {example.parameters["freq_cw"]}
    assert [index for index, often in kinds.items() if often == {6}] == [2, 4, 7, 8, 9]
    assert all(often in ({6}, {30}) for often in kinds.values())


def test_files_of_predictions_keep_the_names_that_they_have_in_older_results():
    root = Path(__file__).parents[2] / "results"
    rows = [row for row in read_all(root, RulerRow) if isinstance(row, RulerRow) and row.predictions]
    assert rows
    for row in rows:
        assert kept_predictions(root, row).path == root / row.device / "ruler" / row.predictions
        assert kept_predictions(root, replace(row, parameters="dense_backend=sdpa")).path != kept_predictions(root, row).path


def test_predictions_are_kept_and_scored_from_the_file(job, answers):
    work = job(save_samples=True, tasks=("vt",))
    work.run()
    row = rows_of(work.root)["dense", "vt", 1024]
    path = work.root / row.device / "ruler" / row.predictions
    assert path == kept_predictions(work.root, row).path
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert all(line["prompt"].count(line["outputs"][0]) for line in lines)
    assert row.score == 100 * sum(line["score"] for line in lines) / 3


@pytest.mark.slow
def test_more_samples_only_add(job, answers):
    job(samples=2).run()
    before = len(answers)
    work = job(samples=3)
    work.run()
    assert [entry[2] for entry in answers[before:]] == [2] * 4
    assert rows_of(work.root)["dense", "vt", 1024].samples == 3
    job(samples=2).run()
    assert len(answers) == before + 4, "fewer samples than there are need nothing new"
    job(samples=3, overwrite=True).run()
    assert len(answers) == before + 4 + 12


def test_a_run_again_hands_over_the_rows_that_were_there(job, answers):
    work = job()
    first = work.run()
    before = len(answers)
    assert work.run() == first
    assert len(answers) == before


def answered_wrongly(monkeypatch):
    """Let every sample be answered anew, with nothing and in another time."""
    real = answering.alone

    def answer(*given):
        return replace(real(*given), prediction="", score=0.0, seconds=0.25)

    monkeypatch.setattr(answering, "alone", answer)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [2, 3])
def test_an_overwrite_killed_before_its_row_leaves_no_older_score(job, answers, monkeypatch, samples):
    """The last answer is kept, its row is not: the next run makes the row of the newer answers and asks nothing."""
    job(tasks=("vt",)).run()
    answered_wrongly(monkeypatch)
    real = keeping.append
    monkeypatch.setattr(keeping, "append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        job(tasks=("vt",), samples=samples, overwrite=True).run()
    monkeypatch.setattr(keeping, "append", real)
    assert rows_of(job().root)["dense", "vt", 1024].score == 100.0
    answers.clear()
    rows = {row.method: row for row in job(tasks=("vt",), samples=samples).run()}
    assert answers == []
    assert (rows["dense"].score, rows["dense"].samples, rows["dense"].seconds_per_sample) == (0.0, samples, 0.25)
    assert rows_of(job().root)["dense", "vt", 1024] == rows["dense"]
    assert job(tasks=("vt",), samples=samples).run() == [*rows.values()], "and no more rows"


def test_what_a_killed_overwrite_took_away_is_asked_again(job, answers, monkeypatch):
    job(tasks=("vt",)).run()
    path = kept_predictions(job().root, rows_of(job().root)["dense", "vt", 1024]).path
    real = answering.alone
    monkeypatch.setattr(answering, "alone", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        job(tasks=("vt",), overwrite=True).run()
    assert not path.exists()
    monkeypatch.setattr(answering, "alone", real)
    answers.clear()
    rows = job(tasks=("vt",)).run()
    assert [entry[0] for entry in answers] == ["dense"] * 3
    assert sorted(read_predictions(path)) == [0, 1, 2]
    assert [row.score for row in rows] == [100.0, 0.0]


@pytest.mark.slow
def test_a_row_without_memory_has_no_predictions_and_is_not_asked_again(job, answers, monkeypatch):
    real = answering.alone

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(answering, "alone", fail)
    first = job(tasks=("vt",)).run()
    monkeypatch.setattr(answering, "alone", real)
    assert job(tasks=("vt",)).run() == first
    assert not answers


def test_coverage_is_that_of_the_first_sample(job, answers):
    work = job(tasks=("vt",))
    work.run()
    rows = rows_of(work.root)
    assert {method: row.coverage for (method, _, _), row in rows.items()} == {"dense": 1.0, "streaming": 0.25}
    kept = read_predictions(kept_predictions(work.root, rows["dense", "vt", 1024]).path)
    assert [kept[index].coverage for index in range(3)] == [1.0, None, None]


def test_predictions_of_the_first_release_have_no_coverage(job, answers):
    work = job(tasks=("vt",))
    work.run()
    for path in work.root.glob("*/ruler/predictions/*/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "coverage"}) + "\n" for line in lines))
    for path in work.root.glob("*/ruler/*.csv"):
        path.unlink()
    answers.clear()
    work.run()
    assert not answers
    assert {(row.score, row.coverage) for row in rows_of(work.root).values()} == {(100.0, None), (0.0, None)}


@pytest.mark.slow
def test_a_run_that_stops_goes_on_with_the_next_sample(job, answers, monkeypatch):
    whole = job(root=job().root / "whole")
    whole.run()
    work = job(root=job().root / "cut")
    real, left = answering.alone, [8]

    def stop(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(answering, "alone", stop)
    with pytest.raises(KeyboardInterrupt):
        work.run()
    monkeypatch.setattr(answering, "alone", real)
    answers.clear()
    work.run()
    assert len(answers) == 12 - 7
    assert {key: replace(row, time="") for key, row in rows_of(work.root).items()} == {
        key: replace(row, time="") for key, row in rows_of(whole.root).items()
    }


def test_a_run_killed_between_its_last_answer_and_its_row_makes_the_same_row(job, answers):
    work = job(tasks=("vt",))
    work.run()
    before = rows_of(work.root)
    for path in work.root.glob("*/ruler/*.csv"):
        path.unlink()
    answers.clear()
    work.run()
    assert not answers
    assert {key: replace(row, time="") for key, row in rows_of(work.root).items()} == {
        key: replace(row, time="") for key, row in before.items()
    }
    assert before["dense", "vt", 1024].backends == "dense:sdpa"


@pytest.mark.slow
def test_a_failure_is_a_row_and_the_rest_goes_on(job, answers, monkeypatch):
    real = answering.alone

    def fail(spec, loaded, item, ran):
        if spec.plans[item.plan].method == "dense" and item.task == "vt" and item.index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(spec, loaded, item, ran)

    monkeypatch.setattr(answering, "alone", fail)
    work = job()
    work.run()
    rows = rows_of(work.root)
    assert (rows["dense", "vt", 1024].status, rows["dense", "vt", 1024].score) == ("out_of_memory", None)
    assert rows["streaming", "vt", 1024].status == rows["dense", "niah_single_1", 1024].status == "ok"


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


@pytest.mark.parametrize("index", [None, '"x"'])
def test_a_file_that_is_no_prediction_is_named(tmp_path, index):
    path = tmp_path / "vt.jsonl"
    rest = '"prediction": "", "outputs": [], "score": 0, "prompt_tokens": 1, "new_tokens": 1, "seconds": 1'
    path.write_text(f'{{"index": {index}, {rest}}}\n' if index else '{"index": 0}\n')
    with pytest.raises(UserError, match="line 1 is not a prediction.*--overwrite"):
        read_predictions(path)


def test_prepared_data_take_the_place_of_our_own(job, answers, tmp_path):
    samples = [Example("vt", number, f"Question {number}?", " Answer:", ("ABC",), 900, 30, "noise") for number in range(5)]
    write_dataset(tmp_path / "data", samples)
    work = job(suite=Ruler(data=tmp_path / "data"), tasks=("vt",), samples=4)
    work.run()
    row = rows_of(work.root)["dense", "vt", 1024]
    assert (row.samples, row.wording, row.score) == (4, "prepared", 100.0)
    assert answers[0][-1] == "Question 0? Answer:"


def test_a_length_too_short_for_a_task_is_refused_before_anything_runs(job):
    job().check()
    with pytest.raises(ValueError, match="--length 64 is too short for niah_single_1, which needs"):
        job(lengths=(1024, 64)).check()


def edit_kept(root, **changes):
    """Change every kept prediction as files of other contents would have it."""
    for path in root.glob("*/ruler/predictions/*/*.jsonl"):
        lines = [json.loads(line) | changes for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"prompt_hash": ""}, {"prompt_hash": "0" * 12}, {"outputs": ["another"]}])
def test_what_was_answered_to_another_prompt_or_scored_by_other_references_is_asked_again(job, answers, changes, tokenizer):
    work = job(tasks=("vt",))
    work.run()
    edit_kept(work.root, **changes)
    answers.clear()
    more = job(tasks=("vt",), samples=4)
    more.run()
    assert [entry[2] for entry in answers] == [0, 1, 2, 3] * 2, "those of two kinds are never in one score"
    path = kept_predictions(more.root, rows_of(more.root)["dense", "vt", 1024]).path
    hashes = {index: one.prompt_hash for index, one in read_predictions(path).items()}
    assert hashes == {one.index: of_ids(encode_prompt(tokenizer, one.prompt)) for one in samples_of(more, "vt", 1024)}
    answers.clear()
    more.run()
    assert not answers


def test_a_row_that_its_samples_do_not_make_is_made_anew(job, answers):
    """As a run leaves it that was killed between other answers and their row."""
    work = job(tasks=("vt",))
    work.run()
    edit_kept(work.root, score=0.0, prediction="")
    answers.clear()
    job(tasks=("vt",), samples=2).run()
    assert not answers
    assert rows_of(work.root)["dense", "vt", 1024].score == 0.0


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
