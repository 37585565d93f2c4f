"""RULER runs that are killed, repeated, extended or fail: what is there stays, and what is missing is asked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from accuracy_runs import answered, job_maker, rows_of, samples_of
from ruler_tasks import encode_prompt
from tmbench.measure import answering, keeping
from tmbench.models.fingerprint import of_ids
from tmbench.results.predictions import kept_predictions, read_predictions


@pytest.fixture
def job(make_model, tokenizer, tmp_path):
    return job_maker(make_model, tokenizer, tmp_path)


@pytest.fixture
def answers(monkeypatch):
    return answered(monkeypatch)


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

    def fail(spec, loaded, item, ran, last):
        if spec.plans[item.plan].method == "dense" and item.task == "vt" and item.index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(spec, loaded, item, ran, last)

    monkeypatch.setattr(answering, "alone", fail)
    work = job()
    work.run()
    rows = rows_of(work.root)
    assert (rows["dense", "vt", 1024].status, rows["dense", "vt", 1024].score) == ("out_of_memory", None)
    assert rows["streaming", "vt", 1024].status == rows["dense", "niah_single_1", 1024].status == "ok"


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
