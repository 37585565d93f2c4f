"""Verdicts on the publication's claims follow from intervals alone, and the page takes up rows where they are put."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from claim_rows import SHAPE, TASKS, ask, lose, probe


@pytest.fixture
def claims(monkeypatch, pytestconfig):
    """benchmarks/claims.py as a module; its neighbours are its ``tables`` and ``sources``."""
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import claim_tables
    import claims
    import sources

    return SimpleNamespace(**vars(claims), tables=claim_tables, sources=sources)


@pytest.mark.parametrize(
    ("low", "high", "ends", "word"),
    [
        (-1, math.inf, (-0.9, 0.5), "supported"),
        (-1, math.inf, (-5, -1.1), "refuted"),
        (-1, math.inf, (-5, 0.5), "undecided"),
        (-1, math.inf, (-1, 0.5), "undecided"),
        (-1, math.inf, (-5, -1), "undecided"),
        (-math.inf, -12, (-17.1, -16.8), "supported"),
        (-math.inf, -12, (-11, -9), "refuted"),
        (-math.inf, -12, (-13, -11), "undecided"),
        (3, 5, (3.5, 4.5), "supported"),
        (3, 5, (2, 6), "undecided"),
        (3, 5, (6, 7), "refuted"),
        (3, 5, None, "undecided"),
    ],
)
def test_an_interval_decides(claims, low, high, ends, word):
    claim = claims.Claim("it is so", low, high)
    assert claims.verdict(claim, claims.Found("here", "a figure", ends)) == word
    assert claims.Judged(claim, [claims.Found("here", "a figure", ends)]).words == word


def test_without_rows_the_verdict_says_so_and_the_line_says_why(claims):
    claim = claims.Claim("it is so", low=0)
    assert claims.verdict(claim, None) == "not measured"
    judged = claims.Judged(claim, [], "no such model was run")
    assert judged.words == "not measured"
    assert judged.lines() == [["it is so", "no such model was run", "", "", "not measured"]]


def test_verdicts_that_differ_stand_beside_each_other(claims):
    ends = [(1, 2), (-2, -1), (1, 3), (-1, 1)]
    judged = claims.Judged(claims.Claim("it is so", low=0), [claims.Found("here", "a figure", one) for one in ends])
    assert judged.words == "supported 2 of 4, refuted 1 of 4, undecided 1 of 4"


@pytest.mark.parametrize("ends", [(2, 1), (math.nan, 1)])
def test_ends_that_are_no_interval_are_refused(claims, ends):
    with pytest.raises(ValueError, match="no interval"):
        claims.verdict(claims.Claim("it is so", low=0), claims.Found("here", "a figure", ends))


@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (1, 1), (2, 1), (math.nan, 1)])
def test_a_claim_without_bounds_is_refused(claims, bounds):
    with pytest.raises(ValueError, match="claims nothing"):
        claims.Claim("it is so", *bounds)


def words(claims, root, group, start):
    """The verdict on a claim over the made rows alone, and the figures that it rests on."""
    (judged,) = [one for one in claims.tables.judged(claims.sources.Sources(root), group) if start in one.claim.text]
    found = [one for one in judged.found if one.where.startswith("smollm2")]
    return claims.Judged(judged.claim, found).words, found


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "word"), [(0, "supported"), (1, "undecided"), (4, "refuted")])
def test_what_is_kept_is_judged_from_single_answers(claims, tmp_path, wrong, word):
    ask(tmp_path, 0)
    ask(tmp_path, wrong, "tri_mix", source="half the depth", layers="15-", **SHAPE)
    # Dense has nothing to lose on these.
    ask(tmp_path, 50, tasks=["qa_2"])
    ask(tmp_path, 60, "tri_mix", ["qa_2"], "half the depth", layers="15-", **SHAPE)
    said, (found,) = words(claims, tmp_path, "accuracy", "from half the depth on")
    assert said == word
    assert found.over == "480 samples, 8 tasks"


@pytest.mark.slow
def test_few_tasks_and_other_shapes_say_nothing_of_ruler(claims, tmp_path):
    ask(tmp_path, 0)
    ask(tmp_path, 9, "tri_mix", TASKS[:4], "half the depth", layers="15-", **SHAPE)
    ask(tmp_path, 9, "tri_mix", source="given", layers="15-", **SHAPE | {"n_local": 256})
    ask(tmp_path, 9, "tri_mix", source="given", layers="10-", **SHAPE)
    ask(tmp_path, 9, "tri_mix", source="half the depth", layers="15-", delta=64, **SHAPE)
    assert words(claims, tmp_path, "accuracy", "from half the depth on") == ("not measured", [])


@pytest.mark.slow
def test_layers_and_shapes_are_compared_with_each_other(claims, tmp_path):
    ask(tmp_path, 0)
    ask(tmp_path, 1, "tri_mix", source="half the depth", layers="15-", **SHAPE)
    ask(tmp_path, 9, "tri_mix", source="half the depth", layers="15-", **SHAPE | {"last_n": 0})
    ask(tmp_path, 1, "tri_mix", source="half the depth", layers="15-", **SHAPE | {"last_n": 0, "n_local": 640})
    ask(tmp_path, 0, "tri_mix", source="random", layers="0-14", **SHAPE)
    ask(tmp_path, 30, "tri_mix", source="random", layers="0-13", **SHAPE)
    assert words(claims, tmp_path, "choices", "the last 128 queries matter")[0] == "supported"
    assert words(claims, tmp_path, "choices", "it is the shape")[0] == "undecided"
    said, found = words(claims, tmp_path, "choices", "the deep half keeps more")
    assert (said, len(found)) == ("refuted", 1), "draws of another number of layers are not compared"
    assert found[0].where == "smollm2 at 4K, layers 15- against 0-14, some-gpu"


@pytest.mark.slow
def test_methods_are_compared_with_what_they_are_made_of(claims, tmp_path):
    ask(tmp_path, 0)
    for patterns, wrong in (("default", 0), ("patterns:62b72c84", 9)):
        ask(tmp_path, wrong, "minference", patterns=patterns)
        ask(tmp_path, wrong, "tri_mix_minference", source="half the depth", layers="15-", patterns=patterns, **SHAPE)
    said, found = words(claims, tmp_path, "accuracy", "MInference with triangle attention")
    assert (said, len(found)) == ("supported", 2)
    assert found[1].where == "smollm2 at 4K, layers 15-, patterns patterns:62b72c84, some-gpu"


@pytest.mark.slow
def test_probes_are_judged_prompt_by_prompt(claims, tmp_path):
    probe(tmp_path, deep=(0.01, 0.02, 0.03, 5.0))
    said, (found,) = words(claims, tmp_path, "reasons", "less than half of its gradient")
    assert said == "supported"
    assert found.text.startswith("2.0 % ("), "the fourth prompt is not of the row"


@pytest.mark.slow
def test_losses_are_judged_in_prompts_and_behind_them(claims, tmp_path):
    lose(tmp_path, {"": (2.0, 1.0), "15-": (2.1, 1.001), "20-": (2.0, 1.5), "5-": (3.0, 3.0)})
    said, found = words(claims, tmp_path, "reasons", "serves tokens inside the prompt")
    assert [one.where.split(", ")[2] for one in found] == ["layers 15-", "layers 20-"], "layers 5- are not the deep half"
    assert said == "supported 1 of 2, undecided 1 of 2"
    assert words(claims, tmp_path, "reasons", "and not those after it")[0] == "supported 1 of 2, refuted 1 of 2"
