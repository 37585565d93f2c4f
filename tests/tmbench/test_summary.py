"""What a device's report begins with: the fastest method that keeps all, and what is not known."""

from __future__ import annotations

from typing import Any

import pytest

from report_rows import add_ttft
from tmbench.report import summary
from tmbench.report.report import build
from tmbench.report.table import Table, columns
from tmbench.report.writers import WIDEST, report_markdown, table_markdown


@pytest.fixture
def line(tmp_path, monkeypatch):
    """``line(**verdicts)``: the summary's line where the scores of these methods say so."""

    def of(**verdicts):
        for length in (2048, 4096):
            add_ttft(tmp_path, "dense", length, 1.0)
            add_ttft(tmp_path, "tri_mix", length, 0.7)
            add_ttft(tmp_path, "streaming", length, 0.5)
        monkeypatch.setattr(summary, "_verdict", lambda section, cell: verdicts.get(cell.label, ""))
        table = summary.summary(build(tmp_path).ttft, 1.0)
        (cells,) = table.rows
        return dict(zip((column.name for column in table.columns), cells, strict=True))

    return of


def test_the_fastest_that_keeps_all_is_not_the_fastest_of_all(line):
    found = line(tri_mix="no measurable loss", streaming="loss")
    assert found["prompt"] == "4K"
    assert found["keeps all, fastest"] == "tri_mix (-30 %)"
    assert found["break-even"] == "from 2K on, the shortest measured"
    assert found["fastest of all"] == "streaming (-50 %), loss"
    assert found["not known"] == "nothing"


@pytest.mark.parametrize(
    ("verdicts", "keeps", "unknown"),
    [
        ({"tri_mix": "loss", "streaming": "loss"}, "none", "nothing"),
        ({}, "not known", "what any method keeps"),
        ({"tri_mix": "too few samples"}, "not known", "what 1 method keeps; whether 1 method loses"),
        ({"tri_mix": "possible loss", "streaming": "too few samples"}, "not known", "whether 2 methods lose"),
    ],
)
def test_what_is_not_known_is_not_none(line, verdicts, keeps, unknown):
    found = line(**verdicts)
    assert (found["keeps all, fastest"], found["break-even"], found["not known"]) == (keeps, "-", unknown)


def test_a_model_without_dense_has_no_line(tmp_path):
    add_ttft(tmp_path, "tri_mix", 2048, 0.7)
    assert not summary.summary(build(tmp_path).ttft, 1.0).rows


def test_prompts_in_chunks_and_second_turns_are_told_from_one_piece(tmp_path):
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"chunk": 2048, "prompt_length": "known"},
        {"ask_later": True, "question_tokens": 64},
    )
    for way in ways:
        add_ttft(tmp_path, "dense", 8192, 1.0, **way)
        add_ttft(tmp_path, "tri_mix", 8192, 0.7, **way)
    table = summary.summary(build(tmp_path).ttft, 1.0)
    assert {cells[0] for cells in table.rows} == {
        "a/model, checkpoint",
        "a/model, checkpoint, in chunks of 2K, prompt length known",
        "a/model, checkpoint, asked later, second turn of 64 tokens",
    }


@pytest.mark.parametrize("keys", [("method", "length"), ("task", "length", "method")])
def test_no_line_of_a_table_is_too_wide(keys):
    names = [*keys, *(f"column {number}" for number in range(12)), "words"]
    cells = {"method": "a", "length": "4K", "task": "vt"}
    line = [*(cells[key] for key in keys), *map(str, range(12)), "long " * 40]
    text = table_markdown(Table("", columns(*names, texts=("method", "words")), [line] * 2), WIDEST)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    assert all(len(line) <= WIDEST for lines in tables for line in lines)
    assert all(lines[0].replace(" ", "").startswith(f"|{'|'.join(keys)}|") for lines in tables)
    assert f"Words:\n\n- {' '.join(cells[key] for key in keys)}: long long" in text


def test_details_are_folded_in_files_alone(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0)
    report = build(tmp_path)
    assert "<details><summary>Details</summary>\n\n| method" in report_markdown(report)
    assert "<details>" not in report_markdown(report, folds=False)
    assert "do not edit" in report_markdown(report).splitlines()[2]
