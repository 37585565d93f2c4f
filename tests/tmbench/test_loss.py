"""Losses against the plain model's own logits, whole and under the method's mask; rows, differences and resumed runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from served_families import small
from transformers import GenerationConfig

import under_plan
from bound_specs import Bound
from plans import plan_of
from tmbench.engine.prefill import EAGER
from tmbench.engine.session import running
from tmbench.measure import keeping, loss
from tmbench.measure.loss import LossSpec
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.rows import LossRow
from tmbench.results.tables import read_all
from tmbench_kernels import Triangle

WINDOW: dict[str, Any] = {"n_init": 3, "n_local": 7, "last_n": 5}
ANSWER = [5, 17, 5, 80]


def whole(model, ids, answer, mask=None):
    """Losses of all tokens from one pass over prompt and answer."""
    together = torch.cat([ids, torch.tensor([answer])], 1)
    with torch.no_grad():
        logits = model(together, attention_mask=mask, use_cache=False).logits[0, :-1]
    values = F.cross_entropy(logits, together[0, 1:], reduction="none")
    return values[: ids.shape[1] - 1], values[ids.shape[1] - 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("granite", {"logits_scaling": 3.0}), ("gpt_neox", {"num_key_value_heads": 4})]
)
def test_dense_losses_are_the_plain_models(family, changes, chunk, make_model, prompt, monkeypatch):
    """Granite divides its logits behind the head: the model's own forward must make them."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk * 97)
    model, ids = make_model(family, **changes), prompt(40)
    of_prompt, of_answer, backends = under_plan.losses(model, plan_of(model, "dense"), ids, ANSWER)
    expected = whole(model, ids, ANSWER)
    torch.testing.assert_close((of_prompt, of_answer), expected, rtol=1e-4, atol=1e-4)
    assert backends == "dense:sdpa"
    assert not [m for m in model.modules() if "forward" in vars(m) or m._forward_hooks]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma4_text", "gemma4_text, with shared keys", "llama4_text", "gemma3", "qwen2_5_vl"])
def test_losses_of_models_whose_heads_hand_on_more_or_whose_base_has_another_name(family, prompt):
    model, ids = small(family), prompt(40)
    model.generation_config.eos_token_id = None
    of_prompt, of_answer, _ = under_plan.losses(model, plan_of(model, "dense"), ids, ANSWER)
    torch.testing.assert_close((of_prompt, of_answer), whole(model, ids, ANSWER), rtol=1e-4, atol=1e-4)


def test_a_methods_losses_are_those_under_its_mask(make_model, prompt):
    """Rows of the prompt have the method's mask, rows of the answer see everything."""
    model, ids = make_model("llama"), prompt(41)
    mask = torch.ones(45, 45, dtype=torch.bool).tril()
    x = torch.empty(1, 4, 41, 16)
    mask[:41, :41] = Triangle(**WINDOW).mask(x, x)[0, 0]
    plan = plan_of(model, "tri_mix", starting_layer=0, **WINDOW)
    of_prompt, of_answer, _ = under_plan.losses(model, plan, ids, ANSWER)
    expected = whole(model, ids, ANSWER, mask[None, None])
    torch.testing.assert_close((of_prompt, of_answer), expected, rtol=1e-4, atol=1e-4)
    dense = whole(model, ids, ANSWER)
    assert (of_prompt - dense[0]).abs().max() > 0.1
    assert (of_answer - dense[1]).abs().max() > 0.01


def test_the_oracle_of_key_blocks_has_losses(make_model, prompt):
    """Of all the attention it is dense; of half of it, which leaves blocks out, it is not."""
    model, ids = make_model("llama"), prompt(400)
    expected = whole(model, ids, ANSWER)
    of_prompt, of_answer, backends = under_plan.losses(model, plan_of(model, "oracle_blocks", p=1.0), ids, ANSWER)
    torch.testing.assert_close((of_prompt, of_answer), expected, rtol=1e-4, atol=1e-4)
    assert backends == "oracle_blocks:torch-blocks"
    of_prompt, *_ = under_plan.losses(model, plan_of(model, "oracle_blocks", p=0.5), ids, ANSWER)
    assert (of_prompt - expected[0])[128:].abs().max() > 0.01


def test_what_the_model_generates_it_finds_likely(make_model, prompt):
    model, ids = make_model("llama"), prompt(30)
    config = GenerationConfig(do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    own = model.generate(ids, generation_config=config)[0, 30:].tolist()
    plan = plan_of(model, "dense")
    assert (under_plan.losses(model, plan, ids, own)[1] < torch.log(torch.tensor(97.0))).all()


@pytest.fixture
def job(make_model, tmp_path):
    model = make_model("llama")
    loaded = LoadedModel("small", model, None, "random", "")
    here = environment.current(loaded.device)

    def make(**changes):
        plans = [plan_of(model, "tri_mix", layers="0,2", **WINDOW), plan_of(model, "dense")]
        about = {"lengths": [40], "tasks": ["random"], "samples": 2, "plans": plans}
        return Bound(LossSpec, loaded, environment=here, root=tmp_path, **(about | changes))

    return make


def rows_of(rows):
    return {row.method: row for row in rows}


def test_differences_are_to_dense_on_the_same_samples(job, tmp_path):
    rows = rows_of(job().run())
    assert list(rows) == ["dense", "tri_mix"], "dense first, whatever was asked for"
    dense, tri_mix = rows["dense"], rows["tri_mix"]
    for name in ("nll_prompt", "nll_answer", "nll_first"):
        assert getattr(tri_mix, f"{name}_vs_dense") == pytest.approx(getattr(tri_mix, name) - getattr(dense, name), abs=1e-6)
        assert getattr(dense, f"{name}_vs_dense") is None
    assert abs(tri_mix.nll_prompt_vs_dense) > 0.01
    assert (tri_mix.settings["layers"], tri_mix.backends) == ("0,2", "dense:sdpa+triangle:torch-banded")
    assert (dense.samples, dense.prompt_tokens_mean, dense.answer_tokens_mean) == (2, 39, 1)
    assert {row.method: row for row in read_all(tmp_path, LossRow)} == rows
    lines = sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("*/loss/*.csv"))
    assert rows_of(job(plans=job().plans[:1]).run()) == {"tri_mix": tri_mix}, "dense was read before"
    assert sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("*/loss/*.csv")) == lines
    alone = rows_of(job(plans=job().plans[:1], seed=7).run())
    assert alone["tri_mix"].nll_prompt_vs_dense is None


def test_a_killed_run_goes_on_with_the_next_sample(job, tmp_path, monkeypatch):
    sample = loss.loss_sample
    asked: list[tuple[str, int]] = []

    def measure(loaded, plan, prefill, question, ran, *more):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((plan.method, question.index))
        return sample(loaded, plan, prefill, question, ran, *more)

    monkeypatch.setattr(loss, "loss_sample", measure)
    with pytest.raises(KeyboardInterrupt):
        job().run()
    del asked[0]
    rows = rows_of(job().run())
    assert asked == [("dense", 1), ("tri_mix", 0), ("tri_mix", 1)]
    lines = [path.read_text().count("\n") for path in tmp_path.glob("*/loss/*.csv")]
    monkeypatch.setattr(loss, "loss_sample", sample)
    assert rows_of(job().run()).keys() == rows.keys()
    assert [path.read_text().count("\n") for path in tmp_path.glob("*/loss/*.csv")] == lines == [2, 2]


@pytest.mark.slow
def test_a_method_that_fails_is_a_row_and_the_rest_goes_on(job, monkeypatch):
    sample = loss.loss_sample

    def measure(loaded, plan, prefill, question, ran, *more):
        if plan.method == "dense":
            raise MemoryError
        return sample(loaded, plan, prefill, question, ran, *more)

    monkeypatch.setattr(loss, "loss_sample", measure)
    rows = rows_of(job().run())
    assert (rows["dense"].status, rows["dense"].nll_prompt) == ("out_of_memory", None)
    assert (rows["tri_mix"].status, rows["tri_mix"].nll_prompt_vs_dense) == ("ok", None)


@pytest.mark.parametrize("name", ["prompt_hash", "answer_hash"])
def test_what_was_read_of_another_prompt_or_answer_is_read_again(job, tmp_path, name):
    job().run()
    for path in tmp_path.glob("*/loss/samples/*/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[1] |= {name: "", "nll_prompt": 9.0}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = job().steps()
    assert sum(step.measured for step in steps) == 2
    assert all(row.nll_prompt < 9 for row in rows_of(row for step in steps for row in step.rows).values())
    assert sum(step.measured for step in job().steps()) == 0


def test_an_overwrite_killed_behind_dense_leaves_no_difference_to_the_older_one(job, tmp_path, monkeypatch):
    first = rows_of(job().run())
    sample, real = loss.loss_sample, keeping.append

    def shifted(loaded, plan, prefill, question, ran, *more):
        one = sample(loaded, plan, prefill, question, ran, *more)
        return replace(one, nll_prompt=one.nll_prompt + 1.0 * (plan.method == "dense"))

    def append(root, row):
        real(root, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(loss, "loss_sample", shifted)
    monkeypatch.setattr(keeping, "append", append)
    with pytest.raises(KeyboardInterrupt):
        job(overwrite=True).run()
    monkeypatch.setattr(keeping, "append", real)
    again = rows_of(job().run())
    assert again["tri_mix"].nll_prompt_vs_dense == pytest.approx(first["tri_mix"].nll_prompt_vs_dense - 1.0)
    assert {row.method: row for row in read_all(tmp_path, LossRow)} == again


@pytest.mark.parametrize("method", ["dense", "tri_mix"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_several_texts_behind_one_context_are_scored_in_one_pass_each(family, method, make_model, prompt):
    """A cache that lets go of a text serves the next; layers with windows do not, and say so."""
    windows = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
    model, ids = make_model(family, **(windows if family == "gemma3_text" else {})), prompt(41)
    plan = plan_of(model, method, **WINDOW)
    # The last one is what the model would write.
    texts = [ANSWER, [7], [9, 11, 4], []]
    with running(model, plan, EAGER) as session:
        texts[-1] = session.generate(ids, 3)[0].tolist()
        expected = [loss.following_losses(session, session.read(ids), text, at_once=False) for text in texts]
        decoding = session.read(ids)
        for text, (losses, likeliest) in zip(texts, expected, strict=True):
            if decoding.length != 41:
                assert family == "gemma3_text"
                decoding = session.read(ids)
            got, greedy = loss.following_losses(session, decoding, text, at_once=True)
            torch.testing.assert_close(got, losses, rtol=1e-4, atol=1e-4)
            assert greedy == likeliest == (text is texts[-1])
