"""RULER runs: samples shared by all methods, predictions that are kept, and prepared data."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from accuracy_runs import answered, job_maker, rows_of
from ruler_tasks import Example, write_dataset
from tmbench.errors import UserError
from tmbench.measure import answering
from tmbench.measure.executor import InProcess
from tmbench.measure.loop import run
from tmbench.measure.spec import ModelSource
from tmbench.results.predictions import kept_predictions, read_predictions
from tmbench.results.rows import RulerRow
from tmbench.results.tables import read_all
from tmbench.suites.ruler import Ruler


@pytest.fixture
def job(make_model, tokenizer, tmp_path):
    return job_maker(make_model, tokenizer, tmp_path)


@pytest.fixture
def answers(monkeypatch):
    return answered(monkeypatch)


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


def test_a_line_says_how_deep_in_the_prompt_an_answer_lies_that_stands_there_once(job, answers):
    work = job(save_samples=True, tasks=("vt", "niah_single_1"))
    work.run()
    rows = rows_of(work.root)
    for task in ("vt", "niah_single_1"):
        path = kept_predictions(work.root, rows["dense", task, 1024]).path
        for line in map(json.loads, path.read_text().splitlines()):
            prompt, places = line["prompt"], [line["prompt"].find(answer) for answer in line["outputs"]]
            once = [prompt.count(answer) == 1 for answer in line["outputs"]]
            assert len(line["depths"]) == len(places)
            assert all((depth is not None) == single for depth, single in zip(line["depths"], once, strict=True))
            assert all(
                abs(d * len(prompt) - place) < 1 for d, place in zip(line["depths"], places, strict=True) if d is not None
            )
            assert task == "vt" or once == [True]


def test_coverage_is_that_of_the_first_sample(job, answers):
    work = job(tasks=("vt",))
    work.run()
    rows = rows_of(work.root)
    assert {method: row.coverage for (method, _, _), row in rows.items()} == {"dense": 1.0, "streaming": 0.25}
    kept = read_predictions(kept_predictions(work.root, rows["dense", "vt", 1024]).path)
    assert [kept[index].coverage for index in range(3)] == [1.0, None, None]


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


def test_a_prepared_sample_that_a_model_has_no_positions_for_is_refused(job, answers, tmp_path):
    """What a file says of its length is that of the tokenizer which it was prepared with, or nothing."""
    short = Example("vt", 0, "Question?", " Answer:", ("ABC",), 900, 30, "noise")
    write_dataset(tmp_path / "data", [short, replace(short, index=7, input="Question? " * 5000)])
    work = job(suite=Ruler(data=tmp_path / "data"), tasks=("vt",), samples=2)
    trained = replace(work.loaded, weights="checkpoint")
    with pytest.raises(UserError, match=r"sample 7 of vt at 1024 takes \d+ tokens with its answer, more than the 4096 that"):
        run(replace(work.spec, model=ModelSource.of(trained)), InProcess(trained))
    assert answers == []


def test_a_length_too_short_for_a_task_is_refused_before_anything_runs(job):
    job().check()
    with pytest.raises(ValueError, match="--length 64 is too short for niah_single_1, which needs"):
        job(lengths=(1024, 64)).check()
