"""Plots are real pictures with stable and safe names, and their words are readable and complete."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, cast

import pytest
from matplotlib.image import imread

import made_rows
from tmbench.methods import table
from tmbench.report.length_lines import named_lengths
from tmbench.report.pictures import figures, file_name, save_all
from tmbench.report.plot_style import method_look
from tmbench.report.report import build
from tmbench.report.ruler_plot import ruler_figure
from tmbench.report.ttft_plot import speed_up_figure, ttft_figure
from tmbench.results.rows import FAILED, OUT_OF_MEMORY, RulerRow, TtftRow
from tmbench.results.tables import append

COMMON = made_rows.COMMON | {"threads": 2}
METHODS = ("dense", "tri_mix", "minference", "streaming")


def add_ttft(root, method, length, seconds=None, **changes):
    times = {} if seconds is None else {"ttft_median_s": seconds, "ttft_min_s": 0.9 * seconds, "ttft_max_s": 1.2 * seconds}
    plain = {"prompt": "kv", "repeats": 3, "warmup": 1, "interleaved": " ".join(METHODS), "method": method, "length": length}
    append(root, TtftRow(**made_rows.columns(COMMON | plain | times | changes)))


def add_ruler(root, method, task, score, **changes):
    plain = {
        "samples": 50,
        "wording": "own",
        "wording_hash": "f00d",
        "source": "noise",
        "chat_template": False,
        "length": 4096,
    }
    append(root, RulerRow(**made_rows.columns(COMMON | plain | {"method": method, "task": task, "score": score} | changes)))


def add_all(root):
    for place, length in enumerate((2048, 4096, 8192)):
        for speed, method in enumerate(METHODS, start=1):
            add_ttft(root, method, length, 4.0**place / speed)
    add_ttft(root, "dense", 16384, status=OUT_OF_MEMORY)
    add_ttft(root, "tri_mix", 16384, 20.0)
    for task, score in (("niah_single_1", 100.0), ("vt", 20.0), ("cwe", None)):
        for method in METHODS:
            add_ruler(root, method, task, score, status="ok" if score is not None else FAILED)


def draw(report, directory):
    return save_all(figures(report), directory)


@pytest.mark.slow
def test_every_group_is_drawn(tmp_path):
    add_all(tmp_path)
    report = build(tmp_path)
    paths = draw(report, tmp_path / "new" / "plots")
    names = [path.name for path in paths]
    assert [name.rpartition("-")[0] for name in names] == [
        "ttft-some-gpu-model-kv",
        "speed-up-some-gpu-model-kv",
        "ruler-some-gpu-model-4k",
    ]
    for path in paths:
        picture = imread(path)
        assert picture.shape[0] >= 450
        assert picture.shape[1] >= 900
        assert len({tuple(pixel) for pixel in picture[::7, ::7, :3].reshape(-1, 3).round(2)}) > 20, "nearly blank"
    before = [path.read_bytes() for path in paths]
    assert draw(report, tmp_path / "new" / "plots") == paths
    assert [path.read_bytes() for path in paths] == before


def test_names_differ_with_the_setting_and_leave_the_folder_alone(tmp_path):
    for model in ("../../up/we go|now", "x/../we go|now", "/"):
        add_ttft(tmp_path, "dense", 2048, 1.0, model=model)
    names = [file_name("ttft", group.setting, group.setting.prompt) for group in build(tmp_path).ttft]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*\.png", name) and ".." not in name for name in names)


def test_what_cannot_be_drawn_is_left_out(tmp_path):
    add_ttft(tmp_path, "dense", 2048, status=OUT_OF_MEMORY)
    add_ruler(tmp_path, "dense", "vt", None, status=FAILED)
    assert draw(build(tmp_path), tmp_path / "plots") == []


def test_one_length_and_no_dense_is_one_plot(tmp_path):
    add_ttft(tmp_path, "tri_mix", 2048, 1.0)
    (path,) = draw(build(tmp_path), tmp_path / "plots")
    assert path.name.startswith("ttft-")


def test_a_speed_up_carries_its_fidelity(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5, logit_error=0.0312)
    add_ttft(tmp_path, "minference", 2048, 0.25)
    report = build(tmp_path)
    words = [text.get_text() for text in speed_up_figure(report.ttft[0]).axes[0].texts]
    assert words.index("logit error 0.031 at 2K") == words.index("tri_mix") + 1
    assert words.index("fidelity not measured") == words.index("minference") + 1


def test_a_speed_up_says_where_the_repeats_tell_none(tmp_path):
    for length in (2048, 4096, 8192):
        add_ttft(tmp_path, "dense", length, 1.0, samples_s="0.9 1.0 1.1")
    add_ttft(tmp_path, "tri_mix", 2048, 1.0, samples_s="0.9 1.01 1.7")
    add_ttft(tmp_path, "tri_mix", 4096, 0.5, samples_s="0.45 0.5 0.55")
    add_ttft(tmp_path, "tri_mix", 8192, 0.5, samples_s="0.45 0.5 0.55", interleaved="tri_mix")
    report = build(tmp_path)
    words = [text.get_text() for text in speed_up_figure(report.ttft[0]).axes[0].texts]
    start = words.index("tri_mix")
    assert words[start + 2 : start + 4] == ["no measurable difference at 2K", "not interleaved at 8K"]


def test_a_speed_up_has_its_interval(tmp_path):
    for method, seconds in (("dense", (1.0, 1.1, 0.9)), ("tri_mix", (0.5, 0.6, 0.4))):
        add_ttft(tmp_path, method, 2048, 1.0, samples_s=" ".join(map(str, seconds)), repeats=3)
    (section,) = build(tmp_path).ttft
    found: Any = section.measured("tri_mix")[0].against
    axes: Any = speed_up_figure(section).axes[0]
    (low, high) = next(each for each in axes.collections if len(each.get_segments())).get_segments()[0][:, 1]
    assert low == pytest.approx(1 / (1 + found.high / 100))
    assert high == pytest.approx(1 / (1 + found.low / 100))


def test_speed_up_is_the_time_of_dense_over_the_time_of_the_method(tmp_path):
    for length, seconds in ((2048, 2.0), (4096, 0.25)):
        add_ttft(tmp_path, "dense", length, 1.0)
        add_ttft(tmp_path, "tri_mix", length, seconds)
    report = build(tmp_path)
    (axes,) = speed_up_figure(report.ttft[0]).axes
    assert [list(cast(Any, line.get_ydata())) for line in axes.get_lines()] == [[1.0, 1.0], [0.5, 4.0]]
    assert axes.get_ylim()[0] < 0.5
    assert axes.get_ylim()[1] > 4.0


def test_what_ran_out_of_memory_is_written_below(tmp_path):
    add_all(tmp_path)
    (axes,) = ttft_figure(build(tmp_path).ttft[0]).axes
    assert axes.get_xlabel() == "prompt length, tokens\nout of memory: dense at 16K"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2K", "4K", "8K", "16K"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "variants"), [((1.0, 1.0, 1.0), 1), ((1.0, 0.99, 0.1), 1), ((10.0, 9.9, 1.0), 1), ((1.0, 1.0, 0.1), 8)]
)
def test_labels_do_not_overlap(tmp_path, seconds, variants):
    for method, value in zip(METHODS, seconds, strict=False):
        for variant in range(variants if method == "tri_mix" else 1):
            own = {"layers": f"{variant}-"} if method == "tri_mix" else {}
            add_ttft(tmp_path, method, 2048, 0.01, **own)
            add_ttft(tmp_path, method, 8192, value, logit_error=0.01, **own)
            add_ruler(tmp_path, method, "vt", 50.0, **own)
    report = build(tmp_path)
    for figure in (ttft_figure(report.ttft[0]), speed_up_figure(report.ttft[0])):
        figure.draw_without_rendering()
        texts = [text for text in figure.axes[0].texts if text.get_text()]
        boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
        assert boxes[-1].y1 <= figure.axes[0].bbox.y1 + 0.05 * figure.axes[0].bbox.height
        assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))
        assert all(box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_a_heat_map_shows_scores_failures_and_the_average(tmp_path):
    add_ruler(tmp_path, "dense", "vt", 97.25)
    add_ruler(tmp_path, "tri_mix", "vt", 20.0)
    add_ruler(tmp_path, "dense", "cwe", 0.0)
    add_ruler(tmp_path, "tri_mix", "cwe", None, status=OUT_OF_MEMORY)
    figure = ruler_figure(build(tmp_path).ruler[0])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["97.25", "0", "97.2", "20", "out of\nmemory", "20.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["vt", "cwe", "average of 1"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["dense", "tri_mix"]
    # A score of nothing must not look like no score.
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert colours[1] != colours[4]


def test_a_heat_map_of_many_methods_has_a_line_for_each(tmp_path):
    add_ruler(tmp_path, "dense", "vt", 90.0)
    for layer in range(7):
        add_ruler(tmp_path, "tri_mix", "vt", 10.0 * layer, layers=f"{layer}-")
    (axes,) = ruler_figure(build(tmp_path).ruler[0]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["vt", "average of 1"]
    lines = [label.get_text() for label in axes.get_yticklabels()]
    assert lines == ["dense", *(f"tri_mix (layers {layer}-)" for layer in range(7))]
    scores = {text.get_position(): text.get_text() for text in axes.texts}
    assert (scores[0, 0], scores[0, 7], scores[1.25, 7]) == ("90", "60", "60.0")


def test_a_method_has_one_colour_everywhere(tmp_path):
    for method in ("dense", "tri_mix"):
        add_ttft(tmp_path, method, 2048, 1.0)
    for method in METHODS:
        add_ttft(tmp_path, method, 2048, 1.0, model="b/model")
    few, many = (ttft_figure(group).axes[0].get_lines() for group in build(tmp_path).ttft)
    assert [line.get_color() for line in few] == [line.get_color() for line in many[:2]]
    assert len({line.get_color() for line in many}) == 4


def test_a_rule_has_one_hue_and_only_dense_is_black():
    looks = {name: method_look(name) for name in table.METHODS}
    assert [name for name, look in looks.items() if look.colour == "#000000"] == ["dense"]
    for rule in ("minference", "flexprefill", "xattention", "flashprefill", "pbs", "skip_softmax", "oracle_blocks"):
        alone, above = looks[rule], looks[f"tri_mix_{rule}"]
        assert (alone.colour, alone.line, above.line) == (above.colour, "--", "-")
    assert (looks["dense"].line, looks["tri_mix"].line, looks["streaming"].line) == ("-", "-", "--")
    assert len({look.colour for look in looks.values()}) == 10
    assert method_look("tri_mix", 1).marker != looks["tri_mix"].marker
    assert method_look("attn_native").colour not in {look.colour for look in looks.values()}


def test_names_of_lengths_do_not_overlap():
    lengths = [n * 1024 for n in (32, 48, 64, 80, 96, 112, 128, 256, 512)]
    assert set(named_lengths(lengths[:7])) == set(lengths[:7])
    assert set(lengths) - set(named_lengths(lengths)) == {112 * 1024}
    assert named_lengths([4096]) == [4096]
