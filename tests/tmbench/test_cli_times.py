"""What `tmbench ttft` prints: a time against dense only where both were interleaved, and no more than they say."""

from __future__ import annotations

import re
from typing import Any

import pytest

import made_rows
from command_lines import FAST_TTFT
from tmbench.cli import ttft
from tmbench.results.rows import TtftRow

LENGTH: dict[str, Any] = {"length": 4096, "prompt": "kv", "warmup": 1, "coverage": 0.5, "ttft_over_floor": 1.5}


def row(method, samples, interleaved="dense tri_mix streaming", logit_error=0.25):
    seconds = sorted(map(float, samples.split()))
    about = LENGTH | {"ttft_median_s": seconds[len(seconds) // 2], "repeats": len(seconds), "samples_s": samples}
    return TtftRow(**made_rows.COMMON, **about, method=method, interleaved=interleaved, logit_error=logit_error)


def shown(rows, capsys, monkeypatch):
    """The table's lines by method, split where there are two blanks or more; and what is said below."""
    monkeypatch.setenv("COLUMNS", "200")
    ttft._show(rows)
    out, err = capsys.readouterr()
    lines = [re.split(r" {2,}", line.strip()) for line in out.splitlines() if line.strip()]
    return {line[0]: line[1:] for line in lines}, err


def test_a_difference_within_the_repeats_is_said_to_be_none(capsys, monkeypatch):
    rows = [row("dense", "0.99 1.00 1.01"), row("tri_mix", "1.00 1.01 1.66"), row("streaming", "0.50 0.50 0.51")]
    table, err = shown(rows, capsys, monkeypatch)
    assert table["method"] == ["seconds", "vs dense", "density", "TTFT / roofline", "logit error"]
    assert table["tri_mix"][1].startswith("no measurable difference (-")
    assert table["streaming"] == ["0.500", "-50 % (-50 to -49)", "0.500", "1.50", "2.5e-01"]
    assert table["dense"] == ["1.000", "0.500", "1.50"], "dense is compared with nothing"
    assert err == ""


def test_a_time_of_another_run_is_not_compared(capsys, monkeypatch):
    rows = [row("dense", "0.1 0.1 0.1", interleaved="dense"), row("tri_mix", "0.55 0.55 0.55", "tri_mix", None)]
    table, err = shown(rows, capsys, monkeypatch)
    assert table["tri_mix"] == ["0.550", "not interleaved", "0.500", "1.50"]
    assert "Not interleaved with dense" in err
    assert "tri_mix; --overwrite measures them together" in " ".join(err.split())


def test_one_repeat_has_no_interval(capsys, monkeypatch):
    table, _ = shown([row("dense", "1.0"), row("tri_mix", "0.5")], capsys, monkeypatch)
    assert table["tri_mix"][1] == "-50 %, one repeat"


@pytest.mark.slow
def test_a_second_run_beside_an_older_dense(tmbench):
    assert tmbench(*FAST_TTFT, "--method", "dense")[0] == 0
    code, out, err = tmbench(*FAST_TTFT, "--method", "dense", "--method", "streaming", "--n-local", "32")
    assert code == 0
    assert "not interleaved" in out
    assert "%" not in out
    assert "--overwrite measures them together" in " ".join(err.split())
