"""The demo: the commands that it runs, and how often it repeats them."""

from __future__ import annotations

import pytest

from report_rows import add_ttft
from tmbench.cli import demo


@pytest.fixture
def steps(monkeypatch):
    """The commands that were run."""
    ran = []
    monkeypatch.setattr(demo, "_step", lambda *arguments: ran.append(arguments))
    return ran


def test_the_steps_are_commands(tmbench, steps):
    assert tmbench("demo", "--length", "4K", "--length", "2K", "--samples", "1")[0] == 0
    assert [step[0] for step in steps] == ["ttft", "ttft", "ruler", "report", "report"]
    assert steps[0] == ("ttft", "--length", "2K", "--repeats", "8", "--output-dir", "demo")
    assert steps[1][:5] == ("ttft", "--length", "4K", "--repeats", "3"), "nothing was timed, so nothing is known"
    assert steps[2][1:6] == ("--length", "2K", "--samples", "1", "--offline")


def test_repeats_that_are_given_are_taken(tmbench, steps):
    assert tmbench("demo", "--length", "2K", "--repeats", "2")[0] == 0
    assert steps[0][3:5] == ("--repeats", "2")


@pytest.mark.parametrize(("seconds", "repeats"), [(0.01, 12), (0.5, 11), (1.0, 5), (9.0, 3)])
def test_a_length_is_repeated_as_often_as_its_share_of_the_time_allows(tmp_path, seconds, repeats):
    for method in ("dense", "tri_mix"):
        add_ttft(tmp_path, method, 2048, seconds)
    add_ttft(tmp_path, "dense", 1024, 100.0)
    assert demo._repeats(tmp_path, 2048, 4096, 50.0) == repeats
