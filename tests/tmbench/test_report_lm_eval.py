"""The report on rows of ``tmbench lm-eval``: metrics as they are, and paired intervals where documents have scores."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from statistics import mean

import pytest

from html_pages import pages_of
from made_rows import COMMON
from tmbench.report.html.commands import command_of
from tmbench.report.intervals import Difference, difference
from tmbench.report.report import build
from tmbench.report.writers import report_csv, report_markdown
from tmbench.results.lm_eval_rows import LmEvalRow, write_documents
from tmbench.results.tables import append, read_all

DENSE = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
SPARSE = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]


def made(method, metric, value, **about):
    given = COMMON | {"seed": 1234, "task": "mine", "metric_filter": "none", "samples": len(DENSE), "harness": "0.4.13"}
    given |= {"output_type": "multiple_choice", "num_fewshot": 2, "higher_is_better": metric == "acc", "length": 4096}
    return LmEvalRow(**(given | {"method": method, "metric": metric, "value": value, "requests": 32} | about))


def add(root, method, scores, perplexity, **about):
    row = made(method, "acc", mean(scores), **about)
    lines = [
        {"index": number, "hash": f"document {number}", "scores": {"acc,none": score, "word_perplexity,none": [-30.5, 4.0]}}
        for number, score in enumerate(scores)
    ]
    row = replace(row, documents=write_documents(root, row, lines))
    append(root, row, replace(row, metric="word_perplexity", higher_is_better=False, value=perplexity))
    return row


@pytest.fixture
def root(tmp_path):
    add(tmp_path, "dense", DENSE, 2051.25)
    add(tmp_path, "tri_mix", SPARSE, 2060.5, truncated=3)
    return tmp_path


def test_a_difference_is_over_the_same_documents(root):
    (section,) = build(root).lm_eval
    cells = {(cell.label, cell.row.metric): cell for cell in section.cells}
    expected = difference([[100 * (own - other) for own, other in zip(SPARSE, DENSE, strict=True)]])
    found = cells["tri_mix", "acc"].difference
    assert isinstance(found, Difference)
    assert (found.mean, found.low, found.high, found.pairs) == (-25, expected.low, expected.high, 8)
    assert "word_perplexity is no mean over documents that score from 0 to 1" in cells["tri_mix", "word_perplexity"].verdict
    assert cells["tri_mix", "word_perplexity"].percent_vs_dense == pytest.approx(100 * (2060.5 / 2051.25 - 1))
    page = report_markdown(build(root))
    assert "lm-eval 0.4.13, up to 4K: a/model" in page
    assert "Prompts of mine were longer than the model may read here" in page
    lines = [line for line in csv.DictReader(io.StringIO(report_csv(build(root)))) if line["figure"] == "difference"]
    assert [(line["method"], line["metric"], line["value"]) for line in lines] == [("tri_mix", "acc", "-25.0")]


def test_other_documents_are_not_compared(root):
    add(root, "streaming", SPARSE[:4], 2000.0, samples=4, limit="4")
    add(root, "streaming", SPARSE, 2000.0, data_hash="another", time="2026-02-01T00:00:00+00:00")
    labels = [(section.setting.limit, section.setting.older_data, section.labels) for section in build(root).lm_eval]
    assert sorted(labels) == [("", 0, ["streaming"]), ("", 1, ["dense", "tri_mix"]), ("4", 0, ["streaming"])]


def test_documents_that_do_not_make_the_row_make_no_interval(root):
    append(root, replace(made("streaming", "acc", 0.9), documents=read_all(root, LmEvalRow)[0].documents))
    (section,) = build(root).lm_eval
    (cell,) = (cell for cell in section.cells if cell.label == "streaming")
    assert "no mean over documents" in cell.verdict


@pytest.mark.slow
def test_the_pages_have_tasks_and_the_command_that_repeats_a_row(root, tmp_path):
    pages = pages_of(root, tmp_path / "pages")
    assert "word_perplexity" in pages["further.html"]
    command = command_of(read_all(root, LmEvalRow)[0])
    assert command.text.startswith("tmbench lm-eval --method dense --tasks mine --num-fewshot 2 --model a/model")
    assert "--include-path" in command.needs[0]
