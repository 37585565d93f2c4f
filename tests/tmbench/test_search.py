"""The search on a model: what it finds, what it writes, and what is left of one that was interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from bound_specs import Bound
from plans import plan_of
from tmbench.engine.attention import applied
from tmbench.errors import UserError
from tmbench.measure import partial, search
from tmbench.measure.partial import partial_path
from tmbench.measure.search import SearchSpec
from tmbench.models.loading import LoadedModel
from tmbench.report.pattern_plot import pattern_figure
from tmbench.report.pictures import save
from tmbench.suites.prompts import prompt_ids
from tmbench_kernels import HeadPattern, load_head_patterns, load_patterns
from tmbench_kernels.minference import search as rule

SMALL = (
    HeadPattern("stream_llm", 50, 50),
    HeadPattern("vertical_and_slash", 31, 40),
    HeadPattern("vertical_and_slash", 60, 35),
    HeadPattern("block_sparse", 1000, 6096),
)


@pytest.fixture
def job(make_model, tmp_path, monkeypatch):
    """A search over small candidates on a model of random weights; every query from the 100th on counts."""
    monkeypatch.setattr(search, "FIRST_ROW", 100)
    monkeypatch.setattr(search, "CANDIDATES", SMALL)
    real = rule.kept_attention
    monkeypatch.setattr(search, "kept_attention", lambda *a, **kw: real(*a, candidates=SMALL, first_row=100, **kw))
    monkeypatch.setattr(search, "best_pattern", lambda kept: rule.best_pattern(kept, SMALL))

    def make(model=None, **changes):
        loaded = LoadedModel("small", model or make_model("qwen2"), None, "random", "")
        values = {"output": tmp_path / "found.json", "length": 400, "prompt": "random"}
        return Bound(SearchSpec, loaded, **(values | changes))

    return make


MIXED: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"), [("gemma3_text", MIXED), ("lfm2", {"layer_types": ["conv", "full_attention"] * 2})]
)
def test_layers_that_stay_the_models_own_have_no_heads_in_the_file(family, changes, job, make_model):
    """The others have their own numbers, and the file is taken for this very model."""
    work = job(make_model(family, **changes))
    found, steps = work.run_and_steps()
    assert sum(step.work for step in steps) == pytest.approx(2)
    assert [len(layer) for layer in found] == [0, 4, 0, 4]
    assert [len(layer) for layer in json.loads(work.output.read_text())] == [0, 4, 0, 4]
    plan = plan_of(work.loaded.model, "minference", patterns=str(work.output))
    assert list(plan.by_layer) == [1, 3]
    seen: dict[int, Any] = {}
    ids = prompt_ids("random", 400, work.loaded, 42)
    with torch.inference_mode(), applied(work.loaded.model, "dense") as session:
        session.observer = lambda layer, pattern, q, k, scale: seen.update({layer: (q, k, scale)})
        work.loaded.model(ids)
    for layer in (1, 3):
        q, k, scale = seen[layer]
        kept = rule.kept_attention(q[0, :2], k[0, 0], scale=scale, candidates=SMALL, first_row=100)
        assert list(found[layer][:2]) == [rule.best_pattern(head.tolist(), SMALL) for head in kept]


@pytest.mark.parametrize(("family", "what"), [("gpt_oss", "learned attention sinks"), ("gemma2", "soft-capped logits")])
def test_logits_that_the_search_does_not_weigh_are_refused_by_name(family, what, job, make_model):
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "attn_logit_softcapping": 5.0}
    work = job(make_model(family, **(MIXED | more)))
    with pytest.raises(UserError, match=f"^tmbench patterns search does not weigh {what}, which small has: use another"):
        work.check()
    assert not work.output.exists()


def test_the_file_holds_each_heads_winner_and_what_it_keeps(job):
    """Against the masks of the candidates, on what a forward pass hands to each layer's attention."""
    work = job()
    found, steps = work.run_and_steps()
    assert sum(step.work for step in steps) == pytest.approx(4), "the progress bar must end where it says"
    assert load_head_patterns(work.output, layers=4, heads=4) == [tuple(layer) for layer in found]
    assert not partial_path(work.output).exists()
    seen: dict[int, Any] = {}
    with torch.inference_mode(), applied(work.loaded.model, "dense") as session:
        session.observer = lambda layer, pattern, q, k, scale: seen.update({layer: (q, k, scale)})
        work.loaded.model(prompt_ids("random", 400, work.loaded, 42))
    i, j = torch.arange(400)[:, None], torch.arange(400)
    for layer, (q, k, scale) in seen.items():
        for head in range(4):
            logits = (q[0, head] @ k[0, head // 2].T).double() * scale
            attention = logits.masked_fill(j > i, -torch.inf).softmax(1)
            stream = (attention * ((j < 50) | (i - j <= 50)))[100:].sum(1).mean()
            winner = found[layer][head]
            assert winner.score is not None
            assert winner.score >= stream - 1e-6
            if winner.type == "stream_llm":
                assert winner.score == pytest.approx(float(stream), abs=1e-6)
    assert len({(head.type, head.vertical) for layer in found for head in layer}) > 1


def test_the_published_remapping_is_a_choice(job, tmp_path):
    kept = job().run()
    mapped = job(output=tmp_path / "mapped.json", remap=True).run()
    assert any(head.type != "vertical_and_slash" for layer in kept for head in layer)
    assert mapped == [tuple(rule.published_remapping(head) for head in layer) for layer in kept]
    assert all(pattern.name == "vertical_slash" for pattern in load_patterns(tmp_path / "mapped.json", layers=4, heads=4))


def stopped_at(work, layer, monkeypatch):
    """Run until this layer is about to be weighed, then be interrupted."""
    real = search.kept_attention
    calls: list[object] = []

    def stop(*arguments, **keywords):
        if len(calls) == 2 * layer:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(search, "kept_attention", stop)
        with pytest.raises(KeyboardInterrupt):
            work.run()


@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_measures_nothing_twice(job, tmp_path, monkeypatch):
    whole = job(output=tmp_path / "whole.json").run()
    work = job()
    stopped_at(work, 3, monkeypatch)
    assert work.loaded.model.config._attn_implementation == "sdpa"
    assert not work.output.exists()
    assert partial_path(work.output).read_bytes().count(b"\n") == 1 + 3
    # A line that was being written when the process died.
    partial_path(work.output).write_bytes(partial_path(work.output).read_bytes() + b'{"layer": 3, "kept": [[0.1, 0.')
    calls, real = [], search.kept_attention
    monkeypatch.setattr(search, "kept_attention", lambda *a, **kw: calls.append(0) or real(*a, **kw))
    found, steps = job().run_and_steps()
    assert found == whole
    assert len(calls) == 2, "one layer of two key heads was left"
    assert ("search: 3 layers measured before", 3) in [(step.text, step.work) for step in steps]
    assert sum(step.work for step in steps) == pytest.approx(4)
    assert work.output.read_text() == (tmp_path / "whole.json").read_text()
    assert not partial_path(work.output).exists()


def test_all_layers_but_no_file_need_no_prompt(job, monkeypatch):
    work = job()
    with monkeypatch.context() as patch:
        patch.setattr(partial, "replace_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="--output: .* cannot be written .No space left on device"):
            work.run()
    monkeypatch.setattr(search, "kept_attention", None)
    found, steps = job().run_and_steps()
    assert len(found) == 4
    assert sum(step.measured for step in steps) == 0, "so that the command line says that nothing was measured"
    assert not partial_path(job().output).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "name"), [({"length": 420}, "length"), ({"seed": 7}, "seed")])
def test_a_partial_file_of_another_search_is_kept_and_named(job, monkeypatch, changes, name):
    stopped_at(job(), 1, monkeypatch)
    before = partial_path(job().output).read_text()
    with pytest.raises(UserError, match=f"of a search with another {name} .*--overwrite"):
        job(**changes).run()
    assert partial_path(job().output).read_text() == before
    job(overwrite=True, **changes).run()
    assert not partial_path(job().output).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [b"hello\n", b'{"search": 3}\n', b"[1]\n", b'{"search": {}}\n{"layer": 0, "kept": [[1]]}\n', b'{"search": "\xff"}\n'],
)
def test_a_partial_file_that_is_none_is_named(job, content):
    partial_path(job().output).write_bytes(content)
    with pytest.raises(UserError, match=r"found.json.partial line . is not of a search that was interrupted: .*--overwrite"):
        job().run()


def test_a_folder_in_place_of_a_partial_file_is_named(job):
    partial_path(job().output).mkdir()
    with pytest.raises(UserError, match=r"found.json.partial cannot be read: Is a directory; .*another --output"):
        job().run()


def test_an_output_that_may_not_be_looked_at_is_one_sentence(job, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(job().output), "stat", refuse)
    with pytest.raises(UserError, match=r"--output: .*found.json cannot be written .Permission denied."):
        job().check()


@pytest.mark.slow
def test_a_file_that_is_there_is_kept(job):
    job().run()
    before = job().output.read_text()
    with pytest.raises(UserError, match="found.json is there already: name another file, or add --overwrite"):
        job(seed=3).run()
    assert job().output.read_text() == before
    job(seed=3, overwrite=True).run()
    assert job().output.read_text() != before


def test_a_prompt_without_queries_that_count_is_refused(job):
    with pytest.raises(UserError, match="--length 100 leaves nothing to search: only queries from 100 on count"):
        job(length=100).run()


@pytest.mark.slow
def test_a_picture_of_few_kinds_and_of_many(tmp_path):
    few = [{0: HeadPattern(), 1: HeadPattern("stream_llm", 100, 800)}, {1: HeadPattern("block_sparse")}]
    many = [{head: HeadPattern("vertical_and_slash", 100 * head, 10 * layer) for head in range(4)} for layer in range(3)]
    many[0][2] = HeadPattern("stream_llm", 0, 0)
    for name, layers in (("few", few), ("many", many)):
        save(pattern_figure(layers), tmp_path / "deep" / f"{name}.png")
        picture = (tmp_path / "deep" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        save(pattern_figure(layers), tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == picture
        save(pattern_figure(layers[:-1]), tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() != picture


def test_the_searchs_figures_are_numbers_of_json(job):
    job().run()
    content = json.loads(job().output.read_text())
    assert [sorted(layer) for layer in content] == [["0", "1", "2", "3"]] * 4
    assert all(0 <= score <= 1 for layer in content for _, _, _, score in layer.values())


def test_a_search_of_other_weights_under_the_same_name_is_not_gone_on_with(job, monkeypatch):
    stopped_at(job(), 1, monkeypatch)
    work = job()
    work.loaded = replace(work.loaded, model_hash="0123456789ab")
    with pytest.raises(UserError, match="of a search with another model_hash .*--overwrite"):
        work.run()
