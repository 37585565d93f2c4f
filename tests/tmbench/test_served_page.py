"""What docs/serving.md says of engines is made of rows: points against one piece, and words that follow from them."""

from __future__ import annotations

import re

import pytest

from answered_rows import add_answers
from report_rows import add_ttft

CHUNKS = {"chunk": 2048, "prompt_length": "known"}


@pytest.fixture
def made(monkeypatch, pytestconfig, tmp_path):
    """Renders a block of rows that it is given a folder for."""
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import served_tables
    import sources

    def block(name, *words):
        return served_tables.SERVED_TABLES[f"served-{name}"](sources.Sources(served_rows=tmp_path), *words)

    return block


def measured(root, ways, lengths=(4096, 8192)):
    """Scores of four samples in five, and of as many in ``ways`` as each method keeps there; dense cannot do vt."""
    for length in lengths:
        for task in ("niah_single_1", "niah_multivalue", "vt"):
            one = [float(number % 5 > 0 and task != "vt") for number in range(200)]
            for method, kept in (("dense", 1), ("streaming", 1), ("minference", 0)):
                about = {"length": length, "n_local": 512} if method == "streaming" else {"length": length}
                if method == "minference":
                    about["coverage"] = 4096 / length
                add_answers(root, method, task, one, **about)
                for how in ways:
                    add_answers(root, method, task, one if kept else [0.0] * 200, **about, **how)


def test_without_rows_nothing_is_said(made):
    assert made("scores") == made("may-use") == made("losses") == "Not measured yet."


def test_words_follow_from_the_intervals_of_all_lengths_together(made, tmp_path):
    measured(tmp_path, [CHUNKS, {"ask_later": True}])
    said = [
        "    - An engine may use `streaming`: against one piece no loss is measurable.",
        "    - Against one piece `minference` (50 to 100 %) loses.",
    ]
    assert made("may-use").splitlines() == [
        "- **In chunks of 2K, prompt length known**",
        *said,
        "- **Asked later**",
        *said,
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in made("together").splitlines()[2:]]
    # Two tasks at each of two lengths: of vt there is nothing to lose.
    assert [[line[0], *line[3:]] for line in lines[:3]] == [
        ["dense", "4", "800", "no measurable loss"],
        ["minference", "4", "800", "loss"],
        ["streaming", "4", "800", "no measurable loss"],
    ]
    _, table = made("scores").split("a/model at 8K, 2 tasks (niah_single_1, niah_multivalue), 400 samples")
    (minference,) = [line for line in table.splitlines() if line.startswith("| minference")]
    assert minference.count("-80.00 (") == 2


def test_too_few_samples_are_no_leave(made, tmp_path):
    for how in ({}, {"ask_later": True}):
        for method in ("dense", "minference"):
            add_answers(tmp_path, method, "vt", [1.0] * 20, **how)
    assert made("may-use").splitlines() == [
        "- **Asked later**",
        "    - A loss is still open, of up to so many points: `minference`, 16.84.",
    ]


def test_settings_that_one_model_was_asked_are_told_apart_everywhere(made, tmp_path):
    """A model that was asked one setting alone calls it by the method's name: it counts with the same of other models."""
    for length, windows in ((4096, (256, 512)), (8192, (512,))):
        for how in ({}, {"ask_later": True}):
            add_answers(tmp_path, "dense", "vt", [1.0] * 20, length=length, **how)
            for window in windows:
                add_answers(tmp_path, "streaming", "vt", [1.0] * 20, length=length, n_local=window, **how)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in made("together").splitlines()[2:]]
    assert [(line[0], line[4]) for line in lines] == [
        ("dense", "40"),
        ("streaming (n_local 256)", "20"),
        ("streaming (n_local 512)", "40"),
    ]


def test_settings_that_no_model_was_asked_both_of_are_told_apart_too(made, tmp_path):
    """Layers are a model's own, and make no setting of another one."""
    for length, window, layers in ((4096, 256, "4-"), (8192, 512, "4-"), (16384, 512, "12-")):
        for how in ({}, {"ask_later": True}):
            add_answers(tmp_path, "dense", "vt", [1.0] * 20, length=length, **how)
            about = {"n_local": window, "layers": layers}
            add_answers(tmp_path, "tri_mix", "vt", [1.0] * 20, length=length, **about, **how)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in made("together").splitlines()[2:]]
    assert [(line[0], line[4]) for line in lines] == [
        ("dense", "60"),
        ("tri_mix (n_local 256)", "20"),
        ("tri_mix (n_local 512)", "40"),
    ]


def test_times_stand_as_the_report_has_them(made, tmp_path):
    add_ttft(tmp_path, "dense", 4096, 1.0, matrix_rate_flops=1e12)
    add_ttft(tmp_path, "dense", 4096, 1.5, matrix_rate_flops=1e12, **CHUNKS)
    assert made("agreement") == "Not measured yet."
    assert re.search(r"\| dense +\| in chunks of 2K, prompt length known .* \+50\.0 % .* slower", made("times"))
