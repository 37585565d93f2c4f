"""Layers chosen by measured losses: what is chosen, what it costs, how often it errs, and what is kept of it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from tmbench.errors import UserError
from tmbench.measure import tune
from tmbench.measure.executor import InProcess
from tmbench.measure.loop import run
from tmbench.measure.spec import ModelSource
from tmbench.measure.tune import Choice, Limits, TuneSpec
from tmbench.measure.tune_time import ROOFLINE, TTFT_ROWS, time_vs_dense
from tmbench.methods.layers import parse_layers, resolve
from tmbench.methods.table import METHODS
from tmbench.models.loading import LoadedModel
from tmbench.report.pictures import figures
from tmbench.report.report import build
from tmbench.report.writers import report_csv, report_json, report_markdown
from tmbench.results import environment
from tmbench.results.loss_samples import LossSample
from tmbench.results.rows import TtftRow, now
from tmbench.results.tables import append, csv_text, read_all
from tmbench.results.tune_rows import CHECK, COMPARISON, HELD_OUT, SEARCH, TuneRow

LAYERS = 8


class Losses:
    """Stands for the loss of a prompt: what each layer costs under a triangle, with noise."""

    def __init__(self, costs, noise=0.01, seed=0, dead_after=10**9):
        self.costs, self.noise, self.seed, self.dead_after = costs, noise, seed, dead_after
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, loaded, plan, prefill, question, ran):
        if len(self.asked) >= self.dead_after:
            raise KeyboardInterrupt
        layers = [number for number, pattern in plan.by_layer.items() if type(pattern).__name__ == "Triangle"]
        self.asked.append((tuple(layers), question.task, len(question.prompt), question.index))
        draw = random.Random(f"{self.seed} {layers} {question.index}")
        cost = self.costs(layers, draw) if callable(self.costs) else sum(self.costs.get(layer, 0.0) for layer in layers)
        lost = cost + draw.gauss(0, self.noise) * bool(layers)
        return LossSample(
            index=question.index, nll_prompt=1.0, nll_answer=0.5 + lost, nll_first=0.5, prompt_tokens=9, answer_tokens=1,
            source="random", backends="dense:sdpa", seconds=1.0, prompt_hash=question.prompt_hash,
            answer_hash=question.answer_hash,
        )  # fmt: skip


@pytest.fixture
def tuned(make_model, monkeypatch, tmp_path):
    """``tuned(losses, **fields)``: the rows of a run, its steps in ``tuned.steps``."""
    model = make_model("llama", num_hidden_layers=LAYERS)
    loaded = LoadedModel("small", model, None, "random", "")

    def tune_with(losses, **fields):
        monkeypatch.setattr(tune, "loss_sample", losses)
        about: dict[str, Any] = {
            "model": ModelSource.of(loaded), "environment": environment.current(torch.device("cpu")), "root": tmp_path,
            "method": "tri_mix", "values": {"n_init": 1, "n_local": 4, "last_n": 2}, "tasks": ("random",), "lengths": (24,),
            "limits": Limits(0.1, 0.5), "order": list(reversed(range(LAYERS))), "order_source": "depth", "budget": 400,
            "rules": (Choice("half the depth", (4, 5, 6, 7)),), "random": 3, "compared": 8,
        }  # fmt: skip
        spec = TuneSpec(**(about | fields))
        measure.steps, measure.spec = [], spec
        return run(spec, InProcess(loaded), measure.steps.append)

    measure: Any = tune_with
    measure.loaded = loaded
    return measure


def stage(rows, name):
    return [row for row in rows if row.stage == name]


def chosen(rows):
    return [row for row in stage(rows, CHECK) if row.chosen]


@pytest.mark.slow
def test_all_layers_but_those_that_cost_are_chosen_and_compared(tuned, tmp_path):
    losses = Losses({0: 1.0, 5: 0.4})
    rows = tuned(losses, held_lengths=(40,))
    (row,) = chosen(rows)
    assert row.settings["layers"] == "1-4,6-7"
    assert row.capped_vs_dense == pytest.approx(0, abs=0.02)
    assert row.capped_high_vs_dense < 0.1
    assert row.time_vs_dense < 0
    assert row.time_from == "roofline"
    refused = [one for one in stage(rows, SEARCH) if one.verdict == "refused"]
    assert all({0, 5} & set(parse_layers(one.settings["layers"], LAYERS)) for one in refused)
    assert refused
    compared = {one.rule: one for one in stage(rows, COMPARISON)}
    assert compared["chosen"].chosen
    assert compared["half the depth"].capped_vs_dense == pytest.approx(0.4, abs=0.02)
    assert sum(rule.startswith("random") for one in compared for rule in one.split("; ")) == 3
    assert {one.samples for one in compared.values()} == {8}
    held = stage(rows, HELD_OUT)
    assert [one.rule for one in held] == list(compared)
    assert {(one.lengths, one.task) for one in held} == {("40", "random")}
    assert {row.key: row for row in rows} == {row.key: row for row in read_all(tmp_path, TuneRow)}
    total = sum(step.part.total for step in tuned.steps if step.part is not None)
    assert sum(step.work for step in tuned.steps) == pytest.approx(total)


def test_no_stage_reads_prompts_of_another(tuned):
    tuned(Losses({}))
    spec, loaded = tuned.spec, tuned.loaded
    read = [draw for name in (SEARCH, CHECK, COMPARISON) for draw in spec.draws(name, loaded).first(300)]
    assert len(set(read)) == 900


def test_prompts_are_drawn_evenly_from_tasks_and_lengths_and_each_once(tuned):
    tuned(Losses({}), tasks=("random",), lengths=(24, 32, 48))
    draws = tuned.spec.draws(SEARCH, tuned.loaded).first(600)
    assert len(set(draws)) == 600
    for length in (24, 32, 48):
        own = [draw.index for draw in draws if draw.length == length]
        assert 150 < len(own) < 250
        assert own == [2 * place for place in range(len(own))]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_a_second_one_measures_nothing(tuned, tmp_path):
    costs = {0: 1.0, 5: 0.4}
    whole = Losses(costs, dead_after=57)
    with pytest.raises(KeyboardInterrupt):
        tuned(whole)
    assert len(whole.asked) == 57
    rest = Losses(costs)
    rows = tuned(rest)
    assert not set(rest.asked) & set(whole.asked)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = Losses(costs)
    assert tuned(again) == rows
    assert again.asked == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert sum(step.measured for step in tuned.steps) == 0


def test_a_set_at_the_margin_does_not_take_the_whole_budget(tuned):
    losses = Losses(lambda layers, draw: 0.1 * (len(layers) == LAYERS), noise=0.03)
    rows = stage(tuned(losses, budget=250, random=0, rules=()), SEARCH)
    assert rows[0].verdict == "undecided"
    assert rows[0].samples < 30
    assert any(row.verdict == "accepted" for row in rows[1:])


@pytest.mark.slow
def test_search_and_check_stay_within_their_budget(tuned):
    for budget, minutes in ((40, None), (97, None), (10_000, 2.0)):
        losses = Losses({0: 0.1}, noise=0.3)
        rows = tuned(losses, budget=budget, minutes=minutes, random=0, rules=(), seed=budget)
        spent = max(row.prefills for row in rows)
        assert 16 <= spent <= budget
        searched = max(row.prefills for row in stage(rows, SEARCH))
        assert searched <= 0.6 * budget
        if minutes is not None:
            assert max(row.measured_s for row in rows if row.stage in (SEARCH, CHECK)) <= 60 * minutes + 16


def test_where_every_layer_costs_nothing_is_chosen_or_compared(tuned, tmp_path):
    rows = tuned(Losses(dict.fromkeys(range(LAYERS), 1.0)))
    assert {row.stage for row in rows} == {SEARCH}
    assert not chosen(rows)
    (section,) = build(tmp_path).tunes
    assert "No set of layers was chosen: the search accepted none under this margin and budget." in section.notes()


@pytest.mark.slow
def test_a_set_that_loses_more_than_the_margin_is_chosen_as_seldom_as_asked(tuned):
    """Losses are rare and large, so that a search over few prompts finds sets which look good."""

    def rare(layers, draw):
        return 0.5 * (draw.random() < 0.22) if layers else 0.0

    wrong = erring = 0
    for seed in range(40):
        rows = tuned(
            Losses(rare, noise=0.0, seed=seed), seed=seed, limits=Limits(0.1, 0.5, 0.9), random=0, rules=(), budget=300
        )
        erring += any(row.verdict == "accepted" for row in stage(rows, SEARCH))
        wrong += bool(chosen(rows))
    assert erring >= 2, "the search errs, and the check does not"
    assert wrong <= 4


def test_a_method_that_is_dynamic_elsewhere_is_tried_without_a_triangle_first(tuned):
    rows = tuned(Losses({0: 1.0}), method="tri_mix_flexprefill", values={"n_local": 4})
    assert stage(rows, SEARCH)[0].settings["layers"] == f"{LAYERS}-"
    (row,) = chosen(rows)
    assert row.settings["layers"] == "1-"


@pytest.mark.slow
def test_memory_that_does_not_suffice_ends_the_search_and_is_a_row(tuned):
    class Full(Losses):
        def __call__(self, loaded, plan, prefill, question, ran):
            if len(self.asked) >= 20:
                raise MemoryError("no more")
            return super().__call__(loaded, plan, prefill, question, ran)

    rows = tuned(Full({}))
    assert [row.status for row in rows][-1] == "out_of_memory"
    assert rows[-1].error == "MemoryError: no more"
    assert not chosen(rows)
    assert len(chosen(tuned(Losses({})))) == 1, "and goes on where memory suffices"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"held_lengths": (24,)}, "--held-out-task random at 24 tokens is what the search reads"),
        ({"budget": 15}, "--budget-prefills 15 is less than one trial"),
        ({"minutes": 0.0}, "--budget-minutes must be above 0, not 0"),
        ({"tasks": ("deep",)}, "--task deep is unknown"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_measured(tuned, fields, words):
    losses = Losses({})
    with pytest.raises(UserError, match=words):
        tuned(losses, **fields)
    assert losses.asked == []


@pytest.mark.parametrize("limits", [(0.0, 1.0), (0.1, 0.1), (0.1, 1.0, 1.0), (float("nan"), 1.0), (0.1, float("inf"))])
def test_limits_that_no_test_keeps_are_refused(limits):
    with pytest.raises(UserError, match="--margin|--cap|--confidence"):
        Limits(*limits)


@pytest.mark.slow
def test_the_chosen_layers_are_a_file_that_layers_takes(tuned, tmp_path):
    rows = tuned(Losses({0: 1.0, 5: 0.4}))
    path = tmp_path / "tuned.csv"
    path.write_text(csv_text(TuneRow, chosen(rows)))
    shape = tuned.loaded.shape
    for file in (path, *tmp_path.glob("*/tune/tri_mix.csv")):
        found = resolve(str(file), shape, tmp_path)
        assert found.layers == (1, 2, 3, 4, 6, 7)
        assert found.source == "tune of tri_mix on random at 24, margin 0.1 nats, 95 % confidence"
        assert found.probed == 24
    other = type(shape)("other", LAYERS, 4)
    with pytest.raises(UserError, match="holds no choice for other: run tmbench tune --model other first"):
        resolve(str(path), other, tmp_path)


@pytest.mark.slow
def test_time_is_that_of_rows_where_the_very_set_was_timed_beside_dense(tuned, tmp_path):
    (row,) = chosen(tuned(Losses({0: 1.0})))
    known = tuned.spec.common(tuned.loaded)
    times = {"length": 24, "prompt": "random", "repeats": 1, "warmup": 1, "interleaved": "dense tri_mix", "time": now()}
    for method, seconds, parameters in (("dense", 2.0, ""), ("tri_mix", 1.5, row.parameters), ("tri_mix", 1.0, "layers=7-")):
        about = known | times | {"method": method, "parameters": parameters, "ttft_median_s": seconds, "prefill": "plain"}
        append(tmp_path, TtftRow(**about))
    losses = Losses({0: 1.0})
    rows = tuned(losses)
    assert losses.asked == []
    (again,) = chosen(rows)
    assert (row.time_from, again.time_from) == ("roofline", "ttft rows")
    assert again.time_vs_dense == pytest.approx(-0.25)
    assert {one.time_from for one in stage(rows, COMPARISON)} == {"roofline"}, "of the others no time was measured"


def test_a_time_counts_beside_dense_of_the_same_rounds_alone(tuned):
    loaded = tuned.loaded
    plan = METHODS["tri_mix"].plan(loaded.shape)
    about: dict[str, Any] = {
        **environment.current(loaded.device).row_fields(),
        **loaded.row_fields(),
        "seed": 42,
        "prompt": "random",
    }
    about |= {"length": 24, "repeats": 1, "warmup": 1, "interleaved": "dense tri_mix", "time": now()}
    own = TtftRow(**about | plan.row_fields(), ttft_median_s=1.5, matrix_rate_flops=1e11)
    dense = TtftRow(**about, method="dense", ttft_median_s=2.0, matrix_rate_flops=1e11)
    assert time_vs_dense(loaded, plan, [24], [dense, own]) == (-0.25, TTFT_ROWS)
    # Of another run, in which tri_mix had other parameters.
    later = replace(dense, matrix_rate_flops=2e11)
    assert time_vs_dense(loaded, plan, [24], [later, own])[1] == ROOFLINE


@pytest.mark.slow
def test_the_report_says_whether_more_is_saved_at_the_same_loss(tuned, tmp_path):
    tuned(Losses({0: 1.0, 5: 0.4}), held_lengths=(40,))
    report = build(tmp_path)
    text = report_markdown(report)
    assert "Chosen: layers 1-4,6-7. With 95 % confidence the mean capped difference" in text
    assert "On random at 40, which was held out, over the same 8 prompts the chosen set stays within the margin" in text
    assert [name for name in figures(report) if name.startswith("tune-")]
    assert '"chosen": "1-4,6-7"' in report_json(report)
    assert "capped_vs_dense" in report_csv(report)
    (section,) = report.tunes
    assert any("It saves more than any of them at that loss" in words for words in section.conclusions())


@pytest.mark.slow
def test_the_report_says_so_where_a_rule_saves_as_much(tuned, tmp_path):
    costs = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}
    tuned(Losses(costs), rules=(Choice("half the depth", (4, 5, 6, 7)), Choice("probe, depth", (5, 6, 7))))
    (section,) = build(tmp_path).tunes
    assert section.chosen is not None
    assert section.chosen.layers == "4-"
    own = section.stage(COMPARISON)[0]
    assert own.row.rule.startswith("chosen; half the depth")
    words = " ".join(section.conclusions())
    assert "The same layers are those of: half the depth; the deepest 4." in words
    assert "At that loss it saves more than the fastest of them, probe, depth (layers 5-)" in words
