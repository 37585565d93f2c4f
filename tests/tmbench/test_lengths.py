"""RULER by length: the published layout, with figures worked out by hand and variants matched across lengths."""

from __future__ import annotations

import json
import re

import pytest

import made_rows
from tmbench.report.intervals import difference
from tmbench.report.lengths import by_length
from tmbench.report.report import build
from tmbench.report.writers import report_markdown
from tmbench.results.rows import RulerRow
from tmbench.results.tables import append

DIFFERENCES = "Points against dense over the same samples, in brackets the 95 % interval:"
COMMON = made_rows.COMMON | {"wording": "reference-ruler", "wording_hash": "f00d", "source": "noise", "chat_template": False}
SAMPLES = 40


def add(root, method, length, right, task="vt", **parameters):
    """A row with its predictions, the first ``right`` of which are right."""
    name = f"predictions/{method}-{task}-{length}-{parameters.get('layers')}.jsonl"
    path = root / "some-gpu" / "ruler" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = [1.0] * right + [0.0] * (SAMPLES - right)
    lines = [{"index": i, "score": score, "outputs": [f"{task} {i}"]} for i, score in enumerate(scores)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"method": method, "length": length, "task": task, "samples": SAMPLES, "score": 100 * right / SAMPLES}
    append(root, RulerRow(**made_rows.columns(COMMON | row | {"predictions": name} | parameters)))


def table_of(markdown, caption):
    """The table below a caption, by the first cell of its lines."""
    (_, after) = markdown.split(caption, 1)
    block = re.search(r"(?:^\|.*\n)+", after, flags=re.MULTILINE)
    assert block is not None
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.group().splitlines()]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


@pytest.fixture
def measured(tmp_path):
    """Two lengths; one variant of triangle attention at both, another at the longer one alone."""
    for length, dense, sixteen in ((4096, 40, 38), (131072, 30, 24)):
        add(tmp_path, "dense", length, dense)
        add(tmp_path, "tri_mix", length, sixteen, layers="16-")
    add(tmp_path, "tri_mix", 131072, 10, layers="8-")
    return tmp_path


def test_a_line_for_each_method_a_column_for_each_length_and_the_average(measured):
    markdown = report_markdown(build(measured))
    assert "#### RULER by length: a/model, checkpoint weights, bfloat16, wording reference-ruler f00d" in markdown
    assert markdown.index("#### RULER by length") < markdown.index("#### RULER at 4K")
    table = table_of(markdown, "Averages of 1 task, from 0 to 100; the last column is their mean over the lengths:")
    assert list(table) == ["dense", "tri_mix (layers 8-)", "tri_mix (layers 16-)"]
    assert table["dense"] == {"method": "dense", "4K": "100.0", "128K": "75.0", "average": "87.5"}
    assert list(table["tri_mix (layers 16-)"].values())[1:] == ["95.0", "60.0", "77.5"]
    assert list(table["tri_mix (layers 8-)"].values())[1:] == ["-", "25.0", "-"], "half a mean is no mean"


def test_differences_to_dense_are_those_of_each_length(measured):
    words = table_of(report_markdown(build(measured)), DIFFERENCES)
    assert list(words) == ["tri_mix (layers 8-)", "tri_mix (layers 16-)"]
    at_128k = difference([[-100.0] * 6 + [0.0] * 34])
    text = f"-15.0 ({at_128k.low:+.1f} to {at_128k.high:+.1f}), loss"
    assert words["tri_mix (layers 16-)"]["128K"] == text
    assert words["tri_mix (layers 16-)"]["4K"].startswith("-5.0 (")
    assert words["tri_mix (layers 8-)"]["4K"] == "-"


def test_one_length_has_no_such_table(tmp_path):
    add(tmp_path, "dense", 4096, 40)
    add(tmp_path, "dense", 8192, 40, wording="own")
    report = build(tmp_path)
    assert by_length(report.ruler) == []
    assert "by length" not in report_markdown(report)


def test_other_tasks_at_another_length_are_said(measured):
    note = "The averages are not over the same tasks at every length: the sections below name them."
    assert note not in report_markdown(build(measured))
    for method, parameters in (("dense", {}), ("tri_mix", {"layers": "16-"})):
        add(measured, method, 4096, 20, task="cwe", **parameters)
    markdown = report_markdown(build(measured))
    assert note in markdown
    assert "Averages of 2 / 1 tasks" in markdown


def test_a_length_without_predictions_has_averages_and_no_differences(measured):
    for path in (measured / "some-gpu" / "ruler" / "predictions").glob("*-4096-*"):
        path.unlink()
    markdown = report_markdown(build(measured))
    assert table_of(markdown, "mean over the lengths:")["dense"]["4K"] == "100.0"
    words = table_of(markdown, DIFFERENCES)
    assert words["tri_mix (layers 16-)"]["4K"] == "-"
