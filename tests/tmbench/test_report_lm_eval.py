"""The report on rows of ``tmbench lm-eval``: metrics as they are, and paired intervals where documents have scores."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from math import exp
from statistics import mean

import pytest

from html_pages import pages_of
from made_rows import COMMON
from tmbench.report.html.commands import command_of
from tmbench.report.intervals import Difference, difference
from tmbench.report.report import build
from tmbench.report.student import mean_interval
from tmbench.report.writers import report_csv, report_markdown
from tmbench.results.lm_eval_rows import LmEvalRow, write_documents
from tmbench.results.tables import append, read_all

DENSE = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
TEXTS = [30.5, 28.0, 33.25, 40.0, 41.0, 38.5, 50.0, 61.5]
"""Nats of documents of 4 words, 5, 6 and so on."""
SPARSE = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]


def made(method, metric, value, **about):
    given = COMMON | {"seed": 1234, "task": "mine", "metric_filter": "none", "samples": len(DENSE), "harness": "0.4.13"}
    given |= {"output_type": "multiple_choice", "num_fewshot": 2, "higher_is_better": metric == "acc", "length": 4096}
    return LmEvalRow(**(given | {"method": method, "metric": metric, "value": value, "requests": 32} | about))


def add(root, method, scores, texts, **about):
    perplexity = exp(sum(texts) / sum(4.0 + number for number in range(len(texts))))
    row = made(method, "acc", mean(scores), **about)
    lines = [
        {
            "index": number,
            "hash": f"document {number}",
            "scores": {"acc,none": score, "word_perplexity,none": [-nats, 4.0 + number]},
        }
        for number, (score, nats) in enumerate(zip(scores, texts, strict=True))
    ]
    row = replace(row, documents=write_documents(root, row, lines))
    append(root, row, replace(row, metric="word_perplexity", higher_is_better=False, value=perplexity))
    return row


@pytest.fixture
def root(tmp_path):
    add(tmp_path, "dense", DENSE, TEXTS)
    add(tmp_path, "tri_mix", SPARSE, [nats + 0.5 + number % 2 for number, nats in enumerate(TEXTS)], truncated=3)
    return tmp_path


def test_a_difference_is_over_the_same_documents(root):
    (section,) = build(root).lm_eval
    cells = {(cell.label, cell.row.metric): cell for cell in section.cells}
    expected = difference([[100 * (own - other) for own, other in zip(SPARSE, DENSE, strict=True)]])
    found = cells["tri_mix", "acc"].difference
    assert isinstance(found, Difference)
    assert (found.mean, found.low, found.high, found.pairs) == (-25, expected.low, expected.high, 8)
    lost = cells["tri_mix", "word_perplexity"]
    assert "word_perplexity is no mean over documents that score from 0 to 1" in lost.verdict
    words = sum(range(4, 12))
    assert lost.percent_vs_dense == pytest.approx(100 * (exp(8 / words) - 1))
    assert lost.nats is not None
    assert lost.nats.mean == pytest.approx(8 / words)
    assert lost.nats.ends == pytest.approx(mean_interval([0.5 * 8 / words, 1.5 * 8 / words] * 4))
    assert cells["tri_mix", "acc"].nats is None
    page = report_markdown(build(root))
    assert "lm-eval 0.4.13, up to 4K: a/model" in page
    assert "Prompts of mine were longer than the model may read here" in page
    lines = [line for line in csv.DictReader(io.StringIO(report_csv(build(root)))) if line["figure"] == "difference"]
    assert [(line["method"], line["metric"], line["value"]) for line in lines] == [("tri_mix", "acc", "-25.0")]


def test_other_documents_are_not_compared(root):
    add(root, "streaming", SPARSE[:4], TEXTS[:4], samples=4, limit="4")
    add(root, "streaming", SPARSE, TEXTS, data_hash="another", time="2026-02-01T00:00:00+00:00")
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
