"""``--shard`` and ``tmbench merge`` on the command line."""

from __future__ import annotations

import json

import pytest

from tmbench.models import loading
from tmbench.results.rows import AgreeRow, RulerRow
from tmbench.results.tables import read_all

AGREE = ("agree", "--method", "streaming", "--length", "128", "--samples", "2", "--new-tokens", "3", "--device", "cpu")
SWEEP = ("sweep", "--last-n", "0", "--last-n", "64", "--length", "600", "--task", "vt", "--samples", "2", "--repeats", "1",
         "--offline", "--device", "cpu")  # fmt: skip


@pytest.mark.slow
def test_shards_are_measured_and_merged(tmbench, tmp_path, monkeypatch):
    code, out, err = tmbench(*AGREE, "--shard", "1/2")
    assert (code, out) == (0, "")
    assert "shard 1/2 is measured, under results/shards/1-of-2; once all 2 are, tmbench merge results makes the rows" in err
    assert "nothing was measured" not in err
    code, out, err = tmbench("merge", "results")
    assert (code, out.strip()) == (1, "0 rows made of 1 shard; 2 samples joined under results")
    assert "shard 2/2 has not finished 2 rows, such as dense on kv at 128: run it again, or give its folder too" in err
    code, out, err = tmbench(*AGREE, "--shard", "2/2", "--output-dir", "elsewhere", "--json")
    assert (code, out) == (0, "[]\n")
    assert "once all 2 are, tmbench merge elsewhere --output-dir elsewhere makes the rows" in err
    monkeypatch.setattr(loading, "load", None)
    code, out, _ = tmbench("merge", "results", "elsewhere", "--json")
    assert code == 0
    assert [(row["method"], row["samples"]) for row in json.loads(out)] == [("dense", 2), ("streaming", 2)]
    assert len(read_all(tmp_path / "results", AgreeRow)) == 2
    code, out, _ = tmbench("merge", "results", "elsewhere")
    assert (code, out.strip()) == (0, "0 rows made of 2 shards, 2 were there; 0 samples joined under results")


@pytest.mark.slow
def test_a_shard_of_a_sweep_asks_and_does_not_time(tmbench, tmp_path):
    for number in (1, 2):
        code, _, err = tmbench(*SWEEP, "--shard", f"{number}/2")
        assert code == 0
        assert "a shard only asks, as times are interleaved" in err
    assert not list(tmp_path.glob("results/**/ttft"))
    assert tmbench("merge", "results")[0] == 0
    assert {(row.method, row.samples) for row in read_all(tmp_path / "results", RulerRow)} == {("dense", 2), ("tri_mix", 2)}


@pytest.mark.slow
def test_shards_of_different_settings_are_refused(tmbench):
    tmbench(*AGREE, "--shard", "1/2")
    tmbench(*AGREE, "--shard", "2/2", "--seed", "7")
    code, out, err = tmbench("merge", "results")
    assert (code, out) == (2, "")
    assert "shard 2/2 and shard 1/2 of dense on kv at 128 differ in seed (7 and 42)" in err or "(42 and 7)" in err
    assert err.count("Error:") == 1
