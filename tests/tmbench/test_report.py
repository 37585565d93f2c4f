"""A report says what the rows say: what is comparable stands together, and CSV and JSON have every figure."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any, cast

import pytest

from report_rows import add_ruler, add_ttft
from ruler_tasks import TASKS
from tmbench.errors import UserError
from tmbench.report.frames import frame
from tmbench.report.report import build
from tmbench.report.words import ends_text, signed, significant
from tmbench.report.writers import report_csv, report_json, report_markdown
from tmbench.results.rows import OUT_OF_MEMORY, TtftRow
from tmbench.results.tables import csv_path
from tmbench.results.words import length_name


def test_nothing_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"^no results under .*: run tmbench ttft or tmbench ruler first$"):
        build(tmp_path / "absent")


def test_a_foreign_file_is_named(tmp_path):
    path = csv_path(tmp_path, TtftRow, "some-gpu", "dense")
    path.parent.mkdir(parents=True)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"dense\.csv"):
        build(tmp_path)


def test_devices_models_and_settings_are_kept_apart(tmp_path):
    add_ttft(tmp_path, length=2048, seconds=1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5)
    add_ttft(tmp_path, "tri_mix", 2048, 0.25, device="a-cpu", device_name="A CPU", driver="", dtype="float32")
    add_ttft(tmp_path, "tri_mix", 2048, 0.25, model="b/model", prompt="vt", torch="2.14.0", commit="bbbb", dirty=True)
    report = build(tmp_path)
    markdown = report_markdown(report)
    assert re.findall(r"^## .*$", markdown, flags=re.MULTILINE) == ["## A CPU (a-cpu)", "## Some GPU (some-gpu)"]
    assert len(report.ttft) == 3
    assert "torch 2.13.0, 2.14.0; transformers 5.24.0; tmbench 0.1.0; commit aaaa, bbbb (edited)." in markdown
    # Only the group that has a dense row compares with it, in its table and in the device's summary.
    assert markdown.count("(-50 %)") == 2
    assert markdown.count("(-75 %)") == 0
    assert markdown.count("Dense has no time here") == 2


@pytest.mark.parametrize("kind", ["ttft", "ruler"])
def test_methods_are_compared_on_the_same_prompts_only(tmp_path, kind):
    """Dense has read what a method was asked before, and not what it was asked since."""
    for method, contents, value in (("dense", "old", 80.0), ("tri_mix", "old", 40.0), ("tri_mix", "new", 60.0)):
        changes = {"time": f"2026-01-0{1 + (contents == 'new')}T00:00:00+00:00"}
        if kind == "ttft":
            add_ttft(tmp_path, method, 4096, value, prompt_hash=contents, **changes)
        else:
            add_ruler(tmp_path, method, "vt", value, data_hash=contents, **changes)
    new, old = getattr(build(tmp_path), kind)
    assert [(cell.row.method, cell.figure, cell.percent_vs_dense) for cell in new.cells] == [("tri_mix", 60.0, None)]
    assert [(cell.row.method, cell.figure, cell.percent_vs_dense) for cell in old.cells] == [
        ("dense", 80.0, None),
        ("tri_mix", 40.0, -50.0),
    ]
    assert "older" not in new.title
    assert old.title.endswith({"ttft": ", older prompt 1", "ruler": ", older data 1"}[kind])


def test_no_caveat_without_a_reason(published):
    report = build(published)
    missing, drawn = report.ruler[0].notes()
    assert drawn.endswith("published scores compare only under `--samples-as reference` too.")
    assert report.ttft[0].notes() == []
    # The published scores come without single answers.
    reason = "tri_mix on niah_single_1: its row names no file of predictions"
    assert missing == f"No interval for 13 scores, the first for this reason: {reason}."


def test_csv_has_a_line_for_each_figure(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 2.0, coverage=1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 1.5, coverage=0.5, logit_error=0.125)
    add_ttft(tmp_path, "minference", 2048, status=OUT_OF_MEMORY)
    add_ruler(tmp_path, "dense", score=80.0)
    add_ruler(tmp_path, "tri_mix", score=60.0)
    lines = list(csv.DictReader(io.StringIO(report_csv(build(tmp_path)))))
    figures = {(line["kind"], line["method"], line["figure"]): line for line in lines}
    assert len(figures) == len(lines) == 4 + 5 + 1 + 1 + 1
    median = figures["ttft", "tri_mix", "ttft_median_s"]
    assert (float(median["value"]), float(median["percent_vs_dense"]), median["repeats"]) == (1.5, -25.0, "3")
    assert median["parameters"] == "layers 16-, n_init 8, n_local 512, last_n 128"
    assert figures["ttft", "tri_mix", "logit_error"]["value"] == "0.125"
    assert figures["ttft", "tri_mix", "logit_error"]["percent_vs_dense"] == ""
    assert figures["ttft", "dense", "ttft_median_s"]["percent_vs_dense"] == ""
    assert figures["ttft", "minference", "ttft_median_s"]["status"] == OUT_OF_MEMORY
    assert figures["ttft", "minference", "ttft_median_s"]["value"] == ""
    assert float(figures["ruler", "tri_mix", "score"]["percent_vs_dense"]) == -25.0
    assert figures["ruler", "tri_mix", "score"]["task"] == "niah_single_1"


def test_json_holds_rows_and_what_follows_from_them(published):
    times, scores = json.loads(report_json(build(published)))
    assert times["setting"]["device"] == "some-gpu"
    assert times["break_even_length"]["minference"] == 65536
    assert len(times["rows"]) == 28
    assert times["rows"][0]["ttft_median_s"] == 4.1
    assert scores["averages"]["dense"] == pytest.approx(1009.28 / 13)
    assert scores["average_over"] == list(TASKS)


def test_rows_come_as_a_frame_too(published):
    times = frame(published, "ttft")
    assert len(times) == 28
    fast = times[(times.method == "tri_mix") & (times.length == 131072)].iloc[0]
    assert fast.percent_vs_dense == pytest.approx(100 * (23.4 / 34.5 - 1))
    assert set(frame(published, "ruler").task) == set(TASKS)
    assert frame(published, "loss").empty
    with pytest.raises(ValueError, match="there are no rows of kind 'speed': choose from ttft, ruler"):
        frame(published, cast(Any, "speed"))


@pytest.mark.parametrize(("points", "text"), [(-0.04, "+0.0"), (0.0, "+0.0"), (-0.06, "-0.1"), (38.5, "+38.5")])
def test_points_that_round_to_nothing_have_no_minus(points, text):
    assert signed(points, 1) == text


def test_an_end_that_rounds_to_nothing_keeps_its_side_of_zero():
    assert ends_text(-2.4442, -0.0025) == "-2.44 to -0.00", "this interval excludes 0, and words say so"
    assert ends_text(-0.0, 0.0) == "+0.00 to +0.00"


@pytest.mark.parametrize(
    ("length", "name"),
    [(2048, "2K"), (131072, "128K"), (1000, "1000"), (32000, "32000"), (1048576, "1M"), (1572864, "1536K")],
)
def test_length_name(length, name):
    assert length_name(length) == name


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04123, "0.0412"), (3.6, "3.60"), (34.5, "34.5"), (127.6, "128"), (1234.5, "1234"), (0.0, "0")]
)
def test_significant(seconds, text):
    assert significant(seconds) == text
