"""The rows of a method that skips tiles while it computes say how many, and count what was computed of them."""

from __future__ import annotations

import json

import pytest

RULE = "threshold=0.5,order=descending"


@pytest.mark.slow
def test_rows_say_what_share_was_skipped(tmbench):
    methods = ("--method", "dense", "--method", f"skip_softmax:{RULE}", "--method", f"tri_mix_skip_softmax:{RULE}")
    asked = ("--length", "1K", *methods, "--json")
    code, out, err = tmbench("ruler", "--task", "vt", "--samples", "1", *asked)
    assert code == 0, err
    code, timed, err = tmbench("ttft", "--repeats", "1", *asked)
    assert code == 0, err
    for rows in (json.loads(out), json.loads(timed)):
        dense, skips, mixed = rows
        assert (dense["skipped_share"], dense["coverage"]) == (None, 1.0)
        assert "threshold=0.5 order=descending" in skips["parameters"]
        assert "skip_softmax:torch-blocks" in skips["backends"]
        for row in (skips, mixed):
            assert 0.05 < row["skipped_share"] < 0.95
        assert 0.5 < skips["coverage"] < 1, "the product of queries and keys is computed of every tile"
        assert mixed["coverage"] < skips["coverage"]
    assert skips["flop"] < dense["flop"]
    code, out, _ = tmbench("report")
    assert code == 0
    assert out.count("tiles skipped") == 2
    assert "a pair of a skipped tile counts half in the density" in out
    code, out, _ = tmbench("ttft", "--repeats", "1", *asked[:-1])
    assert "tiles skipped" in out


@pytest.mark.slow
def test_what_it_keeps_is_measured_in_every_way(tmbench):
    method = ("--length", "1K", "--method", "dense", "--method", f"skip_softmax:{RULE}")
    for command in (("agree", "--samples", "1", "--new-tokens", "8"), ("probe", "--loss", "--samples", "1", "--task", "vt")):
        code, out, err = tmbench(*command, *method, "--json")
        assert code == 0, err
        assert json.loads(out)[-1]["method"] == "skip_softmax"
    code, out, err = tmbench("ruler", "--task", "vt", "--samples", "1", *method, "--chunk", "256", "--json")
    assert code == 0, err
    assert json.loads(out)[-1]["skipped_share"] > 0
