"""Differences in a report come from the very samples behind its rows, or the report says why there are none."""

from __future__ import annotations

import csv
import io
import json
import random

import pytest

import made_rows
from tmbench.cli.report import MARGIN
from tmbench.errors import UserError
from tmbench.report import intervals
from tmbench.report.differences import NOT_COMPARED
from tmbench.report.intervals import LOSS, NO_LOSS, TOO_FEW, Difference, difference
from tmbench.report.records import average_records
from tmbench.report.report import build
from tmbench.report.writers import report_csv, report_json, report_markdown
from tmbench.results.rows import RulerRow, TtftRow
from tmbench.results.sample_scores import read_samples
from tmbench.results.tables import append

COMMON = made_rows.COMMON | {"length": 4096}
RULER = {"wording": "own", "wording_hash": "f00d", "source": "noise", "chat_template": False}


def add(root, method, task, scores, *, stored=None, **changes):
    """A row with its predictions; ``stored`` are the scores in the file where they are not those of the row."""
    name = f"predictions/{method}/{task}-{changes.get('layers', '')}.jsonl"
    path = root / "some-gpu" / "ruler" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"index": index, "score": score, "outputs": [f"{task} {index}"]}
        for index, score in enumerate(scores if stored is None else stored)
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    score = round(100 * sum(scores) / len(scores), 2)
    row = {"method": method, "task": task, "samples": len(scores), "score": score, "predictions": name}
    append(root, RulerRow(**made_rows.columns(COMMON | RULER | row | changes)))
    return path


def test_a_task_whose_samples_are_of_two_kinds_is_named(tmp_path):
    paths = [add(tmp_path, name, "cwe", [1.0] * 5) for name in ("dense", "streaming")] + [
        add(tmp_path, "dense", "vt", [1.0])
    ]
    assert not [note for note in group_of(tmp_path).notes() if "kinds" in note], "older files do not say"
    for path in paths[:2]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line, often in zip(lines, (6, 30, 30, 6, 30), strict=True):
            line["parameters"] = {"freq_cw": often, "freq_ucw": {6: 1, 30: 3}[often]}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    notes = [note for note in group_of(tmp_path).notes() if "kinds" in note]
    assert notes == ["The samples of cwe are of 2 kinds: 3 with freq_cw 30 and freq_ucw 3, 2 with freq_cw 6 and freq_ucw 1."]
    paths[0].write_text(paths[0].read_text().replace('{"freq_cw": 6, "freq_ucw": 1}', "7"))
    with pytest.raises(UserError, match="line 1 is not a prediction"):
        group_of(tmp_path)


def scores_of(rate, n=60, seed=1):
    draw = random.Random(seed)
    return [float(draw.random() < rate) for _ in range(n)]


@pytest.fixture
def measured(tmp_path):
    """Two tasks, dense and two variants of a method: one that loses much on vt, one that differs nowhere."""
    dense = {"niah_single_1": [1.0] * 60, "vt": scores_of(0.9)}
    for task, scores in dense.items():
        add(tmp_path, "dense", task, scores)
        add(tmp_path, "tri_mix", task, scores, layers="6-")
        add(tmp_path, "tri_mix", task, scores if task != "vt" else scores_of(0.5, seed=2), layers="2-")
    return tmp_path


def group_of(root, **arguments):
    (group,) = build(root, **arguments).ruler
    return group


def test_differences_are_those_of_the_samples(measured):
    group = group_of(measured)
    label = "tri_mix (layers 2-)"
    pairs = [100 * (own - other) for own, other in zip(scores_of(0.5, seed=2), scores_of(0.9), strict=True)]
    expected = {"vt": difference([pairs]), "niah_single_1": difference([[0.0] * 60])}
    cells = {cell.row.task: cell for cell in group.cells if cell.label == label}
    for task, found in expected.items():
        assert cells[task].difference == found
        assert found.pairs == 60
        assert cells[task].verdict == found.verdict
    assert group.average_differences[label] == difference([[0.0] * 60, pairs])
    assert group.average_differences[label].verdict == LOSS
    assert group.average_differences["tri_mix (layers 6-)"].verdict == TOO_FEW
    assert {cell.verdict for cell in group.cells if cell.label == "dense"} == {""}


def test_variants_are_compared_with_each_other_over_the_same_samples(measured):
    group = group_of(measured)
    two, six = "tri_mix (layers 2-)", "tri_mix (layers 6-)"
    up, down = group.answers.compare(six, two, ["vt"]), group.answers.compare(two, six, ["vt"])
    assert up.mean == -down.mean > 0
    assert down == group.answers.compare(two, "dense", ["vt"])


def test_the_margin_decides_what_is_no_measurable_loss(measured):
    label = "tri_mix (layers 6-)"
    assert group_of(measured, margin=3.0).average_differences[label].verdict == TOO_FEW
    found = group_of(measured, margin=3.5).average_differences[label]
    assert (found.verdict, found.pairs) == (NO_LOSS, 120)


def test_markdown_csv_and_json_say_the_same(measured):
    report = build(measured)
    (group,) = report.ruler
    found = group.average_differences["tri_mix (layers 2-)"]
    assert isinstance(found, Difference)
    markdown = report_markdown(report)
    assert "Points against dense over the same samples, average of 2 tasks, and what they say for a margin of 1:" in markdown
    words = [f"{found.mean:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}", "loss", "120", str(found.differing)]
    line = next(line for line in markdown.splitlines() if "| loss" in line and "120" in line)
    assert [cell.strip() for cell in line.split("|")][2:-1] == [*words, str(found.needed)]
    assert "it takes 368 such samples to exclude a loss of 1:" in markdown
    (line,) = [line for line in markdown.splitlines() if line.startswith("| vt") and "tri_mix (layers 2-)" in line]
    own = next(c.difference for c in group.cells if c.label == "tri_mix (layers 2-)" and c.row.task == "vt")
    assert isinstance(own, Difference)
    ends = f"{own.low:+.1f} to {own.high:+.1f}"
    cells = [f"{own.mean:+.1f}", ends, "loss", "60", str(own.differing), str(own.needed)]
    assert [cell.strip() for cell in line.split("|")][3:-1] == cells
    same = [line for line in markdown.splitlines() if line.startswith("| vt") and "tri_mix (layers 6-)" in line]
    assert not same, "no sample differs, so there is nothing to say of this task"

    lines = list(csv.DictReader(io.StringIO(report_csv(report))))
    average = {line["figure"]: line for line in lines if line["task"] == "average of 2" and "2" in line["label"]}
    assert float(average["difference"]["value"]) == found.mean
    assert float(average["difference_low"]["value"]) == found.low
    assert average["difference"]["verdict"] == "loss"
    by_task = [line for line in lines if line["task"] == "vt" and line["figure"] == "difference"]
    assert {line["label"]: line["verdict"] for line in by_task} == {
        "tri_mix (layers 2-)": LOSS,
        "tri_mix (layers 6-)": TOO_FEW,
    }

    (entry,) = json.loads(report_json(report))
    own = entry["average_differences"]["tri_mix (layers 2-)"]
    assert (own["difference"], own["difference_high"], own["samples_needed"]) == (found.mean, found.high, found.needed)
    assert (entry["differences_over"], entry["margin"]) == (["niah_single_1", "vt"], 1.0)
    assert report_markdown(report) == report_markdown(build(measured)), "the same files make the same report"


def test_a_speed_up_stands_beside_what_its_loss_amounts_to(measured):
    timed = COMMON | {"prompt": "kv", "repeats": 3, "warmup": 1, "interleaved": "dense tri_mix"}
    append(measured, TtftRow(**timed, method="dense", ttft_median_s=1.0))
    append(measured, TtftRow(**timed, method="tri_mix", parameters="layers=2-", ttft_median_s=0.5))
    report = build(measured)
    assert report.ttft[0].fidelity("tri_mix").endswith("2 tasks x 60 samples at 4K): loss")


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ([1.0] * 30, "its file of predictions has 30 of 60 samples"),
        ([0.5] * 60, "its file of predictions does not make its score"),
    ],
)
def test_a_file_that_is_not_the_rows_makes_no_interval(measured, stored, reason):
    add(measured, "tri_mix", "vt", scores_of(0.5, seed=2), stored=stored, layers="2-")
    group = group_of(measured)
    cell = next(c for c in group.cells if c.row.task == "vt" and c.row.settings.get("layers") == "2-")
    assert isinstance(cell.difference, str)
    assert cell.verdict == f"{NOT_COMPARED}tri_mix (layers 2-) on vt: {reason}"
    assert any(note.startswith("No interval for 1 score, the first for this reason: ") for note in group.notes())
    # Averages must be over the same tasks for all methods.
    assert group.paired_tasks == ["niah_single_1"]
    assert group.average_differences["tri_mix (layers 6-)"].tasks == 1


def test_an_absent_file_is_said(measured):
    for path in measured.glob("some-gpu/ruler/predictions/dense/*.jsonl"):
        path.unlink()
    group = group_of(measured)
    assert group.cells[-1].verdict == f"{NOT_COMPARED}dense on vt: its file of predictions is missing"
    assert average_records(group) == []
    assert "in words" not in report_markdown(build(measured))


def test_samples_beyond_those_of_the_row_do_not_count(measured):
    add(measured, "dense", "vt", scores_of(0.9), stored=[*scores_of(0.9), 0.0, 0.0])
    assert group_of(measured).answers.compare("tri_mix (layers 6-)", "dense", ["vt"]).differing == 0


def test_unequal_numbers_of_samples_are_compared_over_those_that_both_have(measured):
    add(measured, "tri_mix", "vt", scores_of(0.9)[:25], layers="6-")
    found = group_of(measured).answers.compare("tri_mix (layers 6-)", "dense", ["vt"])
    assert (found.pairs, found.differing) == (25, 0)


def test_other_samples_under_the_same_numbers_are_not_compared(measured):
    path = add(measured, "tri_mix", "vt", scores_of(0.9), layers="6-")
    path.write_text(path.read_text().replace("vt 7", "vt of another seed"))
    reason = group_of(measured).answers.compare("tri_mix (layers 6-)", "dense", ["vt"])
    assert reason == "tri_mix (layers 6-) and dense on vt: they did not answer the same samples"


def test_a_cut_line_is_dropped_and_a_foreign_one_is_named(tmp_path):
    path = add(tmp_path, "dense", "vt", [1.0, 0.0])
    row = {"status": "ok", "score": 50.0, "samples": 2, "device": "some-gpu", "predictions": "predictions/dense/vt-.jsonl"}
    path.write_text(path.read_text() + '{"index": 2, "sco')
    assert read_samples(tmp_path, row).scores == {0: 1.0, 1: 0.0}
    path.write_text('{"index": 0}\n')
    with pytest.raises(UserError, match=r"vt-\.jsonl line 1 is not a prediction: move it out of the results folder"):
        read_samples(tmp_path, row)


def test_the_command_lines_margin_is_the_one_that_the_docs_define():
    assert MARGIN == intervals.MARGIN


@pytest.mark.parametrize(("own", "compared"), [("aaaa", True), ("bbbb", False), ("", True)])
def test_answers_to_prompts_that_read_otherwise_are_not_compared(measured, own, compared):
    """Where both files have the hashes: older ones have none."""
    for method, told in (("dense", "aaaa"), ("tri_mix", own)):
        for path in measured.glob(f"*/ruler/predictions/{method}/vt-*.jsonl"):
            lines = [json.loads(line) | ({"prompt_hash": told} if told else {}) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    verdicts = {cell.row.task: cell.verdict for cell in group_of(measured).cells if cell.row.settings.get("layers") == "2-"}
    assert verdicts["vt"].endswith("they did not answer the same samples") != compared
    assert not verdicts["niah_single_1"].startswith(NOT_COMPARED)


@pytest.mark.parametrize("score", [-0.1, 1.5, "nan"])
def test_a_score_that_no_sample_can_have_is_named(measured, score):
    path = next(measured.glob("*/ruler/predictions/tri_mix/vt-*"))
    entry = json.loads(path.read_text().splitlines()[0]) | {"score": score}
    path.write_text(json.dumps(entry) + "\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 is not a prediction"):
        build(measured)


def test_too_few_samples_come_with_how_many_it_takes():
    few, many = difference([[0.0] * 9 + [-100.0]]), difference([[-100.0] * 50])
    assert few.words == f"too few samples ({few.needed} a task needed)"
    assert many.words == "loss"
    assert difference([[0.0]]).words == "too few samples", "one sample has no spread"
