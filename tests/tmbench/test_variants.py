"""One method in several settings in one run: a row for each, told apart wherever methods are named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

import made_rows
from command_lines import FAST_TTFT
from plans import plan_of
from tmbench.cli import lm_eval
from tmbench.errors import UserError
from tmbench.methods.plan import ModelShape
from tmbench.methods.spec import specs
from tmbench.report.html.commands import command_of
from tmbench.report.report import build
from tmbench.report.writers import report_markdown
from tmbench.results.lm_eval_rows import LmEvalRow
from tmbench.results.predictions import Prediction
from tmbench.results.rows import AgreeRow, LossRow, RulerRow, TtftRow
from tmbench.results.sample_files import read_samples_of
from tmbench.results.tables import read_all
from tmbench.results.variants import dense_of, identity, labels, labels_in, own_label

SHAPE = ModelShape("some/model", layers=6, heads=4)
NARROW, WIDE = "tri_mix (n_local 32)", "tri_mix (n_local 64)"
TWICE = ("--method", "dense", "--method", "tri_mix:n_local=32", "--method", "tri_mix:n_local=64", "--device", "cpu")
RULER = ("ruler", *TWICE, "--task", "vt", "--length", "600", "--samples", "2", "--offline")


def plan(name, **values):
    return plan_of(SHAPE, name, **values)


def text_of(settings):
    return [(one.method.name, dict(one.values)) for one in settings]


def windows(rows):
    """What tells the rows of these tests apart."""
    return [(row.method, row.settings.get("n_local")) for row in rows]


def lines_of(out):
    """The lines of a table by their first cells."""
    return {line[:30].strip().split("  ")[0]: line for line in out.splitlines() if line.strip()}


def told(rows, section):
    """The tables of the one section of a report in which a text stands."""
    return next(part for part in report_markdown(build(rows)).split("\n#### ") if part.startswith(section))


def test_what_is_asked_for_in_two_settings_is_both_and_once_what_is_the_same():
    texts = ["tri_mix", "dense", "tri_mix:delta=64", "tri_mix:n_local=512", "tri_mix:delta=64,mode=carry", "dense"]
    assert text_of(specs(texts, {})) == [("tri_mix", {}), ("dense", {}), ("tri_mix", {"delta": 64})]
    found = specs(["xattention:threshold=0.8", "tri_mix", "xattention"], {"n_local": 32})
    assert text_of(found) == [("xattention", {"threshold": 0.8}), ("tri_mix", {"n_local": 32}), ("xattention", {})]
    assert len(specs(["tri_mix", "tri_mix:n_local=32"], {"n_local": 32})) == 1


def test_it_is_clear_which_dense_attention_others_are_held_against():
    forced = ["dense:dense_backend=torch", "dense:dense_backend=sdpa"]
    assert len(specs([*forced, "dense"], {})) == 3
    assert len(specs([forced[0], "tri_mix", forced[0]], {})) == 2
    for texts, options in ((forced, {}), (["dense", forced[0]], {"dense_backend": "sdpa"})):
        with pytest.raises(UserError, match="dense is given with several backends.*: add --method dense, and leave"):
            specs(texts, options)
    own = plan("dense")
    others = [plan("dense", dense_backend=name) for name in ("torch", "sdpa")]
    assert dense_of([plan("tri_mix"), *others, own]) is own
    assert dense_of([plan("tri_mix"), *others]) is others[0]
    assert dense_of([plan("tri_mix")]) is None


def test_labels_have_the_parameters_in_which_variants_differ():
    plans = [
        plan("dense"),
        plan("tri_mix"),
        plan("tri_mix", delta=64),
        plan("xattention", threshold=0.8),
        plan("xattention", threshold=0.8, stride=8),
        plan("streaming", n_local=16),
        plan("dense", dense_backend="torch"),
    ]
    names = [
        "dense", "tri_mix", "tri_mix (delta 64, mode carry)", "xattention (stride 16)", "xattention (stride 8)", "streaming",
        "dense (dense_backend torch)",
    ]  # fmt: skip
    assert labels(plans) == names
    assert labels_in(" ".join(names)) == names
    assert [own_label(one, names) for one in plans] == names
    assert len({identity(one) for one in plans}) == len(plans)
    assert identity(plan("tri_mix")) == identity(plan("tri_mix", n_local=512))
    # Of rows from before variants were told apart.
    assert labels_in("dense tri_mix tri_mix") == ["dense", "tri_mix", "tri_mix"]
    assert labels_in("") == []
    assert own_label(plans[2], ["dense", "tri_mix"]) == "tri_mix"


@pytest.mark.slow
def test_times(tmbench, tmp_path):
    code, out, err = tmbench(*FAST_TTFT, *TWICE, "--plan")
    assert code == 0, err
    assert sum("n_local 32" in line for line in out.splitlines()) == 1
    assert sum("n_local 64" in line for line in out.splitlines()) == 1
    # In whatever order they come, and the same once more.
    command = (*FAST_TTFT, "--repeats", "2", *TWICE, "--method", "tri_mix:last_n=128,n_local=64")
    code, out, err = tmbench(*command)
    assert code == 0, err
    lines = lines_of(out)
    assert "%" in lines[NARROW]
    assert "%" in lines[WIDE]
    assert err.count("tri_mix: no starting layer is published for tiny") == 1
    rows: list[Any] = read_all(tmp_path / "results", TtftRow)
    assert windows(rows) == [("dense", None), ("tri_mix", 32), ("tri_mix", 64)]
    assert {row.interleaved for row in rows} == {f"dense {NARROW} {WIDE}"}
    assert len({row.rounds for row in rows}) == 1
    assert rows[1].coverage < rows[2].coverage < rows[0].coverage == 1
    assert all(row.logit_error > 0 for row in rows[1:])

    code, same, err = tmbench(*command)
    assert same == out
    assert "nothing was measured: all 3 rows are there already" in err
    code, out, err = tmbench(*FAST_TTFT, *TWICE, "--method", "tri_mix:n_local=16", "--json")
    assert code == 0, err
    assert [row["parameters"].split()[2:3] for row in json.loads(out)] == [
        [], ["n_local=32"], ["n_local=64"], ["n_local=16"]
    ]  # fmt: skip
    assert read_all(tmp_path / "results", TtftRow)[:3] == rows, "one more setting is measured alone"

    section = told(tmp_path / "results", "Time to first token")
    for name in (NARROW, WIDE):
        assert any(line.startswith(f"| {name} ") and "(" in line.split("|")[2] for line in section.splitlines())
    for row, beside in ((rows[1], WIDE), (rows[2], NARROW)):
        again = command_of(row)
        assert f"ttft --method dense --method tri_mix:n_init=8,n_local={row.settings['n_local']}," in again.text
        assert list(again.needs) == [f"It was interleaved with {beside} too: add each as a further --method to repeat that."]


@pytest.mark.slow
def test_scores(tmbench, tmp_path):
    code, out, err = tmbench(*RULER)
    assert code == 0, err
    header = next(line for line in out.splitlines() if line.startswith("task "))
    assert [name in header for name in (NARROW, WIDE)] == [True, True]
    rows = read_all(tmp_path / "results", RulerRow)
    assert windows(rows) == [("dense", None), ("tri_mix", 32), ("tri_mix", 64)]
    assert len({row.predictions for row in rows}) == 3
    for row in rows:
        kept = read_samples_of(tmp_path / "results" / row.device / "ruler" / row.predictions, Prediction)
        assert len(kept) == 2
    code, again, err = tmbench(*RULER)
    assert (code, again) == (0, out)
    assert "nothing was measured: all 3 rows are there already" in err
    code, out, _ = tmbench(*RULER, "--samples", "3", "--plan")
    assert out.count("1 sample ") == 3
    section = told(tmp_path / "results", "RULER")
    paired = [line for line in section.splitlines() if line.startswith("| tri_mix")]
    assert [line.split("|")[1].strip() for line in paired] == [NARROW, WIDE]
    assert all(line.split("|")[5].strip() == "2" for line in paired), "pairs with dense's answers"


@pytest.mark.slow
def test_agreement_and_losses(tmbench, tmp_path):
    common = (*TWICE, "--method", "dense:dense_backend=torch", "--samples", "2")
    agree = ("agree", *common, "--length", "200", "--new-tokens", "6")
    loss = ("probe", "--loss", *common, "--length", "600")
    shown = {}
    for command in (agree, loss):
        code, out, err = tmbench(*command)
        assert code == 0, err
        shown[command[0]] = lines_of(out)
        code, _, err = tmbench(*command)
        assert "nothing was measured: all 4 rows are there already" in err
    assert {NARROW, WIDE, "dense (dense_backend torch)"} <= set(shown["agree"])
    assert "dense" not in shown["agree"], "it is what others agree with"
    assert {"dense", NARROW, WIDE, "dense (dense_backend torch)"} <= set(shown["probe"])
    losses: list[Any] = read_all(tmp_path / "results", LossRow)
    dense = next(row for row in losses if not row.parameters)
    for row in losses:
        if row.method == "tri_mix":
            assert row.nll_prompt_vs_dense == pytest.approx(row.nll_prompt - dense.nll_prompt, abs=1e-9)
    assert len({row.nll_prompt for row in losses if row.method == "tri_mix"}) == 2
    assert len(read_all(tmp_path / "results", AgreeRow)) == 4
    for section in ("Token agreement", "Loss of prompts"):
        assert all(name in told(tmp_path / "results", section) for name in (NARROW, WIDE))


def test_dense_with_a_backend_is_dense_for_agree(tmbench, tmp_path):
    common = ("agree", "--length", "64", "--new-tokens", "2", "--samples", "1", "--device", "cpu")
    code, _, err = tmbench(*common, "--method", "streaming:n_local=8", "--method", "dense:dense_backend=torch")
    assert code == 0, err
    rows = read_all(tmp_path / "results", AgreeRow)
    assert [(row.method, row.parameters) for row in rows] == [
        ("dense", "dense_backend=torch"), ("streaming", "n_init=8 n_local=8")
    ]  # fmt: skip
    code, _, err = tmbench(*common, "--method", "dense:dense_backend=torch")
    assert code == 2
    assert "alone has nothing to agree with" in err


def test_a_table_of_lm_eval_has_a_column_for_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    about: dict[str, Any] = {
        "task": "t",
        "metric": "acc",
        "metric_filter": "none",
        "samples": 1,
        "output_type": "multiple_choice",
    }
    row = LmEvalRow(**made_rows.COMMON, **about, method="tri_mix", length=64, num_fewshot=0, harness="1")
    rows = [replace(row, parameters=f"n_local={window}", value=window / 100) for window in (32, 64)]
    lm_eval._show(rows)
    header, line = (text for text in capsys.readouterr().out.splitlines() if text.startswith(("task", "t ")))
    assert header.rstrip().endswith(f"{NARROW}   {WIDE}")
    assert line.split()[-2:] == ["0.3200", "0.6400"]
