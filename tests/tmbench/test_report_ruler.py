"""Scores in a report: the published table rebuilt, averages over what all have, and a caveat where one is due."""

from __future__ import annotations

import pytest

from report_rows import add_ruler, table_with
from ruler_tasks import TASKS
from tmbench.report.records import summary
from tmbench.report.report import build
from tmbench.report.writers import report_markdown
from tmbench.results.rows import FAILED, OUT_OF_MEMORY


def test_the_published_ruler_table(published):
    table = table_with(report_markdown(build(published)), "task")
    assert list(table) == [*TASKS, "average of 13"]
    assert table["fwe"] == {"task": "fwe", "samples": "100", "dense": "57.33", "tri_mix": "50.67"}
    assert table["niah_multivalue"]["tri_mix"] == "97.75"
    # 1009.28 / 13 = 77.637 and 1004.62 / 13 = 77.278, published as 77.6 and 77.3
    assert table["average of 13"]["dense"] == "77.6"
    assert table["average of 13"]["tri_mix"] == "77.3 (-0.4)"


def test_many_methods_have_a_line_each_and_the_tasks_are_columns(tmp_path):
    for layer in range(1, 8):
        add_ruler(tmp_path, "tri_mix", "vt", 90.0 + layer, layers=f"{layer}-", coverage=0.5)
    add_ruler(tmp_path, "dense", "vt", 95.0)
    add_ruler(tmp_path, "dense", "cwe", 40.0)
    for layer in range(1, 7):
        add_ruler(tmp_path, "tri_mix", "cwe", 30.0, layers=f"{layer}-")
    add_ruler(tmp_path, "tri_mix", "cwe", None, layers="7-", status=OUT_OF_MEMORY)
    table = table_with(report_markdown(build(tmp_path)), "average of 1")
    assert list(table) == ["dense", *(f"tri_mix (layers {layer}-)" for layer in range(1, 8)), "samples"]
    seventh = {"vt": "97", "cwe": "out of memory", "average of 1": "97.0 (+2.0)", "density": "50.0%"}
    assert table["tri_mix (layers 7-)"] == {"method": "tri_mix (layers 7-)", **seventh}
    assert table["samples"]["vt"] == "100"


def test_the_average_is_over_the_tasks_that_all_have(tmp_path):
    for task, dense, sparse in (
        ("niah_single_1", 100.0, 90.0),
        ("vt", 50.0, 40.0),
        ("cwe", 80.0, None),
        ("qa_2", 30.0, 35.0),
    ):
        add_ruler(tmp_path, "dense", task, dense)
        if sparse is not None:
            add_ruler(tmp_path, "tri_mix", task, sparse)
    add_ruler(tmp_path, "tri_mix", "fwe", None, status=OUT_OF_MEMORY)
    add_ruler(tmp_path, "dense", "fwe", 60.0)
    report = build(tmp_path)
    table = table_with(report_markdown(report), "task")
    assert list(table) == ["niah_single_1", "vt", "cwe", "fwe", "qa_2", "average of 3"]
    assert table["average of 3"] == {"task": "average of 3", "samples": "", "dense": "60.0", "tri_mix": "55.0 (-5.0)"}
    assert table["cwe"]["tri_mix"] == "-"
    assert table["fwe"]["tri_mix"] == "out of memory"
    missing = [task for task in TASKS if task not in ("niah_single_1", "vt", "qa_2")]
    assert (
        f"The average is over the 3 tasks that every method has; missing somewhere: {', '.join(missing)}."
        in report_markdown(report)
    )
    found = summary(report.ruler[0])
    assert found["averages"] == {"dense": 60.0, "tri_mix": 55.0}
    assert found["average_over"] == ["niah_single_1", "vt", "qa_2"]
    assert found["coverages"] == {}


def test_what_a_method_covered_stands_below_its_scores(tmp_path):
    add_ruler(tmp_path, "dense", "vt")
    add_ruler(tmp_path, "minference", "vt", coverage=0.25)
    add_ruler(tmp_path, "minference", "qa_1", coverage=0.15)
    add_ruler(tmp_path, "minference", "qa_2", None, status=FAILED, coverage=0.9)
    line = table_with(report_markdown(build(tmp_path)), "task")["density"]
    assert (line["minference"], line["dense"]) == ("20.0%", "-")


def test_no_task_in_common_is_no_average(tmp_path):
    add_ruler(tmp_path, "dense", "vt")
    add_ruler(tmp_path, "tri_mix", "cwe")
    table = table_with(report_markdown(build(tmp_path)), "task")
    assert table["average of 0"] == {"task": "average of 0", "samples": "", "dense": "-", "tri_mix": "-"}


def test_older_data_have_a_table_of_their_own(tmp_path):
    for method in ("dense", "tri_mix"):
        add_ruler(tmp_path, method, "niah_single_1", 100.0)
        add_ruler(tmp_path, method, "niah_single_2", 10.0, source="generated prose")
    add_ruler(tmp_path, "dense", "niah_single_2", 90.0, source="essays", time="2026-02-01T00:00:00+00:00")
    newest, older = build(tmp_path).ruler
    assert newest.scores["dense"] == {"niah_single_1": 100.0, "niah_single_2": 90.0}
    assert newest.averages == {"dense": 100.0, "tri_mix": 100.0}
    assert older.scores["tri_mix"] == {"niah_single_2": 10.0}
    assert older.title.endswith("older data 1")


def test_prepared_prompts_are_one_table(tmp_path):
    for number, task in enumerate(TASKS):
        add_ruler(tmp_path, "dense", task, 50.0, wording="prepared", wording_hash=f"hash{number}", source="prepared")
    (group,) = build(tmp_path).ruler
    assert group.averages == {"dense": 50.0}
    assert "The prompts were prepared elsewhere, so their wording is not known here." in group.notes()


def test_lengths_wordings_and_templates_are_kept_apart(tmp_path):
    for changes in (
        {},
        {"length": 8192},
        {"wording": "own"},
        {"wording_hash": "be"},
        {"chat_template": True},
        {"threads": 4},
        {"samples_as": "reference"},
    ):
        add_ruler(tmp_path, **changes)
    titles = [group.title for group in build(tmp_path).ruler]
    assert len(set(titles)) == 7
    start = "RULER at 4K: a/model, checkpoint weights, bfloat16, wording"
    assert f"{start} reference-ruler f00d, with chat template, 2 CPU threads, seed 42" in titles
    assert f"{start} own f00d, without chat template, 2 CPU threads, seed 42" in titles
    drawn = "samples drawn as the reference draws them"
    assert f"{start} reference-ruler f00d, {drawn}, without chat template, 2 CPU threads, seed 42" in titles


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"weights": "random"}, "The weights are random: these scores say nothing about a trained model."),
        ({"weights": "structured"}, "The weights are structured: these scores say nothing about a trained model."),
        ({"wording": "tmbench-1"}, "The wording is not the published one: published scores compare only under `--wording"),
        ({}, "The wording is the published one, but tmbench drew the samples by its own rules: published scores compare"),
        (
            {"samples_as": "reference"},
            "Drawn as the reference draws them, the answers of cwe and fwe and the documents of qa",
        ),
        ({"samples": 19}, "Only 19 samples of some task: fewer than 20 say little about a difference."),
        ({"task": "qa_1", "source": "generated documents"}, "Generated text stood in for SQuAD: scores of qa_1 do not"),
        ({"task": "qa_2", "source": "generated documents"}, "Generated text stood in for HotpotQA: scores of qa_2 do not"),
        (
            {"task": "niah_single_2", "source": "generated prose"},
            "Generated text stood in for essays: scores of niah_single_2",
        ),
        ({"status": FAILED, "score": None, "error": "KeyError: 1"}, "dense failed at niah_single_1: KeyError: 1."),
    ],
)
def test_ruler_caveats(tmp_path, changes, note):
    add_ruler(tmp_path, **changes)
    notes = build(tmp_path).ruler[0].notes()
    assert next(sentence for sentence in notes if not sentence.startswith("The average")).startswith(note)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wording": "tmbench-1"}, []),
        ({"wording": "prepared"}, []),
        ({}, ["tmbench drew the samples by its own rules"]),
        ({"samples_as": "reference"}, ["special tokens are not counted"]),
        ({"samples_as": "reference", "wording": "tmbench-1"}, ["special tokens are not counted"]),
        (
            {"samples_as": "reference", "source": "essays (a), sentences by punctuation"},
            ["special tokens are not counted", "by punctuation, not by NLTK"],
        ),
        (
            {"samples_as": "reference", "source": "words, english_words.json missing"},
            ["special tokens are not counted", "english_words.json was missing"],
        ),
    ],
)
def test_how_samples_were_drawn_is_said(tmp_path, changes, words):
    add_ruler(tmp_path, **changes)
    notes = [note for note in build(tmp_path).ruler[0].notes() if "drew" in note or "reference" in note.lower()]
    own = [note for note in notes if not note.startswith("The wording is not")]
    assert len(own) == len(words)
    assert all(part in note for part, note in zip(words, own, strict=True))


def test_unequal_samples_are_shown(tmp_path):
    add_ruler(tmp_path, "dense", samples=50)
    add_ruler(tmp_path, "tri_mix", samples=25)
    assert table_with(report_markdown(build(tmp_path)), "task")["niah_single_1"]["samples"] == "25 / 50"
