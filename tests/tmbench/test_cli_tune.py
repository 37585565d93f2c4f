"""``tmbench tune`` on the command line: a whole run on the embedded model, and input that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TUNE = (
    "tune", "--device", "cpu", "--task", "random", "--length", "200", "--n-init", "2", "--n-local", "16", "--last-n", "8",
    "--margin", "2", "--cap", "8", "--budget-prefills", "120", "--random", "1", "--compared-prompts", "2",
    "--held-out-length", "240",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_chooses_layers_that_other_commands_take(tmbench):
    code, out, err = tmbench(*TUNE, "--plan")
    assert code == 0, err
    assert "A search ends as soon as it can tell" in out
    assert not Path("results").exists()
    code, out, err = tmbench(*TUNE, "--output", "tuned.csv", "--plot", "path.png")
    assert code == 0, err
    assert "so the deepest layers come first" in err
    assert "Chosen: layers" in out
    assert "On random at 240, which was held out" in out
    assert Path("path.png").stat().st_size > 10_000
    files = sorted(path for path in Path("results").rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    code, out, err = tmbench(*TUNE, "--json")
    assert code == 0
    assert "nothing was measured: all of it is there already" in err
    assert [path.stat().st_size for path in files] == sizes
    (chosen,) = (row for row in json.loads(out) if row["stage"] == "check" and row["chosen"])
    assert "Nothing is to be measured" in tmbench(*TUNE, "--plan")[1]
    fast = ("ttft", "--device", "cpu", "--length", "256", "--repeats", "1", "--method", "tri_mix", "--prompt", "random")
    code, out, err = tmbench(*fast, "--layers", "tuned.csv", "--json")
    assert code == 0, err
    assert "by the tune of tri_mix on random at 200, margin 2 nats, 95 % confidence" in err
    (row,) = json.loads(out)
    assert row["parameters"].split()[0] == chosen["parameters"].split()[0]
    assert row["layers_source"].startswith("tune of tri_mix on random at 200")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "flexprefill"), "--method flexprefill has no deep pattern whose layers could be chosen: give tri_mix"),
        (("--margin", "0"), "--margin must be above 0 nats, not 0"),
        (("--cap", "0.01"), "--cap 0.01 must be above --margin 0.05"),
        (("--confidence", "1"), "--confidence must be from 0.5 to below 1, not 1"),
        (("--output", "tuned.json"), "--output tuned.json must be the name of a CSV file"),
        (("--plan", "--json"), "--plan or --dry-run prints a table"),
    ],
)
def test_bad_input_is_one_sentence(tmbench, arguments, words):
    code, out, err = tmbench("tune", "--device", "cpu", *arguments)
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())


@pytest.mark.slow
def test_a_probe_that_is_not_there_and_prompts_that_were_searched_on_are_refused(tmbench):
    code, _, err = tmbench("tune", "--device", "cpu", "--probe", "auto")
    assert code == 2
    assert "--probe auto finds no probe of tiny under results: run tmbench probe --model tiny first" in " ".join(err.split())
    code, _, err = tmbench(*TUNE, "--held-out-length", "200")
    assert code == 2
    assert "--held-out-task random at 200 tokens is what the search reads" in " ".join(err.split())
