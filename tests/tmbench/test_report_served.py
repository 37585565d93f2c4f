"""What chunks and later questions cost stands beside what the same method does in one piece, over the same samples."""

from __future__ import annotations

import json

from answered_rows import add_answers
from report_rows import add_ruler
from tmbench.report.report import build
from tmbench.report.writers import report_json, report_markdown

CHUNKS = {"chunk": 2048, "prompt_length": "unknown"}


def test_each_way_of_serving_is_held_against_one_piece(tmp_path):
    right, half = [1.0] * 40, [1.0, 0.0] * 20
    for task in ("niah_single_1", "vt"):
        add_answers(tmp_path, "dense", task, right)
        add_answers(tmp_path, "minference", task, right)
        add_answers(tmp_path, "dense", task, right, **CHUNKS)
        add_answers(tmp_path, "minference", task, half, **CHUNKS)
    add_answers(tmp_path, "minference", "vt", half, ask_later=True)
    report = build(tmp_path)
    # Sections of their own, in which nothing is compared with prompts that were fed otherwise.
    assert [section.setting.fed for section in report.ruler] == [
        "", ", asked later", ", in chunks of 2K, prompt length unknown",
    ]  # fmt: skip
    text = report_markdown(report, folds=False)
    (lines,) = [part for part in text.split("\n\n") if part.startswith("| method") and "in one piece" in part]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()[2:]]
    assert [line[:6] for line in cells] == [
        ["minference", "asked later", "1", "100.0", "50.0", "-50.00"],
        ["dense", "in chunks of 2K, prompt length unknown", "2", "100.0", "100.0", "+0.00"],
        ["minference", "in chunks of 2K, prompt length unknown", "2", "100.0", "50.0", "-50.00"],
    ]
    assert [line[7] for line in cells] == ["loss", "too few samples", "loss"]
    found = [one for section in json.loads(report_json(report)) for one in section.get("served", ())]
    assert [(one["label"], one["difference"]) for one in found] == [
        ("minference", -50.0), ("dense", 0.0), ("minference", -50.0),
    ]  # fmt: skip


def test_without_single_answers_there_is_no_comparison(tmp_path):
    for how in ({}, CHUNKS):
        for method in ("dense", "minference"):
            add_ruler(tmp_path, method, **how)
    report = build(tmp_path)
    assert "in one piece" not in report_markdown(report)
    assert [section.served != () for section in report.ruler] == [True, False]
