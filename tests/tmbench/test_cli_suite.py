"""``tmbench suite``: what it refuses, and its way from the command line to the pages."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from html_pages import pages_of
from tmbench import cli
from tmbench.report.frames import frame
from tmbench.report.html.overview import FIGURES
from tmbench.report.report import build
from tmbench.results.rows import RulerRow
from tmbench.results.suite_rows import SUITE_ROWS
from tmbench.results.tables import read_all
from tmbench.suites.table import DRAWN

TINY = ("--device", "cpu", "--length", "1500", "--samples", "2")


def test_every_suite_has_rows_that_a_report_knows():
    assert [suite.row for suite in DRAWN.values()] == list(SUITE_ROWS)
    for name, suite in DRAWN.items():
        assert (suite.row.kind, suite.row.title, suite.row.tasks) == (name, suite.title, suite.tasks)
        assert tuple(suite.recipes) == suite.tasks
        assert name in FIGURES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("walks",), "tmbench suite walks is unknown: choose from graphwalks, rulerv2, aggregation"),
        (("ruler",), "tmbench suite ruler is unknown: tmbench ruler is for that one"),
        (("graphwalks", "--task", "vt"), "--task vt is unknown: GraphWalks has bfs, parents"),
        (("graphwalks", "--length", "300", "--device", "cpu", "--method", "dense"), "--length 300 is too short for bfs"),
        (("graphwalks", "--length", "32K", "--device", "cpu", "--method", "dense"), "more than the 16384 positions of tiny"),
        (("graphwalks", "--plan", "--json"), "--plan or --dry-run prints a table"),
        (("graphwalks", "--apply-chat-template", "--device", "cpu", "--method", "dense"), "no chat template"),
        (("graphwalks", "--chat-template-kwargs", "[]"), "--chat-template-kwargs"),
    ],
)
def test_bad_input_is_one_sentence(tmbench, arguments, said):
    code, out, err = tmbench("suite", *arguments)
    assert code == 2, out
    assert said in err
    assert len([line for line in err.splitlines() if "Error" in line]) == 1
    assert not list(Path().glob("results/*/graphwalks"))


def test_ruler_options_are_no_options_of_a_suite(tmbench):
    for option in (("--offline",), ("--wording", "reference"), ("--samples-as", "reference"), ("--data", "d")):
        code, _, err = tmbench("suite", "graphwalks", *option)
        assert code == 2
        assert "No such option" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_from_the_command_line_to_the_pages(tmbench, tmp_path, name):
    suite = DRAWN[name]
    asked = ("suite", name, *TINY, "--method", "dense", "--method", "streaming:n_local=64")
    code, out, err = tmbench(*asked, "--plan")
    assert code == 0, err
    assert f"{2 * len(suite.tasks)} samples" in out
    code, out, err = tmbench(*asked, "--save-samples", "--json")
    assert code == 0, err
    told = json.loads(out)
    places = [(row["method"], row["task"]) for row in told]
    assert sorted(places) == sorted((method, task) for method in ("dense", "streaming") for task in suite.tasks)
    rows = read_all(Path("results"), suite.row)
    assert len(rows) == len(told)
    assert read_all(Path("results"), RulerRow) == []
    for row in rows:
        assert row.status == "ok"
        lines = [json.loads(line) for line in (Path("results") / row.device / name / row.predictions).open()]
        scores = [suite().score(row.task, line["prediction"], line["outputs"]) for line in lines]
        assert [line["score"] for line in lines] == scores
        assert row.score == pytest.approx(100 * sum(scores) / len(scores), abs=0.01)
        assert all(line["prompt"] for line in lines)
    code, out, err = tmbench(*asked)
    assert code == 0
    assert f"{suite.title} at 1500 tokens" in out
    assert "are there already" in err
    for file in Path("results/runs").glob("suite-*.toml"):
        code, out, err = tmbench("suite", "--config", str(file))
        assert (code, "are there already" in err) == (0, True)

    report = build(Path("results"))
    (section,) = report.suites
    assert report.ruler == []
    assert section.title.startswith(f"{suite.title} at 1500: tiny")
    assert section.tasks == list(suite.tasks)
    assert set(section.labels) == {"dense", "streaming"}
    assert any("published scores of" in note for note in section.notes())
    assert not any("--wording reference" in note for note in section.notes())
    assert len(frame("results", name)) == len(rows)
    code, out, _ = tmbench("report", "--format", "csv")
    kinds = {line["kind"] for line in csv.DictReader(out.splitlines())}
    assert kinds == {name}
    assert tmbench("report", "--plots", "plots")[0] == 0
    assert [path.name.partition("-")[0] for path in Path("plots").iterdir()] == [name]
    pages = pages_of(Path("results"), tmp_path / "pages")
    assert suite.title in pages["tasks.html"]
    assert f"tmbench suite {name} " in pages["rows.html"]


@pytest.mark.slow
def test_shards_of_a_suite_are_merged(tmbench):
    asked = ("suite", "graphwalks", *TINY, "--task", "parents", "--method", "dense")
    for shard in ("1/2", "2/2"):
        assert tmbench(*asked, "--shard", shard)[0] == 0
    assert tmbench("merge", "results")[0] == 0
    (row,) = read_all(Path("results"), DRAWN["graphwalks"].row)
    assert (row.samples, row.task) == (2, "parents")


def test_a_shell_completes_the_names():
    command: Any = typer.main.get_command(cli.app)
    own = command.commands["suite"]
    (name,) = (one for one in own.params if one.name == "name")
    assert [one.value for one in name.shell_complete(own.context_class(own), "")] == list(DRAWN)
    assert [one.value for one in name.shell_complete(own.context_class(own), "gr")] == ["graphwalks"]
