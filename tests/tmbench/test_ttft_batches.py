"""TTFT of batches: all figures are of all prompts, each prompt is read as it is alone, and batch sizes are never mixed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from bound_specs import timed
from plans import plan_of
from report_rows import add_ruler, add_ttft
from tmbench.engine import roofline
from tmbench.engine.attention import applied_plan
from tmbench.engine.first_token import first_token
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN, prepared, tensors_of
from tmbench.errors import UserError
from tmbench.measure import ttft
from tmbench.measure.outlook import outlook
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.report.pictures import figures
from tmbench.report.records import records
from tmbench.report.report import build
from tmbench.report.writers import report_csv, report_markdown
from tmbench.results.rows import TtftRow
from tmbench.results.tables import read_all
from tmbench.suites.prompts import batch_ids, prompt_ids
from tmbench_kernels import Backend, Triangle
from tmbench_kernels.sdpa import sdpa

RATE = 1e11
SETTINGS = {"n_init": 2, "n_local": 16, "last_n": 8, "min_budget": 200, "threshold": 0.2, "alpha": 0.95}


@pytest.fixture
def loaded(make_model, monkeypatch):
    monkeypatch.setattr(roofline, "gemm_throughput", lambda device, dtype, prefill_s=0.0: RATE)
    return LoadedModel("small", make_model("llama", max_position_embeddings=2048), None, "random", "")


@pytest.fixture
def job(loaded, tmp_path):
    def make(names=("dense", "streaming"), **changes):
        return timed(loaded, names, tmp_path, SETTINGS, **({"lengths": (96,), "batch_sizes": (3, 1)} | changes))

    return make


def rows_of(root):
    return {(row.method, row.batch_size): row for row in read_all(root, TtftRow)}


@pytest.fixture
def budgets(tmp_path):
    """Small vertical-slash budgets, of which a part is chosen by the data."""
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps([{str(head): ["vertical_and_slash", 60, 160, 1.0] for head in range(4)}] * 4))
    return path


LONG = 1200
"""Ten blocks of keys: FlashPrefill always keeps eight."""
METHODS = ("dense", "tri_mix", "streaming", "minference", "flexprefill", "xattention", "flashprefill", "tri_mix_minference")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind"),
    [*product(METHODS, (PLAIN, EAGER)), *product(("tri_mix", "minference"), (COMPILED,))],
)
def test_each_prompt_of_a_batch_is_read_as_it_is_alone(method, kind, loaded, budgets, short_chunks, graphs):
    model, ids = loaded.model, batch_ids("random", LONG, loaded, 42, 3)
    plan = plan_of(model, method, patterns=budgets, **SETTINGS)

    def read(prompts):
        with applied_plan(model, plan) as session, prepared(model, session, kind) as prefill:
            found = first_token(prefill, prompts)
            session.check_complete()
            return found, tensors_of(prefill.cache)

    together, cache = read(ids)
    assert together.logits.shape == (3, 97)
    for number in range(3):
        alone, own = read(ids[number : number + 1])
        torch.testing.assert_close(together.logits[number : number + 1], alone.logits, rtol=1e-4, atol=1e-4)
        assert together.tokens[number : number + 1] == alone.tokens
        for kept, expected in zip(cache, own, strict=True):
            torch.testing.assert_close(kept[number : number + 1], expected, rtol=1e-4, atol=1e-4)


def test_the_mlp_sees_no_more_than_a_chunk_of_all_prompts(loaded, short_chunks):
    seen = []
    loaded.model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    plan = plan_of(loaded.model, "dense")
    with applied_plan(loaded.model, plan) as session, prepared(loaded.model, session, EAGER) as prefill:
        first_token(prefill, batch_ids("random", 10, loaded, 42, 4))
    assert seen == [(1, 14), (1, 14), (1, 12)], "as a prompt of 40 tokens"


def test_the_prompts_of_a_batch_differ_and_the_first_is_that_of_one(loaded):
    ids = batch_ids("random", 64, loaded, 42, 4)
    assert ids.shape == (4, 64)
    assert ids[:1].equal(prompt_ids("random", 64, loaded, 42))
    assert ids[2:3].equal(prompt_ids("random", 64, loaded, 44))
    with pytest.raises(UserError, match="--batch-size 98 takes as many different prompts, .* --length 1: give a longer one"):
        batch_ids("random", 1, loaded, 42, 98)


@pytest.mark.slow
def test_rows_of_a_batch_count_all_of_its_prompts(job, tmp_path):
    work = job(names=("dense", "tri_mix", "streaming"))
    steps = work.steps()
    (total,) = (step.part.total for step in steps if step.part is not None)
    assert sum(step.work for step in steps) == pytest.approx(total), "the progress bar must end where it says"
    rows = rows_of(tmp_path)
    assert len(rows) == 6
    assert len({row.key for row in rows.values()}) == 6, "batch sizes are different measurements"
    for method in ("dense", "tri_mix", "streaming"):
        one, three = rows[method, 1], rows[method, 3]
        assert three.flop == pytest.approx(3 * one.flop)
        assert three.floor_s == pytest.approx(3 * one.flop / RATE)
        assert three.coverage == pytest.approx(one.coverage)
        assert three.tokens_per_second == pytest.approx(3 * 96 / three.ttft_median_s)
        assert three.first_token == one.first_token, "that of the first prompt"
        assert three.interleaved == "dense tri_mix streaming"
        assert three.matrix_rate_flops == RATE
    ids = batch_ids("random", 96, work.loaded, 42, 3)
    assert rows["dense", 3].prompt_hash == of_ids(ids.flatten().tolist())
    assert rows["dense", 1].prompt_hash == of_ids(ids[0].tolist())
    assert [work.pending(work.loaded, size) for size in (1, 3)] == [{}, {}]
    assert set(work.pending(work.loaded, 2)) == {96}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minference", "flexprefill", "xattention", "flashprefill"])
def test_the_density_of_a_batch_is_that_of_all_its_prompts(method, job, loaded, budgets, tmp_path):
    plan = plan_of(loaded.model, method, patterns=budgets, **(SETTINGS | {"min_budget": 128}))
    counted = []

    def look(layer, pattern, q, k, scale):
        counted.append(int(pattern.mask(q, k, scale=scale).sum()))

    for ids in batch_ids("random", LONG, loaded, 42, 3).split(1):
        with torch.inference_mode(), applied_plan(loaded.model, plan) as session:
            session.observer = look
            loaded.model(ids)
    job(plans=[plan], lengths=(LONG,), batch_sizes=(3,), repeats=1).run()
    (row,) = rows_of(tmp_path).values()
    assert row.coverage == pytest.approx(sum(counted) / (3 * 4 * 4 * LONG * (LONG + 1) / 2))
    per_prompt = [sum(counted[number * 4 : number * 4 + 4]) for number in range(3)]
    assert len(set(per_prompt)) > 1, "the prompts' own densities differ, so one alone would show"
    needed = sum(sum(counted[number * 4 : number * 4 + 3]) for number in range(3)) + 3 * 4 * LONG
    assert row.flop == pytest.approx(3 * roofline.linear_flop(loaded.model, LONG) + 4 * 16 * needed)


def test_fidelity_is_that_of_all_prompts(job, monkeypatch, tmp_path):
    """The first prompts agree in everything, the last one in nothing."""
    real = ttft.first_token
    logits = torch.zeros(3, 97)
    logits[:, 7] = 2.0
    other = logits.clone()
    other[2, 7], other[2, 8] = 0.0, 2.0

    def first(prefill, ids):
        own = (logits if prefill.session.plan.method == "dense" else other)[: len(ids)]
        return replace(real(prefill, ids), logits=own, tokens=tuple(own.argmax(-1).tolist()))

    monkeypatch.setattr(ttft, "first_token", first)
    job().run()
    rows = rows_of(tmp_path)
    assert rows["dense", 3].same_token_as_dense
    assert rows["streaming", 3].same_token_as_dense is False, "one of three differs"
    assert rows["streaming", 3].first_token == 7
    assert rows["streaming", 3].logit_error == pytest.approx((8 / 12) ** 0.5), "over the logits of all three"
    assert (rows["streaming", 1].same_token_as_dense, rows["streaming", 1].logit_error) == (True, 0)


@pytest.mark.slow
def test_a_backend_that_refuses_batches_is_a_failure_with_its_reason(job, monkeypatch, tmp_path):
    def refuses(pattern, q, k, v):
        return "serves one prompt at a time" if q.shape[0] > 1 else ""

    def attend(pattern, q, k, v, scale):
        return sdpa(q, k, v, scale)

    monkeypatch.setattr(Triangle, "backends", (Backend("single", ("cpu",), attend, refuses=refuses),))
    job().run()
    rows = rows_of(tmp_path)
    assert rows["streaming", 1].status == rows["dense", 3].status == "ok"
    assert rows["streaming", 3].status == "failed"
    assert rows["streaming", 3].error.endswith("serves these tensors: single serves one prompt at a time")


@pytest.mark.slow
def test_memory_that_does_not_suffice_for_a_batch_is_a_row(job, monkeypatch, tmp_path):
    real = ttft.first_token

    def first(prefill, ids):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(prefill, ids)

    monkeypatch.setattr(ttft, "first_token", first)
    job().run()
    assert {about: row.status for about, row in rows_of(tmp_path).items()} == {
        ("dense", 1): "ok",
        ("streaming", 1): "ok",
        ("dense", 3): "out_of_memory",
        ("streaming", 3): "out_of_memory",
    }
    assert job().pending(job().loaded, 3) == {}, "it is not tried again"


@pytest.mark.slow
def test_a_plan_is_by_batch_size(job, loaded):
    work = job(names=("dense",), batch_sizes=(1, 3))
    whole = outlook(work.spec, loaded).lines
    assert [(line.batch_size, line.left, line.bases) for line in whole] == [
        (1, 3, ("the roofline",)),
        (3, 3, ("the roofline",)),
    ]
    assert whole[1].seconds == pytest.approx(3 * whole[0].seconds)
    job(names=("dense",), batch_sizes=(3,)).run()
    (row,) = rows_of(work.root).values()
    one, three = outlook(work.spec, loaded).lines
    assert (three.left, one.left) == (0, 3)
    assert one.bases == ("rows at 3 x 96",)
    assert one.seconds == pytest.approx(3 * row.ttft_median_s / 3)
    job(names=("dense",), batch_sizes=(1,)).run()
    (again,) = outlook(replace(work.spec, seed=7, batch_sizes=(1,)), loaded).lines
    assert again.bases == ("rows",)
    assert again.seconds == pytest.approx(3 * rows_of(work.root)["dense", 1].ttft_median_s)


def test_a_report_never_holds_batch_sizes_against_each_other(tmp_path):
    for length in (2048, 4096):
        add_ttft(tmp_path, "dense", length, 1.0)
        add_ttft(tmp_path, "tri_mix", length, 3.0, batch_size=4)
        add_ttft(tmp_path, "tri_mix", length, 6.0, batch_size=16)
    report = build(tmp_path)
    assert [section.setting.batch_size for section in report.ttft] == [1, 4, 16]
    assert [section.labels for section in report.ttft] == [["dense"], ["tri_mix"], ["tri_mix"]]
    assert all(cell.percent_vs_dense is None for section in report.ttft for cell in section.cells)
    assert report.ttft[1].break_even("tri_mix") == (None, "not compared: at no length have both a time")
    markdown = report_markdown(report)
    assert "prompt kv, batches of 4, plain prefill, 2 CPU threads, seed 42\n" in markdown
    assert "prompt kv, plain prefill, 2 CPU threads, seed 42\n" in markdown
    assert "Dense has no time here" in markdown


def test_a_report_says_tokens_per_second_where_a_batch_is_above_one(tmp_path):
    for size in (1, 4):
        add_ttft(tmp_path, "dense", 2048, 1.0, batch_size=size)
        add_ttft(tmp_path, "tri_mix", 2048, 0.5, batch_size=size)
    one, four = build(tmp_path).ttft
    details = [section.tables()[-1] for section in (one, four)]
    assert [[column.name for column in table.columns].count("tokens/s") for table in details] == [0, 1]
    place = [column.name for column in details[1].columns].index("tokens/s")
    assert [row[place] for row in details[1].rows] == ["8,192", "16,384"]
    assert [record["tokens_per_second"] for record in records(four)] == [8192, 16384]
    assert [record["tokens_per_second"] for record in records(one)] == [None, None]
    assert [record["batch_size"] for record in records(four)] == [4, 4]
    assert [line for line in report_csv(build(tmp_path)).splitlines() if ",tokens_per_second," in line] != []


def test_pictures_and_trade_offs_of_batches_have_names_of_their_own(tmp_path):
    before = tmp_path / "before"
    for root, sizes in ((before, (1,)), (tmp_path / "both", (1, 4))):
        for method, seconds, score in (("dense", 1.0, 90.0), ("tri_mix", 0.5, 80.0)):
            for size in sizes:
                add_ttft(root, method, 4096, size * seconds, batch_size=size)
            folder = root / "some-gpu" / "ruler"
            folder.mkdir(parents=True, exist_ok=True)
            lines = [{"index": n, "score": score / 100, "outputs": ["a"]} for n in range(30)]
            (folder / f"{method}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            add_ruler(root, method, "vt", score, samples=30, predictions=f"{method}.jsonl")
    alone, both = build(before), build(tmp_path / "both")
    assert [one.setting.batch_size for one in both.trade_offs] == [1, 4]
    assert [one.title.count("batches of 4, ") for one in both.trade_offs] == [0, 1]
    names = list(figures(both))
    assert len(names) == 2 * 3 + 1
    assert set(figures(alone)) < set(names), "one prompt's keep theirs"


FAST = ("ttft", "--device", "cpu", "--length", "256", "--repeats", "1", "--method", "dense", "--method", "tri_mix")


@pytest.mark.slow
def test_batches_on_the_command_line(tmbench):
    sizes = ("--batch-size", "2", "--batch-size", "1")
    code, out, err = tmbench(*FAST, *sizes, "--plan")
    assert code == 0, err
    assert "2 x 256" in out
    code, out, err = tmbench(*FAST, *sizes)
    assert code == 0, err
    one, two = out.split("Time to first token of 2 x 256 tokens")
    assert "Time to first token of 256 tokens" in one
    assert ("tokens/s" in one, "tokens/s" in two) == (False, True)
    rows = read_all(Path("results"), TtftRow)
    assert [(row.method, row.batch_size, row.status) for row in rows] == [
        (method, size, "ok") for method in ("dense", "tri_mix") for size in (1, 2)
    ]
    code, out, _ = tmbench(*FAST, *sizes, "--plan")
    assert "Nothing is to be measured" in out


@pytest.mark.parametrize("size", ["0", "-1", "1025", "many"])
def test_a_batch_size_that_is_none_is_refused(tmbench, size):
    code, out, err = tmbench(*FAST, "--batch-size", size)
    assert (code, out) == (2, "")
    assert "--batch-size" in err
    assert err.count("Error") == 1
    assert not Path("results").exists()


def test_prompts_too_short_to_differ_are_refused_before_anything_is_measured(tmbench):
    code, _, err = tmbench(*FAST, "--length", "2", "--batch-size", "1", "--batch-size", "2")
    assert code == 2
    assert "--batch-size 2 takes as many different prompts, and those of --prompt kv are alike at --length 2" in err
    assert not list(Path().glob("results/*/ttft/*.csv"))
