"""Lists of layers, proposals whose answer is known, and the files that --layers reads."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plans import plan_of
from tmbench.cli.attention import Attention
from tmbench.errors import UserError
from tmbench.methods import layers as layers_module
from tmbench.methods.layers import ACCURACY_BUDGET, Budget, Proposal, chosen_layers, layers_text, parse_layers, propose
from tmbench.methods.plan import HALF, DeepLayers, ModelShape, default_layers
from tmbench.methods.table import METHODS
from tmbench.results.rows import ProbeRow
from tmbench.results.tables import append
from tmbench_kernels import Dense, Triangle

PUBLISHED = [
    0.32, 0.54, 0.89, 0.29, 0.73, 0.82, 0.74, 0.94, 1.20, 0.77, 0.93, 1.08, 0.50, 1.18, 0.41, 0.35,
    0.19, 0.13, 0.08, 0.14, 0.08, 0.04, 0.04, 0.04, 0.03, 0.03, 0.05, 0.06, 0.03, 0.03, 0.02, 0.00,
]  # fmt: skip
"""Read off the figure that MInference's repository has of TriangleMix's gradients (drop.jpg), in 1e-5, to 0.03."""
ROW = ProbeRow(
    time="2026-01-01T00:00:00+00:00", device="some-gpu", method="dense", model="a/model", weights="checkpoint",
    dtype="bfloat16", length=4096, seed=42, threads=2, device_name="Some GPU", tmbench="0.1.0", python="3.12",
    torch="2.13.0", transformers="5.24.0", environment="abc", task="vt", samples=4, wording_hash="", source="noise",
    proposal="rank, accuracy budget 0.1, logits",
)  # fmt: skip


def resolve(text, model, count, root):
    """(layers, source) of a text."""
    return layers_module.resolve(text, ModelShape(model, count, 4), root)[:2]


@given(st.sets(st.integers(0, 40)))
def test_a_list_of_layers_is_what_its_text_says(layers):
    assert parse_layers(layers_text(layers, 41), 41) == tuple(sorted(layers))


def test_texts_of_layers():
    assert layers_text([35, 5, 7, 10, *range(15, 35)], 40) == "5,7,10,15-35"
    assert [layers_text(layers, 8) for layers in ([], [6], [1, 2], [7], [5, 6, 7], range(8))] == [
        "8-", "6", "1-2", "7-", "5-", "0-",
    ]  # fmt: skip
    assert parse_layers(" 5, 7 ,2-3", 8) == (2, 3, 5, 7)
    assert parse_layers("6-", 8) == parse_layers("6-7", 8) == parse_layers("6,7", 8) == (6, 7)
    assert parse_layers("6", 8) == (6,)
    assert parse_layers("1,6-", 8) == (1, 6, 7)
    assert parse_layers("8-", 8) == parse_layers("none", 8) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5,,7", "5,,7 is neither a list of layers, such as 16- or 5,7,10-15, nor auto nor a file"),
        ("deep", "deep is neither a list"),
        ("9-", "9- is not within the layers 0 to 7"),
        ("8", "8 is not within the layers 0 to 7"),
        ("-3", "-3 is neither a list"),
        ("1,7-9", "7-9 is not within the layers 0 to 7"),
        ("5-3", "5-3 is not within"),
    ],
)
def test_what_is_no_list_is_refused(text, words):
    with pytest.raises(UserError, match=f"--layers {text}.*{words}|--layers {words}"):
        parse_layers(text, 8)


def test_a_list_is_no_file_however_long_it_is(tmp_path, monkeypatch):
    every_other = tuple(range(0, 252, 2))
    assert len(layers_text(every_other, 252)) > 255, "no name of a file is as long"
    assert resolve(layers_text(every_other, 252), "a/model", 252, tmp_path) == (every_other, "given")
    with pytest.raises(UserError, match="x is neither a list"):
        resolve(layers_text(every_other, 252) + ",x", "a/model", 252, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "5,7").write_text("")
    assert resolve("5,7", "a/model", 8, tmp_path) == ((5, 7), "given")


@pytest.mark.parametrize("rule", ["rank", "depth"])
def test_the_default_budget_gives_the_published_cut_for_the_published_gradients(rule):
    found = propose(PUBLISHED, 0.1, Budget(ACCURACY_BUDGET), rule)
    assert found.layers == tuple(range(16, 32))
    assert found.lost == pytest.approx(0.99 / 12.68)
    assert found.pairs == pytest.approx(0.55)


def test_rank_and_depth_differ_where_a_deep_layer_matters():
    middle = [5.0, 0.0, 3.0, 0.0, 2.0, 0.0]
    assert propose(middle, 0.2, Budget(0.0), "rank").layers == (1, 3, 5)
    assert propose(middle, 0.2, Budget(0.0), "depth").layers == (5,)
    assert propose(middle, 0.2, Budget(0.2), "rank").layers == (1, 3, 4, 5)
    assert propose(middle, 0.2, Budget(1.0), "depth").layers == tuple(range(6))
    assert propose([1.0, 2.0], 0.2, Budget(0.1), "rank").layers == ()


def test_a_time_budget_takes_as_few_layers_as_it_needs():
    middle = [5.0, 1.0, 3.0, 0.0]
    for share, layers in ((1.0, ()), (0.99, (3,)), (0.8, (3,)), (0.79, (1, 3)), (0.4, (1, 2, 3)), (0.2, (0, 1, 2, 3))):
        found = propose(middle, 0.2, Budget(time=share), "rank")
        assert found.layers == layers
        assert found.pairs <= share + 1e-9
    assert propose(middle, 0.2, Budget(time=0.6), "depth").layers == (2, 3)
    with pytest.raises(UserError, match="--time-budget 0.19 is less than the 0.2 that triangle attention in all 4 layers"):
        propose(middle, 0.2, Budget(time=0.19), "rank")


@example(middle=[5e-324], share=0.75, kept=0.5)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=12).filter(any), st.floats(0, 1), st.floats(0.1, 0.9))
def test_no_subset_of_a_proposals_size_loses_less_than_by_rank(middle, share, kept):
    budget = Budget(share)
    rank, depth = (propose(middle, kept, budget, rule) for rule in ("rank", "depth"))
    assert rank.lost <= share + 1e-9
    assert depth.lost <= share + 1e-9
    assert len(rank.layers) >= len(depth.layers)
    assert rank.lost == pytest.approx(sum(sorted(middle)[: len(rank.layers)]) / sum(middle))
    assert depth.layers == tuple(range(len(middle) - len(depth.layers), len(middle)))


@pytest.mark.parametrize("middle", [[float("nan"), 1.0], [-1.0, 2.0], [float("inf"), 1.0]])
def test_gradients_that_say_nothing_propose_nothing(middle):
    with pytest.raises(ValueError, match="finite and not negative"):
        propose(middle, 0.2, Budget(0.1), "rank")


@pytest.mark.parametrize("rule", ["rank", "depth"])
def test_middles_without_any_gradient_lose_nothing(rule):
    assert propose([0.0, 0.0], 0.2, Budget(0.0), rule) == Proposal((0, 1), 0.0, 0.2)
    assert propose([0.0, 0.0], 0.2, Budget(time=0.6), rule) == Proposal((1,), 0.0, 0.6)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ((0.1, 0.5), "--accuracy-budget and --time-budget exclude each other"),
        ((-0.1, None), "--accuracy-budget is a share, from 0 to 1, not -0.1"),
        ((None, 1.5), "--time-budget is a share, from 0 to 1, not 1.5"),
        ((float("nan"), None), "--accuracy-budget is a share"),
    ],
)
def test_budgets_are_shares(budget, words):
    with pytest.raises(UserError, match=words):
        Budget(*budget)


def store(root, layers, count=8, **changes):
    row = replace(ROW, **changes)
    heads = [replace(row, layer=layer, head=0, proposal="") for layer in range(count)]
    return append(root, *(replace(row, layer=layer, triangle=layer in layers) for layer in range(count)), *heads)


def test_auto_takes_the_newest_probe_of_the_model(tmp_path):
    store(tmp_path, {1, 5})
    path = store(tmp_path, {2, 3}, time="2026-01-02T00:00:00+00:00", length=8192)
    assert resolve("auto", "a/model", 8, tmp_path) == ((2, 3), "probe of vt at 8192, rank, accuracy budget 0.1, logits")
    store(tmp_path, {7}, model="other/model", time="2026-01-03T00:00:00+00:00")
    assert resolve("auto", "a/model", 8, tmp_path)[0] == (2, 3)
    assert resolve(str(path), "other/model", 8, tmp_path / "elsewhere")[0] == (7,)
    store(tmp_path, {1, 5, 6}, device="a-cpu", time="2026-01-03T00:00:00+00:00")
    assert resolve("auto", "a/model", 8, tmp_path)[0] == (1, 5, 6)
    # The same probe again, under another budget and within the second.
    store(tmp_path, set(), device="a-cpu", time="2026-01-03T00:00:00+00:00", proposal="depth, accuracy budget 0, logits")
    assert resolve("auto", "a/model", 8, tmp_path)[0] == ()


def test_what_holds_no_proposal_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(
        UserError, match="--layers auto finds no probe of a/model under .*: run tmbench probe --model a/model"
    ):
        resolve("auto", "a/model", 8, tmp_path)
    path = store(tmp_path, {1})
    with pytest.raises(UserError, match="dense.csv holds no probe of b/model: run tmbench probe --model b/model first"):
        resolve(str(path), "b/model", 8, tmp_path)
    with pytest.raises(UserError, match="is of 8 layers, but the model has 9"):
        resolve("auto", "a/model", 9, tmp_path)
    with pytest.raises(UserError, match="none.csv cannot be read: No such file"):
        resolve(str(tmp_path / "none.csv"), "a/model", 8, tmp_path)
    store(tmp_path, {1}, model="b/model", status="out_of_memory")
    with pytest.raises(UserError, match="finds no probe of b/model"):
        resolve("auto", "b/model", 8, tmp_path)


SHAPE = ModelShape("a/model", layers=8, heads=4)


def plan(**given):
    return plan_of(SHAPE, "tri_mix", **given)


def test_a_plan_has_the_deep_pattern_in_exactly_these_layers():
    made = plan(layers="1,5-6")
    assert [type(pattern) for pattern in made.patterns] == [
        Triangle if layer in (1, 5, 6) else Dense for layer in range(8)
    ]  # fmt: skip
    assert made.parameters == {"layers": "1,5-6", "n_init": 8, "n_local": 512, "last_n": 128}
    assert made.layers_source == "given"
    mixed = plan_of(SHAPE, "tri_mix_minference", layers="0-2")
    assert [pattern.name for pattern in mixed.patterns] == ["triangle"] * 3 + ["vertical_slash"] * 5


def test_the_same_layers_are_the_same_measurement():
    assert plan(layers="5-7") == plan(starting_layer=5)
    assert plan(layers="none") == plan(starting_layer=8)
    assert plan(layers="0-7") == plan(starting_layer=0)
    assert plan(layers="7-7") == plan(layers="7") == plan(starting_layer=7)
    for start in (0, 5, 8):
        assert plan(layers=f"{start}-") == plan(starting_layer=start) == plan(starting_layer=str(start))
    assert plan(layers="5").parameters["layers"] == "5"


def test_a_plan_names_the_probe_that_it_follows(tmp_path):
    store(tmp_path, {1, 5})
    chosen = chosen_layers(SHAPE, "auto", root=tmp_path)
    made = METHODS["tri_mix"].plan(SHAPE, layers=chosen)
    assert made.parameters["layers"] == "1,5"
    assert made.layers_source == "probe of vt at 4096, rank, accuracy budget 0.1, logits"
    assert chosen is not None
    assert chosen.probed == 4096


def test_a_plan_reads_no_files(tmp_path, monkeypatch):
    """Layers are chosen before: a plan of them is the same wherever it is made."""
    store(tmp_path, {1, 5})
    chosen = chosen_layers(SHAPE, "auto", root=tmp_path)
    monkeypatch.setattr(builtins, "open", None)
    monkeypatch.setattr(Path, "read_bytes", None)
    for method in METHODS.values():
        method.plan(SHAPE, layers=chosen if method.deep else None)


@pytest.mark.parametrize("layers", [4, [4, 5], Path("tuned.csv")])
def test_layers_that_are_no_text_are_refused(layers):
    with pytest.raises(UserError, match='--layers must be a text, such as "16-" or "5,7,10-15", not '):
        chosen_layers(SHAPE, layers)


def test_one_choice_of_layers_is_enough():
    with pytest.raises(UserError, match="--starting-layer 3 and --layers 2,5 both say where .*: give one"):
        plan(starting_layer=3, layers="2,5")
    for text in ("auto", "5,7", "16-", ""):
        with pytest.raises(UserError, match=f"--starting-layer {text} is not the number of a layer: --layers takes other"):
            plan(starting_layer=text)


def test_layers_drawn_at_random(tmp_path):
    drawn = resolve("random:4", "tiny", 8, tmp_path)
    assert drawn == resolve("random:4:0", "tiny", 8, tmp_path)
    assert drawn[1] == "random"
    assert len(set(drawn[0])) == 4
    assert set(drawn[0]) <= set(range(8))
    assert len({resolve(f"random:4:{seed}", "tiny", 8, tmp_path)[0] for seed in range(9)}) > 3
    assert resolve("random:8", "tiny", 8, tmp_path)[0] == tuple(range(8))
    for text, words in (("random:9", "asks for 9 of 8"), ("random:", "must say how many"), ("random:4:x", "must say how")):
        with pytest.raises(UserError, match=words):
            resolve(text, "tiny", 8, tmp_path)


@pytest.fixture
def loaded():
    """What a choice of layers asks of a model."""
    return SimpleNamespace(shape=SHAPE, name=SHAPE.name)


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("length", "far"), [(2048, False), (8192, False), (2047, True), (8193, True)])
def test_a_probe_of_another_length_is_said_aloud(tmp_path, capsys, loaded, length, far):
    store(tmp_path, {1, 5})
    (chosen,) = Attention(layers=("auto",)).deep_layers(loaded, [4096, length], tmp_path)
    assert chosen == ((1, 5), "probe of vt at 4096, rank, accuracy budget 0.1, logits", 4096)
    words = said(capsys)
    assert "triangle attention in layers 1,5, by the probe of vt at 4096, rank, accuracy budget 0.1, logits" in words
    assert (f"that probe is of 4096 tokens, and this run of {length}: other layers may matter there" in words) == far


def test_a_number_alone_is_one_layer_and_said_to_be(tmp_path, capsys, loaded):
    assert Attention(layers=("5",)).deep_layers(loaded, [4096], tmp_path) == [((5,), "given", None)]
    assert "--layers 5 is layer 5 alone; 5- is all from there on" in said(capsys)
    for clear in (Attention(layers=("5-",)), Attention(layers=("5-7",)), Attention(starting_layer=("5",))):
        assert clear.deep_layers(loaded, [4096], tmp_path) == [((5, 6, 7), "given", None)]
    assert Attention(layers=("5,6,7", "5-", "2")).deep_layers(loaded, [4096], tmp_path)[1:] == [((2,), "given", None)]
    assert said(capsys).count("is all from there on") == 1


HYBRID = ModelShape("m", 8, 4, kinds=("linear_attention", "sliding_attention", "moe", "full_attention") * 2)
"""Layers 3 and 7 are of full attention."""


def test_a_list_counts_the_models_layers_and_leaves_out_those_that_stay_its_own():
    assert chosen_layers(HYBRID, "3") == DeepLayers((3,), "given")
    assert chosen_layers(HYBRID, "3,7") == DeepLayers((3, 7), "given")
    assert chosen_layers(HYBRID, "0-") == chosen_layers(HYBRID, starting_layer=0) == DeepLayers((3, 7), "given")
    assert chosen_layers(HYBRID, "4-") == chosen_layers(HYBRID, starting_layer=7) == DeepLayers((7,), "given")
    assert chosen_layers(HYBRID, "random:2") == DeepLayers((3, 7), "random")


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("0", "linear or recurrent attention"),
        ("3,5", "sliding-window attention"),
        ("3-7", "linear or recurrent attention, sliding-window attention, experts alone"),
    ],
)
def test_a_list_that_names_a_layer_of_the_models_own_is_refused_by_its_kind(text, kinds):
    with pytest.raises(
        UserError, match=rf"--layers {text} names layers that stay the model's own \({kinds}\).*: name .* 3,7"
    ):
        chosen_layers(HYBRID, text)


def test_more_layers_than_have_full_attention_cannot_be_drawn():
    with pytest.raises(UserError, match="asks for 3 of 2 layers"):
        chosen_layers(HYBRID, "random:3")


def test_half_the_depth_is_half_of_the_layers_with_full_attention():
    assert default_layers(HYBRID) == DeepLayers((7,), HALF)
    many = ModelShape("m", 32, 4, kinds=(*["linear_attention"] * 3, "full_attention") * 8)
    assert default_layers(many) == DeepLayers((19, 23, 27, 31), HALF)
    assert default_layers(ModelShape("some/Llama-3.1-8B", 32, 4)) == DeepLayers(tuple(range(16, 32)), "published")
    plan = METHODS["tri_mix"].plan(many)
    assert list(plan.by_layer) == [3, 7, 11, 15, 19, 23, 27, 31]
    assert [pattern.name for pattern in plan.by_layer.values()] == ["dense"] * 4 + ["triangle"] * 4
    assert plan.parameters["layers"] == "19,23,27,31"
