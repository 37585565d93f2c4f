"""Agreement along dense's text: against free greedy decoding, over files that are kept, cut, and of another dense."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import under_plan
from bound_specs import Bound
from plans import plan_of
from tmbench.engine.prefill import EAGER
from tmbench.engine.session import Session
from tmbench.errors import UserError
from tmbench.measure import keeping
from tmbench.measure.agree import AgreeSpec
from tmbench.methods.plan import Plan
from tmbench.models.loading import LoadedModel
from tmbench.report.intervals import interval
from tmbench.report.report import build
from tmbench.report.writers import report_csv, report_json, report_markdown
from tmbench.results import environment
from tmbench.results.choices import Choices, kept_choices, read_choices
from tmbench.results.rows import AgreeRow
from tmbench.results.tables import read_all


@pytest.fixture
def job(make_model, tokenizer, tmp_path):
    def make(**changes):
        model = make_model("llama", vocab_size=len(tokenizer))
        loaded = LoadedModel("small", model, tokenizer, "random", "")
        plans = [plan_of(model, name, n_init=2, n_local=8) for name in ("dense", "streaming")]
        values = {
            "plans": plans, "lengths": (96,), "environment": environment.current(torch.device("cpu")),
            "root": tmp_path, "prompt": "random", "samples": 3, "new_tokens": 12,
        }  # fmt: skip
        return Bound(AgreeSpec, loaded, **(values | changes))

    return make


@pytest.fixture
def texts(monkeypatch):
    """Stands in for decoding: dense writes 1 to 12; another method agrees up to place 4, at place 4 not, and then again."""
    asked = []

    def answer(session, ids, count, text=None, context=0, over=None):
        asked.append((session.applied.plan.method, ids.tolist()))
        own = list(range(1, count + 1))
        return own if text is None else [token if place != 4 else 99 for place, token in enumerate(text)]

    monkeypatch.setattr(Session, "follow", answer)
    return asked


def rows_of(root):
    return {row.method: row for row in read_all(root, AgreeRow)}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "streaming", "tri_mix"])
def test_choices_are_greedy_decoding_up_to_the_first_that_differs(make_model, prompt, method):
    model, ids = make_model("llama"), prompt(60)
    model.generation_config.eos_token_id = None
    settings = {"starting_layer": 1, "n_init": 1, "n_local": 4, "last_n": 0}
    dense, plan = (plan_of(model, name, **settings) for name in ("dense", method))
    free = [under_plan.generate(model, one, ids, 24) for one in (dense, plan)]
    text = under_plan.follow(model, dense, ids, 24)
    assert text == free[0]
    chosen = under_plan.follow(model, plan, ids, 24, text)
    divergence = Choices(0, tuple(chosen), tuple(text), 0.0).divergence
    assert chosen[: divergence + 1] == free[1][: divergence + 1]
    assert divergence == 24 if method == "dense" else divergence < 24, "a window of four keys must change this model's text"


def test_choices_along_a_text_are_those_of_one_pass_over_all_of_it(make_model, prompt):
    model, ids = make_model("llama"), prompt(40)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "dense")
    text = prompt(10)[0].tolist()
    with torch.inference_mode():
        whole = model(torch.cat([ids, torch.tensor([text])], dim=1)).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
    assert under_plan.follow(model, plan, ids, 10, text) == whole.tolist()


@pytest.mark.parametrize("several", [False, True])
def test_end_tokens_are_never_chosen(make_model, prompt, several):
    model, ids = make_model("llama"), prompt(30)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "dense")
    end = under_plan.follow(model, plan, ids, 8)[0]
    model.generation_config.eos_token_id = [end, 5] if several else end
    chosen = under_plan.follow(model, plan, ids, 8)
    assert len(chosen) == 8
    assert end not in chosen


def test_agreement_and_divergence():
    for chosen, agreement, divergence in (((1, 2, 3, 4), 1.0, 4), ((9, 2, 3, 4), 0.75, 0), ((1, 2, 9, 9), 0.5, 2)):
        one = Choices(0, chosen, (1, 2, 3, 4), 0.0)
        assert (one.agreement, one.divergence) == (agreement, divergence)


def test_rows_and_their_files(job, texts):
    work = job()
    assert sum(step.work for step in work.steps()) == 2 * 3
    rows = rows_of(work.root)
    dense, other = rows["dense"], rows["streaming"]
    assert (dense.agreement, dense.divergence_median, dense.identical) == (1.0, 12, 1.0)
    assert (other.agreement, other.divergence_median, other.identical) == (11 / 12, 4, 0.0)
    prompts = {name: [ids for method, ids in texts if method == name] for name in ("dense", "streaming")}
    assert prompts["dense"] == prompts["streaming"]
    assert len({str(ids) for ids in prompts["dense"]}) == 3, "samples differ in their prompts"
    path = kept_choices(work.root, other).path
    assert path == work.root / other.device / "agree" / other.choices
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_run_goes_on_where_it_stopped_and_more_samples_only_add(job, texts):
    job(samples=2).run()
    assert len(texts) == 4
    job(samples=2).run()
    assert len(texts) == 4
    job(samples=3).run()
    assert len(texts) == 6
    work = job(samples=3)
    path = kept_choices(work.root, rows_of(work.root)["streaming"]).path
    path.write_text(path.read_text()[:-10])
    work.run()
    assert [method for method, _ in texts[6:]] == ["streaming"], "a line that was cut is measured again"
    job(samples=3, overwrite=True).run()
    assert len(texts) == 7 + 6
    assert len({row.key for row in read_all(work.root, AgreeRow)}) == 2


def test_an_overwrite_killed_before_its_row_leaves_no_older_agreement(job, texts, monkeypatch):
    """The last choice is kept, its row is not: the next run makes the row of the newer choices and asks nothing."""
    job().run()
    before = rows_of(job().root)["streaming"]
    monkeypatch.setattr(
        Session, "follow", lambda session, ids, count, text=None, context=0, over=None: list(text or range(1, count + 1))
    )
    real = keeping.append

    def append(root, row):
        if row.method != "dense":
            raise KeyboardInterrupt
        real(root, row)

    monkeypatch.setattr(keeping, "append", append)
    with pytest.raises(KeyboardInterrupt):
        job(overwrite=True).run()
    assert rows_of(job().root)["streaming"] == before
    monkeypatch.setattr(keeping, "append", real)
    monkeypatch.setattr(Session, "follow", None)
    job().run()
    after = rows_of(job().root)["streaming"]
    assert (before.agreement, after.agreement) == (11 / 12, 1.0)
    job().run()
    assert rows_of(job().root)["streaming"] == after


def test_choices_along_another_text_of_dense_are_measured_again(job, texts):
    work = job()
    work.run()
    dense, other = (kept_choices(work.root, rows_of(work.root)[name]).path for name in ("dense", "streaming"))
    entries = [json.loads(line) for line in dense.read_text().splitlines()]
    entries[1] |= {name: [7] * 12 for name in ("chosen", "reference")}
    dense.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    texts.clear()
    work.run()
    assert [method for method, _ in texts] == ["streaming"]
    assert read_choices(other)[1].reference == (7,) * 12


def test_what_dense_chose_along_another_text_is_no_text_to_follow(job, texts):
    dense, forced = (plan_of(job().loaded.model, "dense", dense_backend=name) for name in ("", "torch"))
    job(plans=[dense, forced]).run()
    (row,) = (one for one in read_all(job().root, AgreeRow) if one.parameters)
    assert (row.agreement, row.divergence_median) == (11 / 12, 4), "another backend is held against the first one's text"
    texts.clear()
    streaming = job().plans[1]
    job(plans=[forced, streaming]).run()
    assert [method for method, _ in texts] == ["dense"] * 3 + ["streaming"] * 3
    (row,) = (one for one in read_all(job().root, AgreeRow) if one.parameters and one.method == "dense")
    assert (row.agreement, row.divergence_median) == (1.0, 12)
    with pytest.raises(ValueError, match="the first plan must be dense, whose text"):
        job(plans=[forced, dense])


@pytest.mark.slow
def test_a_method_that_fails_is_a_row_and_so_are_those_that_dense_left_without_a_text(job, texts, monkeypatch):
    real = Session.follow

    def fail(session, ids, count, text=None, context=0, over=None):
        if session.applied.plan.method == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(session, ids, count, text, context, over)

    monkeypatch.setattr(Session, "follow", fail)
    failing = "streaming"
    work = job()
    work.run()
    assert {name: row.status for name, row in rows_of(work.root).items()} == {"dense": "ok", "streaming": "out_of_memory"}
    failing = "dense"
    work = job(root=work.root / "other")
    work.run()
    rows = rows_of(work.root)
    assert rows["dense"].status == "out_of_memory"
    assert (rows["streaming"].status, rows["streaming"].error) == ("failed", "dense wrote no text to follow")


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused(job):
    job(lengths=(16,)).check()
    work = job(lengths=(505,))
    # Random weights read any length; those of a checkpoint do not.
    work.loaded = replace(work.loaded, weights="checkpoint")
    with pytest.raises(UserError, match="--length 505 and --new-tokens 12 are more than the 512 .*a length of 500 or less"):
        work.check()


def test_the_first_plan_must_be_dense(job):
    with pytest.raises(ValueError, match="the first plan must be dense"):
        job(plans=job().plans[::-1])


@pytest.mark.parametrize("line", ['{"index": 0}', '{"index": 0, "chosen": [1], "reference": [1, 2], "seconds": 1}', "no"])
def test_a_file_that_is_not_ours_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl line 1 is not a sample's choices: move the file away"):
        read_choices(tmp_path / "x.jsonl")


def test_the_report_has_agreement_with_its_interval(job, texts, monkeypatch):
    agreements = iter([12, 12, 12, 3, 6, 12])
    monkeypatch.setattr(Session, "follow", lambda *_, **__: [1] * (n := next(agreements)) + [2] * (12 - n))
    work = job()
    work.run()
    report = build(work.root)
    (group,) = report.agree
    cell = next(cell for cell in group.cells if cell.row.method == "streaming")
    low, high = interval([np.array([0.25, 0.5, 1.0])], 0.0, 1.0)
    assert cell.row.agreement == pytest.approx(1.75 / 3)
    assert cell.ends == (low, high)
    assert 0.14 < low < 0.15, "three samples say little"
    line = next(line for line in report_markdown(report).splitlines() if line.startswith("| streaming"))
    cells = [cell.strip() for cell in line.split("|")][1:-1]
    ends = f"{low:.1%} to {high:.1%}"
    assert cells == ["streaming", "96", "58.3%", ends, "6", "3", "33%", "3"]
    assert "agreement_low" in report_csv(report)
    assert json.loads(report_json(report))[0]["rows"][1]["divergence_least"] == 3
    assert any(note.startswith("Only 3 samples") for note in group.notes())
    for path in work.root.glob("*/agree/choices/streaming/*"):
        path.unlink()
    (bare,) = build(work.root).agree
    assert any(note.startswith("No interval for streaming at 96") for note in bare.notes())


def test_more_samples_in_the_file_than_in_the_row_do_not_count(job, texts):
    job(samples=2).run()
    work = job(samples=2)
    path = kept_choices(work.root, rows_of(work.root)["streaming"]).path
    entry = json.loads(path.read_text().splitlines()[0]) | {"index": 2, "chosen": [0] * 12}
    path.write_text(path.read_text() + json.dumps(entry) + "\n")
    cells = {cell.label: cell for cell in build(work.root).agree[0].cells}
    assert len(cells["streaming"].choices) == 2


def test_choices_behind_another_prompt_are_made_again(job, texts):
    work = job()
    work.run()
    for path in work.root.glob("*/agree/choices/*/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[1]["prompt_hash"] = ""
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts.clear()
    assert sum(step.measured for step in work.steps()) == 2
    asked = work.spec.ids(work.loaded, 96, 1).tolist()
    assert texts == [("dense", asked), ("streaming", asked)]
    assert sum(step.measured for step in work.steps()) == 0


@pytest.mark.slow
def test_rows_name_the_backends_that_ran(job, monkeypatch):
    """Not those that would run for the nominal length, and none where attention was not reached."""
    monkeypatch.setattr(Plan, "backends", lambda plan, q, k, v: "dense:planned")
    work = job(samples=1)
    work.run()
    expected = {"dense": "dense:sdpa", "streaming": "triangle:torch-banded"}
    assert {name: row.backends for name, row in rows_of(work.root).items()} == expected
    for path in work.root.glob("*/agree/*.csv"):
        path.unlink()
    work.run()
    assert {name: row.backends for name, row in rows_of(work.root).items()} == expected, "from kept samples"
    other = job(samples=1, root=work.root / "failed")
    monkeypatch.setattr(Session, "read", lambda *_: (_ for _ in ()).throw(RuntimeError("before attention")))
    other.run()
    assert {(row.status, row.backends) for row in rows_of(other.root).values()} == {("failed", "")}


def test_every_method_reads_the_context_before_a_question_that_is_asked_later(job, monkeypatch):
    contexts = []

    def answer(session, ids, count, text=None, context=0, over=None):
        contexts.append((session.applied.plan.method, ids.shape[1] - context))
        return [3] * count

    monkeypatch.setattr(Session, "follow", answer)
    work = job(prompt="niah_multivalue", lengths=(1000,), samples=2, ask_later=True, prefill=EAGER)
    rows = work.run()
    assert [row.ask_later for row in rows] == [True, True]
    assert [method for method, _ in contexts] == ["dense"] * 2 + ["streaming"] * 2
    assert all(0 < question < 100 for _, question in contexts)
    with pytest.raises(UserError, match="prompts of kv do not say where their questions begin"):
        job(prompt="kv", lengths=(1000,), ask_later=True).run()
