"""Trade-offs, heat maps and samples on the pages of a report are those of its cells, at every margin."""

from __future__ import annotations

import json
import re

import pytest

from answered_rows import add_answers
from html_pages import HOSTILE, Elements, data_of, pages_of
from report_rows import add_ttft
from tmbench.errors import UserError
from tmbench.report.html import samples
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
    fronts = [views[task]["fronts"][0]["corners"] for task in views]
    assert [[corner[1] for corner in front] for front in fronts] == [[0, -13.125, -25], [0, -1.25, -50], [0, 0]]


def test_lengths_of_one_setting_share_a_chart_and_have_fronts_of_their_own(tmp_path):
    root = tmp_path / "rows"
    for length, methods in ((4096, ("dense", "tri_mix")), (8192, ("dense", "tri_mix", "streaming"))):
        for method in methods:
            add_ttft(root, method, length, SECONDS.get(method, 0.3))
            add_answers(root, method, "vt", [1.0] * 40, length=length)
    # Another variant alone at its length has the name that the first one has at the others.
    add_ttft(root, "dense", 16384, 1.0)
    add_ttft(root, "tri_mix", 16384, 0.5, n_local=64)
    for method, parameters in (("dense", {}), ("tri_mix", {"n_local": 64})):
        add_answers(root, method, "vt", [1.0] * 40, length=16384, **parameters)
    page = pages_of(root, tmp_path / "pages")["trade-off.html"]
    ((block,),) = data_of(page)
    chart = block["views"]["vt"]
    lengths = {series["name"]: [point["length"] for point in series["points"]] for series in chart["series"]}
    wide = "layers 16-, n_init 8, n_local {}, last_n 128"
    assert lengths == {
        "dense": [4096, 8192, 16384],
        f"tri_mix ({wide.format(512)})": [4096, 8192],
        f"tri_mix ({wide.format(64)})": [16384],
        "streaming": [8192],
    }
    assert [front["length"] for front in chart["fronts"]] == [4096, 8192, 16384]
    texts = Elements(page).texts
    assert any(text.startswith("Accuracy kept against time saved at 4K, 8K, 16K: a/model") for text in texts)
    assert [text[:5] for text in texts if "The time saved over interleaved rounds" in text] == ["4K: T", "8K: T", "16K: "]


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


def test_the_margin_of_the_report_is_one_of_the_slider(measured, tmp_path):
    (slider,) = [
        one for one in Elements(pages_of(measured, tmp_path, 2.5)["tasks.html"]).named("input") if one["name"] == "margin"
    ]
    assert slider["data-margins"].split()[int(slider["value"])] == "2.5"
    assert int(slider["max"]) == len(OFFERED)


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
    assert said[3] == list(says(tri_mix, OFFERED).words)


def chunks_of(pages):
    """What the files beside the page of samples hold, by the number that they call themselves."""
    found = {}
    for name, text in pages.items():
        if name.startswith("data/"):
            (called,) = re.findall(r'^tm\.chunk\("(\d+)",(.*)\);\n$', text)
            assert name == f"data/samples-{called[0]}.js"
            found[called[0]] = json.loads(called[1])
    return found


def test_samples_are_those_that_differ_with_both_answers(pages):
    groups = {(group["label"], group["task"]): group for group in data_of(pages["samples.html"])}
    chunks = chunks_of(pages)
    assert set(groups) == {(label, task) for label in ("tri_mix", "minference") for task in ("vt", "cwe")}
    assert next(iter(groups)) == ("tri_mix", "vt"), "what lost most comes first"
    vt = groups["tri_mix", "vt"]
    assert (vt["lost"], vt["gained"], vt["pairs"]) == (list(range(20)), [], 40)
    held = chunks[vt["chunk"]]
    assert held["samples"]["3"] == {"wanted": ["vt 3"], "dense": [1.0, "dense says 1.0"], "places": []}
    assert held["answers"]["tri_mix"]["3"] == [0.0, "tri_mix says 0.0"]
    assert groups["tri_mix", "cwe"]["lost"] == []
    assert any(text.startswith("It is not known of these samples") for text in Elements(pages["samples.html"]).texts)


def test_a_gain_is_a_sample_in_which_the_method_alone_is_right(tmp_path):
    add_answers(tmp_path / "rows", "dense", "vt", [0.0, 1.0, 0.5])
    add_answers(tmp_path / "rows", "streaming", "vt", [1.0, 0.0, 0.5])
    (group,) = data_of(pages_of(tmp_path / "rows", tmp_path / "pages")["samples.html"])
    assert (group["lost"], group["gained"]) == ([1], [0])


def test_hostile_answers_stay_texts(tmp_path):
    answers = [HOSTILE, "*/ );alert(3)//", "\ud800\u2029"]
    add_answers(tmp_path / "rows", "dense", "vt", [1.0] * 3, answers)
    add_answers(
        tmp_path / "rows", "streaming", "vt", [0.0] * 3, answers, more=[{"prompt": f"a {HOSTILE} vt {n}"} for n in range(3)]
    )
    pages = pages_of(tmp_path / "rows", tmp_path / "pages")
    (chunk,) = chunks_of(pages).values()
    assert [chunk["answers"]["streaming"][str(n)][1] for n in range(3)] == answers
    assert pages["data/samples-0.js"].isascii()
    assert "<" not in pages["data/samples-0.js"]


def test_texts_are_in_files_of_a_limited_size_and_none_is_left_of_an_earlier_report(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "CHUNK", 100)
    add_answers(tmp_path / "rows", "dense", "vt", [1.0] * 3)
    for method in ("tri_mix", "streaming", "minference"):
        add_answers(tmp_path / "rows", method, "vt", [0.0] * 3, ["x" * 40] * 3)
    pages = pages_of(tmp_path / "rows", tmp_path / "pages")
    chunks = chunks_of(pages)
    assert len(chunks) == 3
    for group in data_of(pages["samples.html"]):
        assert list(chunks[group["chunk"]]["answers"]) == [group["label"]]
    own = tmp_path / "pages" / "data" / "samples-mine.js"
    own.write_text("")
    monkeypatch.setattr(samples, "CHUNK", 10**6)
    pages_of(tmp_path / "rows", tmp_path / "pages")
    assert sorted(path.name for path in own.parent.iterdir()) == ["samples-0.js", "samples-mine.js"]


def test_the_depth_of_an_answer_is_where_it_stands_once_in_a_prompt_that_was_kept(tmp_path):
    prompts = ["x" * 90 + f"vt {n}" + "y" * 6 for n in range(2)] + ["vt 2 and vt 2", "none"]
    for length in (4096, 8192):
        add_answers(tmp_path / "rows", "dense", "vt", [1.0] * 4, length=length, more=[{"prompt": text} for text in prompts])
        add_answers(tmp_path / "rows", "streaming", "vt", [0.0, 1.0, 0.0, 0.0], length=length)
    pages = pages_of(tmp_path / "rows", tmp_path / "pages")
    held = chunks_of(pages)["0"]["samples"]
    assert held["0"]["places"] == [["vt 0", 0.9, prompts[0]]]
    assert held["2"]["places"] == held["3"]["places"] == []
    (table,) = samples.content(build(tmp_path / "rows"), tmp_path / "rows")["maps"]
    assert [column.name for column in table.columns] == ["depth", "4K", "8K"]
    assert table.rows[9] == ["90 to 100 %", "50 / 100 (2)", "50 / 100 (2)"]
    assert all(set(row[1:]) == {"-"} for row in table.rows[:9])


def test_the_depth_is_known_without_the_prompt_where_lines_say_it(tmp_path):
    told = [{"depths": [0.25]}, {"depths": [None]}, {}]
    add_answers(tmp_path / "rows", "dense", "vt", [1.0] * 3, more=told)
    add_answers(tmp_path / "rows", "streaming", "vt", [0.0] * 3)
    held = chunks_of(pages_of(tmp_path / "rows", tmp_path / "pages"))["0"]["samples"]
    assert [held[number]["places"] for number in "012"] == [[["vt 0", 0.25, ""]], [], []]
    add_answers(tmp_path / "rows", "streaming", "vt", [0.0] * 3, more=[{"depths": [7]}] * 3)
    with pytest.raises(UserError, match="line 1 is not a prediction"):
        pages_of(tmp_path / "rows", tmp_path / "pages")


def test_lines_without_texts_or_with_odd_ones_do_not_stop_the_pages(tmp_path):
    add_answers(tmp_path / "rows", "dense", "vt", [1.0])
    add_answers(tmp_path / "rows", "streaming", "vt", [0.0])
    path = tmp_path / "rows" / "some-gpu" / "ruler" / "predictions" / "streaming" / "vt-4096-.jsonl"
    path.write_text('{"index": 0, "score": 0, "outputs": ["vt 0"], "depths": [0.5, 0.5]}\n')
    assert chunks_of(pages_of(tmp_path / "rows", tmp_path / "pages"))["0"]["answers"]["streaming"]["0"] == [0.0, ""]


def test_an_answer_that_is_no_text_is_shown_as_one(tmp_path):
    more = [{"outputs": [7], "prompt": "a 7 b"}]
    for method, score in (("dense", 1.0), ("streaming", 0.0)):
        add_answers(tmp_path / "rows", method, "vt", [score], more=more)
    held = chunks_of(pages_of(tmp_path / "rows", tmp_path / "pages"))["0"]["samples"]["0"]
    assert held["places"] == [["7", 0.4, "a 7 b"]]
