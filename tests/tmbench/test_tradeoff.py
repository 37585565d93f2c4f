"""Accuracy against time: joined by what was the same, a front that nothing beats, and the effect of one change at a time."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from math import exp, log, sqrt
from statistics import fmean, stdev

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.image import imread

import made_rows
from tmbench.report import pictures
from tmbench.report.effects import SHAPE
from tmbench.report.intervals import GAIN, TOO_FEW, difference
from tmbench.report.report import build
from tmbench.report.tradeoff_plot import trade_off_figure
from tmbench.report.writers import report_csv, report_json, report_markdown
from tmbench.results.rows import RulerRow, TtftRow
from tmbench.results.tables import append, read

COMMON = made_rows.COMMON | {"length": 4096}
RULER = {"wording": "own", "wording_hash": "f00d", "source": "noise", "chat_template": False}
TTFT = {"prompt": "kv", "repeats": 3, "warmup": 1, "interleaved": "dense tri_mix", "prefill": "eager"}
SAMPLES = 40


ROUNDS = (0.95, 1.0, 1.1)


def add(root, wrong, seconds, coverage, method="tri_mix", rounds=ROUNDS, **parameters):
    """A variant that answers the first ``wrong`` of the samples of two tasks wrongly, and takes so many seconds."""
    of = {"method": method, **parameters}
    times = {"ttft_median_s": seconds, "ttft_min_s": 0.95 * seconds, "ttft_max_s": 1.1 * seconds, "coverage": coverage}
    times["samples_s"] = " ".join(str(seconds * part) for part in rounds)
    append(root, TtftRow(**made_rows.columns(COMMON | TTFT | {"repeats": len(rounds)} | of | times)))
    for task in ("vt", "cwe"):
        name = f"predictions/{method}/{task}-{'-'.join(map(str, parameters.values()))}.jsonl"
        path = root / "some-gpu" / "ruler" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = [float(index >= wrong) for index in range(SAMPLES)]
        entries = ({"index": index, "score": score, "outputs": [task]} for index, score in enumerate(scores))
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        score = round(100 * sum(scores) / SAMPLES, 2)
        about = {"task": task, "samples": SAMPLES, "score": score, "predictions": name}
        append(root, RulerRow(**made_rows.columns(COMMON | RULER | of | about)))


@pytest.fixture
def swept(tmp_path):
    add(tmp_path, 2, 1.0, 1.0, "dense")
    for start, wrong, seconds, coverage in ((2, 10, 0.5, 0.4), (4, 4, 0.8, 0.7)):
        add(tmp_path, wrong, seconds, coverage, layers=f"{start}-", n_init=8, n_local=64, last_n=128)
        add(tmp_path, wrong + 20, seconds - 0.05, coverage - 0.1, layers=f"{start}-", n_init=8, n_local=64, last_n=0)
        add(tmp_path, wrong + 15, seconds + 0.1, coverage * 1.004, layers=f"{start}-", n_init=8, n_local=192, last_n=0)
    return tmp_path


def trade_off_of(root):
    (group,) = build(root).trade_offs
    return group


def variant(cells, **values):
    (cell,) = (cell for cell in cells if values.items() <= cell.row.settings.items())
    return cell


def saved_column(group):
    """What the table of methods says of the time that each saves."""
    table = group.tables()[0]
    names = [column.name for column in table.columns]
    return {row[names.index("method")]: row[names.index("time saved")] for row in table.rows}


def test_time_saved_and_points_kept(swept):
    group = trade_off_of(swept)
    assert len(group.cells) == 6
    cell = variant(group.cells, layers="2-", last_n=128)
    assert cell.saved_percent == pytest.approx(50)
    assert (cell.saved_low, cell.saved_high) == pytest.approx((50, 50)), "half as long in every round"
    expected = difference([[0.0] * 2 + [-100.0] * 8 + [0.0] * 30] * 2)
    assert cell.difference == expected
    assert [cell.saved_percent for cell in group.cells] == sorted(cell.saved_percent for cell in group.cells)


def test_nothing_beats_what_is_on_the_front(swept):
    cells = trade_off_of(swept).cells
    points = [(cell.saved_percent, cell.difference.mean) for cell in cells] + [(0.0, 0.0)]
    for cell in cells:
        own = (cell.saved_percent, cell.difference.mean)
        beaten = any(one[0] >= own[0] and one[1] >= own[1] and one != own for one in points)
        assert cell.front == (not beaten)
    front = {(cell.row.settings["layers"], cell.row.settings["last_n"]) for cell in cells if cell.front}
    assert front == {("2-", 0), ("2-", 128), ("4-", 128)}
    slow = variant(cells, layers="4-", n_local=192)
    assert not slow.front


def test_times_that_do_not_measurably_differ_count_as_equal_on_the_front(tmp_path):
    """One slow repeat of dense makes the median 10 % slower, and the method 10 % faster than it: nobody knows."""
    variant_of = {"layers": "4-", "n_init": 8, "n_local": 64}
    add(tmp_path, 2, 1.0, 1.0, "dense", rounds=(0.99, 1.0, 1.66))
    add(tmp_path, 4, 0.9, 0.9, last_n=0, **variant_of)
    add(tmp_path, 2, 0.5, 0.9, rounds=(1.0, 1.01, 1.7), last_n=128, **variant_of)
    group = trade_off_of(tmp_path)
    slow, fast = (variant(group.cells, last_n=last) for last in (0, 128))
    logs = [log(0.9 * own / dense) for own, dense in zip(ROUNDS, (0.99, 1.0, 1.66), strict=True)]
    reach = 4.302653 * stdev(logs) / sqrt(3)
    ends = [100 * (1 - exp(fmean(logs) + sign * reach)) for sign in (1, -1)]
    assert [slow.saved_low, slow.saved_high] == pytest.approx(ends, rel=1e-4)
    assert slow.saved_low < 0 < slow.saved_high
    assert (slow.time.verdict, fast.time.verdict) == ("no measurable difference", "faster")
    assert (slow.front, fast.front) == (False, True), "dense keeps more in a time that is not measurably longer"
    assert saved_column(group)[slow.label] == f"no measurable difference ({ends[0]:+.1f} to {ends[1]:+.1f} %)"
    (effect,) = group.effects
    assert effect.times.verdict == "no measurable difference"
    assert effect.time.startswith("no measurable difference (")


def test_one_repeat_saves_nothing_that_is_known(tmp_path):
    add(tmp_path, 2, 1.0, 1.0, "dense", rounds=(1.0,))
    for last in (0, 128):
        add(tmp_path, 4, 0.5, 0.9, rounds=(1.0,), layers="4-", n_init=8, n_local=64, last_n=last)
    group = trade_off_of(tmp_path)
    assert [(cell.saved_percent, cell.saved_low, cell.front) for cell in group.cells] == [(50, None, False)] * 2
    assert list(saved_column(group).values()) == ["+50.0 %, one repeat"] * 2
    assert [one.time for one in group.effects] == ["one repeat"]
    trade_off_figure(group).draw_without_rendering()


def test_what_is_slower_than_dense_is_beaten_by_it(tmp_path):
    add(tmp_path, 2, 1.0, 1.0, "dense")
    add(tmp_path, 2, 1.5, 1.0, layers="4-", n_init=8, n_local=64, last_n=128)
    (cell,) = trade_off_of(tmp_path).cells
    assert cell.saved_percent == pytest.approx(-50)
    assert not cell.front


def test_times_of_other_turns_are_named_and_no_effect(tmp_path):
    add(tmp_path, 2, 1.0, 1.0, "dense")
    add(tmp_path, 10, 0.5, 0.4, layers="2-", n_init=8, n_local=64, last_n=128)
    add(tmp_path, 30, 0.3, 0.3, layers="2-", n_init=8, n_local=64, last_n=0)
    path = tmp_path / "some-gpu" / "ttft" / "tri_mix.csv"
    rows = read(path, TtftRow)
    path.unlink()
    append(tmp_path, rows[0], replace(rows[1], interleaved="dense tri_mix tri_mix"))
    group = trade_off_of(tmp_path)
    assert [cell.apart for cell in group.cells] == [False, True]
    (note,) = group.notes()
    assert note.endswith("may have changed in between: tri_mix (last_n 0).")
    (effect,) = group.effects
    assert effect.time_percent is None
    assert effect.time == "-"


def test_effects_are_those_of_one_change_over_the_same_samples(swept):
    effects = trade_off_of(swept).effects
    found = {(one.parameter, one.before, one.after, one.elsewhere): one for one in effects}
    assert {key[0] for key in found} == {"layers", "n_local", "last_n", SHAPE}
    last = found["last_n", "0", "128", "layers 2-, n_local 64"]
    assert last.points == difference([[0.0] * 10 + [100.0] * 20 + [0.0] * 10] * 2)
    assert last.points.verdict == GAIN
    assert last.time_percent == pytest.approx(100 * (0.5 / 0.45 - 1))
    start = found["layers", "2-", "4-", "n_local 64, last_n 128"]
    assert start.points.mean == pytest.approx(15)
    shape = found[SHAPE, "n_local 192, last_n 0", "n_local 64, last_n 128", "layers 4-"]
    assert shape.points.mean == pytest.approx(37.5)
    # Each of the three: two starting layers; window 64 to 192 without last queries; last_n 0 to 128 at window 64.
    assert sorted(one.parameter for one in effects) == sorted([*["layers"] * 3, *["n_local", "last_n", SHAPE] * 2])


def test_neighbouring_values_are_compared(tmp_path):
    add(tmp_path, 2, 1.0, 1.0, "dense")
    for place, last in enumerate((256, 0, 64)):
        add(tmp_path, place, 0.5, 0.2 + 0.3 * place, layers="4-", n_init=8, n_local=64, last_n=last)
    effects = trade_off_of(tmp_path).effects
    assert [(one.before, one.after) for one in effects] == [("0", "64"), ("64", "256")]
    assert effects[0].points.verdict == TOO_FEW


def test_neighbours_are_layers_from_one_on_or_lists(tmp_path):
    add(tmp_path, 2, 1.0, 1.0, "dense")
    for place, layers in enumerate(("3,10-12", "16-", "3,7", "4-")):
        add(tmp_path, place, 0.5, 0.2 + 0.1 * place, layers=layers, n_init=8, n_local=64, last_n=0)
    effects = trade_off_of(tmp_path).effects
    assert [(one.parameter, one.before, one.after) for one in effects] == [
        ("layers", "4-", "16-"),
        ("layers", "3,7", "3,10-12"),
    ]


def test_another_cost_is_no_control(tmp_path):
    add(tmp_path, 2, 1.0, 1.0, "dense")
    add(tmp_path, 2, 0.5, 0.500, layers="4-", n_init=8, n_local=64, last_n=128)
    add(tmp_path, 2, 0.5, 0.503, layers="4-", n_init=8, n_local=192, last_n=0)
    add(tmp_path, 2, 0.5, 0.500, layers="2-", n_init=8, n_local=192, last_n=0)
    assert [one.parameter for one in trade_off_of(tmp_path).effects] == ["layers"]


@pytest.mark.parametrize("changes", [{"length": 8192}, {"model": "b/model"}, {"dtype": "float32"}, {"threads": 4}])
def test_times_of_another_setting_are_not_joined(tmp_path, changes):
    add(tmp_path, 2, 1.0, 1.0, "dense")
    add(tmp_path, 2, 0.5, 0.5, layers="4-", n_init=8, n_local=64, last_n=128)
    for path in tmp_path.glob("some-gpu/ttft/*.csv"):
        path.unlink()
    for method, own in (("dense", {}), ("tri_mix", {"layers": "4-", "n_init": 8, "n_local": 64, "last_n": 128})):
        append(
            tmp_path, TtftRow(**made_rows.columns(COMMON | TTFT | own | {"method": method, "ttft_median_s": 1.0} | changes))
        )
    assert build(tmp_path).trade_offs == []


def test_markdown_csv_and_json(swept):
    report = build(swept)
    (group,) = report.trade_offs
    markdown = report_markdown(report)
    assert (
        "### Accuracy kept against time saved at 4K: a/model, checkpoint weights, bfloat16, prompt kv, eager prefill"
        in markdown
    )
    assert f"| {SHAPE} | n_local 192, last_n 0 | n_local 64, last_n 128 |" in re.sub(" +", " ", markdown)
    lines = [line for line in csv.DictReader(io.StringIO(report_csv(report))) if line["kind"] == "trade-off"]
    saved = {line["label"]: float(line["value"]) for line in lines if line["figure"] == "saved_percent"}
    assert saved == pytest.approx({cell.label: cell.saved_percent for cell in group.cells})
    entry = next(entry for entry in json.loads(report_json(report)) if "front" in entry)
    assert entry["front"] == [cell.label for cell in group.cells if cell.front]
    assert {one["parameter"] for one in entry["effects"]} == {"layers", "n_local", "last_n", SHAPE}
    assert entry["effects"][0]["verdict"] in {GAIN, TOO_FEW, "loss", "no measurable loss"}


@pytest.mark.slow
def test_the_plot_has_every_method_with_its_bars(swept, tmp_path):
    report = build(swept)
    figure = trade_off_figure(report.trade_offs[0])
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    for number in range(1, 7):
        assert str(number) in texts
        assert any(text.startswith(f"{number} tri_mix (") for text in texts)
    assert len(axes.containers) == 6
    for container, cell in zip(axes.containers, report.trade_offs[0].cells, strict=True):
        assert isinstance(container, ErrorbarContainer)
        across, up = (bars.get_segments()[0] for bars in container.lines[2])
        assert across[:, 0] == pytest.approx([cell.saved_low, cell.saved_high])
        assert up[:, 1] == pytest.approx([cell.difference.low, cell.difference.high])
    figure.draw_without_rendering()
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.x1 <= figure.bbox.x1 + 1, f"{text.get_text()} is cut off"
    drawn = pictures.save_all(pictures.figures(report), tmp_path / "plots")
    path = next(path for path in drawn if path.name.startswith("trade-off-"))
    assert path.name.startswith("trade-off-some-gpu-model-4k-")
    assert imread(path).shape[1] >= 900


def test_times_of_few_repeats_are_said_to_be_so(swept):
    assert trade_off_of(swept).notes() == []
    of = {"layers": "2-", "n_init": 8, "n_local": 64, "last_n": 0}
    times = {"ttft_median_s": 1.0, "ttft_min_s": 1.0, "ttft_max_s": 1.0, "samples_s": "1.0 1.0"}
    append(swept, TtftRow(**made_rows.columns(COMMON | TTFT | of | times | {"method": "tri_mix", "repeats": 2})))
    assert trade_off_of(swept).notes() == ["Times of only 2 repeats: fewer than 3 hardly tell what is faster."]
