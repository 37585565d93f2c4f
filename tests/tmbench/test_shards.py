"""Shards: together they measure what one run does, and rows are made once all samples are there, in whatever order."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch

from plans import plan_of
from tmbench.errors import UserError
from tmbench.measure import answering
from tmbench.measure.accuracy import AccuracySpec
from tmbench.measure.agree import AgreeSpec
from tmbench.measure.answering import Answer
from tmbench.measure.executor import InProcess
from tmbench.measure.loop import run
from tmbench.measure.loss import LossSpec
from tmbench.measure.merge import merge
from tmbench.measure.probe import ProbeSpec
from tmbench.measure.spec import ModelSource
from tmbench.methods.layers import Budget
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.rows import AgreeRow, LossRow, ProbeRow, RulerRow
from tmbench.results.shards import Shard
from tmbench.results.tables import csv_paths, read_all
from tmbench.suites.ruler import Ruler
from tmbench_kernels import Triangle

WINDOW: dict[str, Any] = {"n_init": 3, "n_local": 7, "last_n": 5}
OF = 3
KINDS = {"accuracy": RulerRow, "agree": AgreeRow, "probe": ProbeRow, "loss": LossRow}


@pytest.fixture
def loaded(make_model, tokenizer):
    model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    return LoadedModel("small", model, tokenizer, "random", "", "abcdef")


@pytest.fixture
def spec(loaded):
    """``spec(kind, root, **changes)``: a small spec of each measurement that can be split."""

    def make(kind, root, **changes):
        about = {"model": ModelSource.of(loaded), "environment": environment.current(torch.device("cpu")), "root": root}
        plans = [plan_of(loaded.shape, name, **WINDOW) for name in ("dense", "streaming")]
        made: Any = {
            "accuracy": lambda: AccuracySpec(
                **about, plans=plans, lengths=(600,), suite=Ruler(offline=True), tasks=("niah_single_1", "vt"), samples=4
            ),
            "agree": lambda: AgreeSpec(**about, plans=plans, lengths=(64,), prompt="random", samples=4, new_tokens=4),
            "loss": lambda: LossSpec(**about, plans=plans, lengths=(200,), tasks=("random", "kv"), samples=4),
            "probe": lambda: ProbeSpec(
                **about, lengths=(200,), tasks=("random", "kv"), samples=4, budget=Budget(0.3), window=Triangle(**WINDOW)
            ),
        }[kind]()
        return replace(made, **changes)

    return make


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    """Stands in for decoding: what is answered, and how long it takes, depends on the sample's number and the method."""
    asked = []

    real = answering.alone

    def answer(spec, loaded, item, ran, last):
        if not isinstance(spec, AccuracySpec):
            return real(spec, loaded, item, ran, last)
        asked.append((item.plan, item.task, item.index))
        ran.add(("dense:sdpa", "triangle:torch-banded")[item.plan > 0])
        right = " ".join(item.sample.references) if item.index % (2 + item.plan) else ""
        tokens = loaded.tokenizer(right, add_special_tokens=False)["input_ids"]
        coverage = 0.5 if item.count else None
        return spec.sample(loaded, item, Answer(tokens, 1.0 + item.index, coverage, "+".join(ran), None))

    monkeypatch.setattr(answering, "alone", answer)
    return asked


def said(root, kind):
    """All that the rows of a folder say, but when they were made and how long it took."""
    rows: list[Any] = read_all(root, KINDS[kind])
    return sorted(repr(replace(row, time="", seconds_per_sample=0)) for row in rows)


def split(spec, loaded, of=OF, numbers=None):
    """Measure these shards, or all."""
    return [run(replace(spec, shard=Shard(number, of)), InProcess(loaded)) for number in numbers or range(1, of + 1)]


def test_a_folder_that_is_not_there_is_named_beside_one_that_is_whole(spec, loaded, tmp_path):
    split(spec("loss", tmp_path / "one"), loaded)
    with pytest.raises(UserError, match="other is no folder: give those that runs with --shard were given as --output-dir"):
        merge([tmp_path / "one", tmp_path / "other"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_shards_make_the_rows_of_one_run_in_any_order_and_merged_twice_as_once(kind, spec, loaded, tmp_path):
    run(spec(kind, tmp_path / "one"), InProcess(loaded))
    expected = said(tmp_path / "one", kind)
    assert expected
    # One folder for all shards, or a folder for each.
    shared, apart = tmp_path / "shared", [tmp_path / str(number) for number in range(OF)]
    split(spec(kind, shared), loaded)
    for number, folder in enumerate(apart):
        split(spec(kind, folder), loaded, numbers=[number + 1])
    assert csv_paths(shared, KINDS[kind]) == [], "a part of the samples makes no row"
    first = merge([shared], tmp_path / "a")
    assert (first.missing, first.there, len(first.shards)) == ({}, 0, OF)
    random.Random(kind).shuffle(apart)
    merge(apart, tmp_path / "b")
    assert said(tmp_path / "a", kind) == said(tmp_path / "b", kind) == expected
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    again = merge([shared, *apart], tmp_path / "a")
    assert (again.samples, again.made, again.there) == (0, [], len(first.made))
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before


def test_a_run_finds_all_that_was_merged(spec, loaded, answers, tmp_path):
    work = spec("accuracy", tmp_path)
    split(work, loaded)
    assert len(answers) == len(set(answers)) == 2 * 2 * 4
    merge([tmp_path], tmp_path)
    assert {row.seconds_per_sample for row in read_all(tmp_path, RulerRow)} == {2.5}
    asked = len(answers)
    rows = run(work, InProcess(loaded))
    assert len(answers) == asked
    assert {row.key: row for row in rows} == {row.key: row for row in read_all(tmp_path, RulerRow)}
    assert len(list(tmp_path.glob("*/environments/*.json"))) == 1, "which the rows name"


def test_every_sample_belongs_to_one_shard_and_few_samples_do_not_all_fall_to_the_first():
    tasks = [f"task {number}" for number in range(20)]
    for task in tasks:
        taken = [[place for place in range(10) if Shard(number, 4).takes(place, 600, task)] for number in range(1, 5)]
        assert sorted(chain(*taken)) == list(range(10))
    first = [number for task in tasks for number in range(1, 5) if Shard(number, 4).takes(0, 600, task)]
    assert len(first) == len(tasks)
    assert set(first) == {1, 2, 3, 4}


def test_tasks_in_another_order_are_split_alike(spec, loaded, tmp_path):
    split(spec("accuracy", tmp_path, tasks=("vt", "niah_single_1")), loaded, of=2, numbers=[1])
    split(spec("accuracy", tmp_path, tasks=("niah_single_1", "vt")), loaded, of=2, numbers=[2])
    assert [row.samples for row in merge([tmp_path], tmp_path).made] == [4] * 4


def test_shards_that_are_split_otherwise_make_no_row(spec, loaded, tmp_path):
    split(spec("accuracy", tmp_path, tasks=("vt",)), loaded, of=2)
    path = next(tmp_path.glob("shards/1-of-2/*/ruler/records/dense*.json"))
    entry = json.loads(path.read_text())
    entry["own"][""].popitem()
    path.write_text(json.dumps(entry))
    with pytest.raises(UserError, match="the shards of dense on vt at 600 have 3 samples of 4, so they were split by other"):
        merge([tmp_path], tmp_path)
    assert read_all(tmp_path, RulerRow) == []


def test_a_shard_goes_on_where_it_was_and_does_not_ask_what_the_folder_has(spec, loaded, answers, tmp_path):
    run(spec("accuracy", tmp_path, samples=2), InProcess(loaded))
    before = len(answers)
    work = spec("accuracy", tmp_path)
    split(work, loaded, of=2)
    assert {(plan, task, index) for plan, task, index in answers[before:]} == {
        (plan, task, index) for plan in (0, 1) for task in ("niah_single_1", "vt") for index in (2, 3)
    }
    # More samples: the records no longer count until the shards have them.
    asked = len(answers)
    split(replace(work, samples=6), loaded, of=2, numbers=[1])
    assert len(answers) - asked == 2 * 2, "one of two more samples of each task and method"
    with pytest.raises(UserError, match=r"of dense on niah_single_1 at 600 differ in samples \(6 and 4\)"):
        merge([tmp_path], tmp_path)


def test_what_a_shard_lacks_makes_no_row_and_the_samples_are_joined(spec, loaded, tmp_path):
    work = spec("accuracy", tmp_path)
    split(work, loaded, numbers=[1, 3])
    found = merge([tmp_path], tmp_path)
    assert found.made == []
    assert {str(shard): len(titles) for shard, titles in found.missing.items()} == {"2/3": 4}
    assert found.samples == 10
    assert read_all(tmp_path, RulerRow) == []
    split(work, loaded, numbers=[2])
    assert [row.samples for row in merge([tmp_path], tmp_path).made] == [4] * 4


def test_a_row_that_every_shard_was_killed_in_is_waited_for(spec, loaded, tmp_path):
    split(spec("accuracy", tmp_path), loaded)
    for record in tmp_path.glob("shards/*/*/ruler/records/dense-*"):
        record.unlink()
    merged = merge([tmp_path, tmp_path], tmp_path)
    assert len(merged.made) == 2
    assert {str(shard) for shard in merged.missing} == {"1/3", "2/3", "3/3"}
    assert all(
        title.startswith("the row of cpu") and "predictions/dense/" in title
        for titles in merged.missing.values()
        for title in titles
    )
    for record in tmp_path.glob("shards/*/*/ruler/records/*"):
        record.unlink()
    merged = merge([tmp_path], tmp_path)
    assert (merged.made, len(merged.missing)) == ([], 3)
    split(spec("accuracy", tmp_path), loaded)
    merged = merge([tmp_path], tmp_path)
    assert (len(merged.made), merged.there, merged.missing) == (2, 2, {})


def test_samples_that_were_taken_away_make_no_row(spec, loaded, tmp_path):
    split(spec("accuracy", tmp_path, tasks=("vt",)), loaded)
    shutil.rmtree(next(tmp_path.glob("shards/2-of-3/*/ruler/predictions/dense")))
    found = merge([tmp_path], tmp_path)
    assert [row.method for row in found.made] == ["streaming"]
    assert {str(shard): titles for shard, titles in found.missing.items()} == {"2/3": ["dense on vt at 600"]}


@pytest.mark.slow
def test_a_shard_that_fails_makes_the_row_of_a_run_that_fails_until_it_does_not(spec, loaded, tmp_path, monkeypatch):
    work, real = spec("accuracy", tmp_path, tasks=("vt",)), answering.alone

    def answer(spec, loaded, item, ran, last):
        if item.plan == 1 and item.index == 1:
            raise MemoryError("no more")
        return real(spec, loaded, item, ran, last)

    monkeypatch.setattr(answering, "alone", answer)
    told = split(work, loaded)
    assert [[(row.method, row.status, row.score) for row in rows] for rows in sorted(told, key=len)] == [
        [], [], [("streaming", "out_of_memory", None)]
    ]  # fmt: skip
    made = {row.method: row for row in merge([tmp_path], tmp_path).made}
    assert (made["dense"].status, made["streaming"].status) == ("ok", "out_of_memory")
    assert (made["streaming"].score, made["streaming"].error) == (None, "MemoryError: no more")
    assert merge([tmp_path], tmp_path).made == []
    monkeypatch.setattr(answering, "alone", real)
    assert split(work, loaded) == [[], [], []]
    assert [(row.method, row.status) for row in merge([tmp_path], tmp_path).made] == [("streaming", "ok")]
    assert {row.status for row in read_all(tmp_path, RulerRow)} == {"ok"}


def edited(root, **columns):
    """Change what the records of a folder say of their rows."""
    for path in root.rglob("records/*.json"):
        entry = json.loads(path.read_text())
        entry["row"] |= columns
        path.write_text(json.dumps(entry))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"model_hash": "other"}, "model_hash (abcdef and other)"),
        ({"seed": "7"}, "seed (42 and 7)"),
        ({"samples": "9"}, "samples (4 and 9)"),
        ({"wording": "theirs", "wording_hash": "0"}, "wording (tmbench-1 and theirs), wording_hash"),
        ({"device": "gpu"}, "device (cpu"),
        ({"torch": "9.9"}, "torch ("),
    ],
)
def test_shards_of_different_settings_are_refused_before_anything_is_written(columns, words, spec, loaded, tmp_path):
    for number in (1, 2):
        split(spec("accuracy", tmp_path / str(number), tasks=("vt",)), loaded, of=2, numbers=[number])
    edited(tmp_path / "1", **columns)
    for folders in ("12", "21"):
        with pytest.raises(
            UserError, match="of dense on vt at 600 differ in |of streaming on vt at 600 differ in "
        ) as refused:
            merge([tmp_path / name for name in folders], tmp_path / "out")
        named, values = words.split(" (")[0], words.partition("(")[2].partition(")")[0].split(" and ")
        assert f"{named} (" in str(refused.value)
        assert all(value in str(refused.value) for value in values)
    assert not (tmp_path / "out").exists()


def test_machines_may_differ_in_what_a_row_can_name_twice(spec, loaded, tmp_path):
    for number in (1, 2):
        split(spec("accuracy", tmp_path / str(number), tasks=("vt",)), loaded, of=2, numbers=[number])
    edited(tmp_path / "1", driver="550.1")
    edited(tmp_path / "2", driver="560.2", commit="123")
    assert {row.driver for row in merge([tmp_path / "1", tmp_path / "2"], tmp_path).made} == {"550.1+560.2"}


def test_two_settings_of_one_method_are_two_rows_of_one_run_and_of_two_runs_none(spec, loaded, tmp_path):
    dense, narrow = spec("accuracy", tmp_path).plans
    wide = plan_of(loaded.shape, "streaming", **WINDOW | {"n_local": 9})

    def measured(folder, number, *plans):
        split(spec("accuracy", tmp_path / folder, tasks=("vt",), plans=plans), loaded, numbers=[number])

    # One shard has both, one was killed between them, and one has not begun.
    measured("one", 1, dense, narrow, wide)
    measured("one", 2, dense, narrow)
    found = merge([tmp_path / "one"], tmp_path / "one")
    assert {str(shard): sorted(titles) for shard, titles in found.missing.items()} == {
        "2/3": ["streaming (n_local 9) on vt at 600"],
        "3/3": ["dense on vt at 600", "streaming (n_local 7) on vt at 600", "streaming (n_local 9) on vt at 600"],
    }
    for number in (2, 3):
        measured("one", number, dense, narrow, wide)
    assert [row.settings.get("n_local") for row in merge([tmp_path / "one"], tmp_path / "one").made] == [None, 7, 9]

    # Each has begun with another.
    for number, first, later in ((1, narrow, wide), (2, wide, narrow)):
        measured("begun", number, dense, first, later)
        for path in (tmp_path / "begun").glob(f"shards/{number}-of-3/*/ruler/records/*.json"):
            if json.loads(path.read_text())["row"]["parameters"] == later.row_fields()["parameters"]:
                path.unlink()
    found = merge([tmp_path / "begun"], tmp_path / "begun")
    assert {str(shard): sorted(titles) for shard, titles in found.missing.items()} == {
        "1/3": ["streaming (n_local 9) on vt at 600"],
        "2/3": ["streaming (n_local 7) on vt at 600"],
        "3/3": ["dense on vt at 600", "streaming (n_local 7) on vt at 600", "streaming (n_local 9) on vt at 600"],
    }

    measured("two", 1, dense, narrow)
    measured("two", 2, dense, wide)
    with pytest.raises(UserError, match=r"of streaming \(n_local [79]\) on vt at 600 differ in parameters"):
        merge([tmp_path / "two"], tmp_path / "two")


def test_all_shards_ask_the_questions_of_one_run(spec, loaded, tmp_path):
    """Of the contexts of these eight samples, the fifth has no second question that fits: no shard asks one of its own."""
    asking = {"tasks": ("niah_multikey_1",), "lengths": (700,), "questions": 2}
    for samples in (8, 4):
        work = spec("accuracy", tmp_path / str(samples), samples=samples, **asking)
        split(work, loaded)
        found = merge([work.root], work.root)
        assert found.missing == {}
        assert {row.question for row in found.made} == {row.question for row in run(work, InProcess(loaded))}
    assert [len(read_all(tmp_path / folder, RulerRow)) for folder in ("8", "4")] == [2, 4]


def test_a_shard_that_has_not_come_to_the_second_question_is_waited_for(spec, loaded, tmp_path):
    asking = {"tasks": ("niah_multikey_2",), "lengths": (800,)}
    split(spec("accuracy", tmp_path, questions=2, **asking), loaded, numbers=[1])
    split(spec("accuracy", tmp_path, **asking), loaded, numbers=[2])
    found = merge([tmp_path], tmp_path)
    assert {str(shard): sorted(titles) for shard, titles in found.missing.items()} == {
        "2/3": [f"{method} on niah_multikey_2 at 800, question 2" for method in ("dense", "streaming")],
        "3/3": [
            f"{method} on niah_multikey_2 at 800{question}"
            for method in ("dense", "streaming")
            for question in ("", ", question 2")
        ],
    }


@pytest.mark.slow
def test_proposals_by_different_rules_are_not_of_one_run(spec, loaded, tmp_path):
    split(spec("probe", tmp_path), loaded, of=2, numbers=[1])
    split(spec("probe", tmp_path, rule="depth"), loaded, of=2, numbers=[2])
    with pytest.raises(UserError, match=r"""differ in proposal's rule \("(rank|depth)" and "(rank|depth)"\)"""):
        merge([tmp_path], tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"schema_version": 2}', '{"schema_version": 2, "row": {"a": "b"}}'])
def test_a_damaged_record_is_named(content, spec, loaded, tmp_path):
    split(spec("agree", tmp_path), loaded, of=1)
    path = next(tmp_path.rglob("records/*.json"))
    path.write_text(content)
    with pytest.raises(UserError, match=r"\.json is no record of a shard: move it away, and run the shard again"):
        merge([tmp_path], tmp_path)


def test_a_record_does_not_name_files_elsewhere(spec, loaded, tmp_path):
    split(spec("agree", tmp_path), loaded, of=1)
    path = next(tmp_path.rglob("records/dense*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {"": "../../../elsewhere.jsonl"}}))
    with pytest.raises(UserError, match="is no record of a shard"):
        merge([tmp_path], tmp_path)


def test_a_record_of_a_newer_version_is_told_as_such(spec, loaded, tmp_path):
    split(spec("agree", tmp_path), loaded, of=1)
    path = next(tmp_path.rglob("records/dense*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(UserError, match="was written by a newer tmbench: update tmbench"):
        merge([tmp_path], tmp_path)


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "a/b", "1/4/4", "-1/4", "²/4", "1/99999999999"])
def test_a_text_that_is_no_shard_is_refused(text):
    with pytest.raises(UserError, match="is no part of a run: give for instance 3/16"):
        Shard.parse(text)
