"""Trade-offs, heat maps and samples on the pages of a report are those of its cells, at every margin."""

from __future__ import annotations

import pytest

from answered_rows import add_answers
from html_pages import Elements, data_of, pages_of
from report_rows import add_ttft
from tmbench.report.html.margins import OFFERED, says
from tmbench.report.html.scores import look_of
from tmbench.report.intervals import LOSS, TOO_FEW, Difference, difference
from tmbench.report.report import build

SCORES = {
    "dense": {"vt": [1.0] * 40, "cwe": [1.0] * 40},
    "tri_mix": {"vt": [0.0] * 20 + [1.0] * 20, "cwe": [1.0] * 40},
    "minference": {"vt": [0.5] + [1.0] * 39, "cwe": [0.0] * 10 + [1.0] * 30},
}
SECONDS = {"dense": 1.0, "tri_mix": 0.5, "minference": 0.8}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    root = tmp_path_factory.mktemp("measured")
    for method, tasks in SCORES.items():
        add_ttft(root, method, 4096, SECONDS[method], coverage=0.5)
        for task, scores in tasks.items():
            add_answers(root, method, task, scores)
    return root


@pytest.fixture(scope="module")
def pages(measured, tmp_path_factory):
    return pages_of(measured, tmp_path_factory.mktemp("pages"))


def test_a_dot_is_a_cell_and_the_front_is_its_own_for_each_task(measured, pages):
    (section,) = build(measured).trade_offs
    ((block,),) = data_of(pages["trade-off.html"])
    views = block["views"]
    assert list(views) == ["", "vt", "cwe"]
    for task, cells in {"": section.cells, **{task: section.of_task(task) for task in ("vt", "cwe")}}.items():
        dots = {series["name"]: series["points"][0] for series in views[task]["series"]}
        assert set(dots) == {"dense", "tri_mix", "minference"}
        for cell in cells:
            dot = dots[cell.label]
            assert (dot["x"], dot["y"], dot["filled"]) == (cell.saved_percent, cell.difference.mean, cell.front)
            assert dot["y_ends"] == [cell.difference.low, cell.difference.high]
            assert dot["x_ends"] == [cell.saved_low, cell.saved_high]
            assert dot["says"]["words"][OFFERED.index(1.0)].startswith(cell.difference.verdict)
    assert [[corner[1] for corner in views[task]["steps"]] for task in views] == [[0, -13.125, -25], [0, -1.25, -50], [0, 0]]


def test_a_task_has_the_front_that_its_own_points_make(measured):
    (section,) = build(measured).trade_offs
    assert {cell.label: cell.front for cell in section.of_task("cwe")} == {"minference": False, "tri_mix": True}
    assert {cell.label: cell.front for cell in section.of_task("vt")} == {"minference": True, "tri_mix": True}
    assert section.of_task("fwe") == []


@pytest.mark.parametrize("scores", [[0.0] * 10, [0.0, -100.0] + [0.0] * 300, [-100.0] * 9, [100.0, -100.0] * 50, [0.0]])
def test_another_margin_is_as_if_it_had_been_asked_for(scores):
    found = difference([scores], 1.0)
    for margin in (0.25, 5.0, 60.0):
        assert found.at(margin) == difference([scores], margin)


def test_an_unconfirmed_loss_stays_one_at_any_margin():
    possible = Difference(-5.0, -9.0, -1.0, 40, 8, 1, 100, "possible loss", 20.0)
    assert possible.at(50.0).verdict == "possible loss"


def test_too_few_samples_say_how_many_more_are_needed():
    found = difference([[0.0] * 100], 1.0)
    assert found.needed == 368
    assert list(says(found, [0.25, 1.0, 5.0]).words) == [
        "too few samples, needs 1374 more samples a task",
        "too few samples, needs 268 more samples a task",
        "no measurable loss",
    ]
    enough = Difference(-0.5, -2.0, 0.5, 400, 8, 1, 368, TOO_FEW, 0.1)
    assert list(says(enough, [1.0]).words) == ["too few samples, as a loss of 1 is not excluded"]


@pytest.mark.parametrize(
    ("mean", "low", "high", "look"),
    [(-3, -9, 0, "none"), (3, 0, 9, "none"), (-1, -2, -0.1, "loss-1"), (-25, -30, -9, "loss-5"), (5, 1, 9, "gain-3")],
)
def test_grey_is_what_spans_nothing(mean, low, high, look):
    assert look_of(Difference(mean, low, high, 40, 8, 1, None, LOSS, None)) == look


def test_the_heat_map_has_the_differences(measured, pages):
    (section,) = build(measured).ruler
    cells = {
        cell["data-words"].partition(":")[0].partition(",")[0]: cell
        for cell in Elements(pages["tasks.html"]).named("td")
        if "data-tip" in cell
    }
    for cell in section.cells:
        shown = cells[f"{cell.label} on {cell.row.task}"]
        if isinstance(cell.difference, Difference):
            assert shown["class"] == look_of(cell.difference)
            assert f"{cell.difference.low:+.1f} to {cell.difference.high:+.1f}" in shown["aria-label"]
            assert cell.difference.verdict in shown["aria-label"]
    assert cells["tri_mix on vt"]["class"] == "loss-5"
    assert cells["tri_mix on cwe"]["class"] == "none"
    assert "more samples a task" in cells["tri_mix on cwe"]["aria-label"]
    (said,) = data_of(pages["tasks.html"])
    tri_mix = section.average_differences["tri_mix"]
    assert isinstance(tri_mix, Difference)
    assert said[:3] == [None] * 3
    assert said[5] == list(says(tri_mix, OFFERED).words)
