"""The probe against autograd over whole matrices, against finite differences, and on models whose answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from served_families import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from bound_specs import Bound
from tmbench import applied
from tmbench.errors import UnsupportedModelError, UserError
from tmbench.measure import probe
from tmbench.measure.probe import ProbeSpec, gradients
from tmbench.methods.layers import Budget, resolve
from tmbench.methods.plan import ModelShape
from tmbench.models.loading import LoadedModel
from tmbench.report.pictures import figures, save, save_all
from tmbench.report.probe import Derivative
from tmbench.report.probe_plot import probe_figure
from tmbench.report.report import build
from tmbench.results import environment
from tmbench.results.rows import ProbeRow
from tmbench.results.tables import read_all
from tmbench.suites.questions import questions
from tmbench_kernels import MEASURES, SECTIONS, Sections, Triangle, section_gradients

SMALL = Sections(3, 7, 5)
MIXED = ("qwen3_next", "gemma3_text", "llama4_text", "granitemoehybrid", "lfm2", "nemotron_h", "minimax", "jamba")
"""Families some of whose layers stay the model's own."""
TARGET = 11
LOGITS = MEASURES.index("logits")
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 4,
}  # fmt: skip


@pytest.fixture
def matrices():
    """Attention of transformers' models by plain matrices: ``kept[layer] = (logits, probabilities)``, ``added[layer]``."""
    kept: dict[int, Any] = {}
    added: dict[int, Any] = {}

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        logits = logits + added.get(module.layer_idx, 0)
        later = ~torch.ones(length, length, dtype=torch.bool).tril() if attention_mask is None else ~attention_mask
        logits = logits.masked_fill(later, -torch.inf)
        p = logits.softmax(-1)
        if logits.requires_grad:
            logits.retain_grad()
            p.retain_grad()
        kept[module.layer_idx] = logits, p
        return (p @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by-matrices", attend)
    AttentionMaskInterface.register("by-matrices", sdpa_mask)
    return kept, added


def logit(model, ids):
    return model(ids, use_cache=False).logits[0, -1, TARGET]


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "gemma2",
            {"layer_types": ["full_attention"] * 4, "attn_logit_softcapping": 5.0},
            "does not differentiate soft-capped logits, which small has",
        ),
    ],
)
def test_models_that_are_not_probed_are_refused_by_what_they_have(family, changes, words, make_model, tmp_path):
    loaded = LoadedModel("small", make_model(family, **changes), None, "random", "")
    about: dict[str, Any] = {"environment": environment.current(torch.device("cpu")), "root": tmp_path, "tasks": ("random",)}
    spec = Bound(ProbeSpec, loaded, lengths=(100,), samples=1, budget=Budget(0.1), **about)
    with pytest.raises(UserError, match=f"^tmbench probe {words}[;:] use another --model$"):
        spec.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("qwen3", {"num_key_value_heads": 1}), ("granite", {"attention_multiplier": 0.3, "logits_scaling": 3.0}),
     ("gpt_neox", {"num_key_value_heads": 4}), ("deepseek_v3", LATENT),
     *((family, FAMILIES[family]) for family in MIXED)],
)  # fmt: skip
def test_means_are_those_of_autograd_over_whole_matrices(family, changes, make_model, prompt, matrices):
    kept, _ = matrices
    model, ids = make_model(family, **changes), prompt(43)
    found, backends = gradients(model, ids, TARGET, SMALL)
    assert backends == "dense:sdpa"
    model.set_attn_implementation("by-matrices")
    z = logit(model, ids)
    z.backward()
    labels = SMALL.labels(43)
    expected = torch.empty_like(found.means)
    full = ModelShape.of(model).full
    assert len(expected) == len(full)
    for place, (logits, p) in enumerate(kept[layer] for layer in full):
        for n, values in enumerate((logits.grad.abs(), logits.grad, p.grad.abs(), p.grad)):
            for s in range(len(SECTIONS)):
                expected[place, :, s, n] = values[0][:, labels == s].double().mean(-1)
    assert expected[:, :, :, LOGITS].max() > 1e-4, "the test must see gradients"
    torch.testing.assert_close(found.means, expected, rtol=2e-3, atol=1e-6)
    assert found.probability == pytest.approx(float(model(ids).logits[0, -1].softmax(-1)[TARGET].detach()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("length", [30, 41])
def test_signed_means_are_finite_differences(length, make_model, prompt, matrices):
    """What is added to all logits of a section moves the answer's logit by the sum of its gradients.

    The norms of most families compute in float32 whatever the model's type; these do not.
    """
    _, added = matrices
    model, ids, step = make_model("stablelm").double(), prompt(length), 1e-4
    means = gradients(model, ids, TARGET, SMALL)[0].means[:, :, :, MEASURES.index("logits_signed")]
    model.set_attn_implementation("by-matrices")
    labels = SMALL.labels(length)
    for layer, head in ((0, 0), (1, 3), (2, 1), (3, 2)):
        for s, pairs in enumerate(SMALL.pairs(length)):
            ends = []
            for sign in (1, -1):
                added.clear()
                added[layer] = torch.zeros(4, length, length, dtype=torch.float64)
                added[layer][head][labels == s] = sign * step
                with torch.no_grad():
                    ends.append(float(logit(model, ids)))
            assert float(means[layer, head, s]) * pairs == pytest.approx(
                (ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-8
            )


def propose_for(model, ids, budget=0.0, rule="rank"):
    wish = probe.Proposing(Budget(budget), rule)
    return probe.proposed(gradients(model, ids, TARGET, SMALL)[0].means.mean(1), 0.5, wish).layers


def last_logits(model, ids, layers):
    with torch.no_grad(), applied(model, "tri_mix", layers=layers, n_init=3, n_local=7, last_n=5):
        return model(ids).logits[0, -1]


def test_a_layer_whose_attention_leads_nowhere_is_proposed(make_model, prompt):
    """Layer 1 writes nothing, and of the last layer only the last row is read: leaving their middle out changes nothing."""
    model, ids = make_model("llama"), prompt(50)
    torch.nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    assert propose_for(model, ids) == (1, 3)
    assert propose_for(model, ids, rule="depth") == (3,)
    dense = last_logits(model, ids, "none")
    torch.testing.assert_close(last_logits(model, ids, "1,3"), dense, rtol=1e-4, atol=1e-4)
    for used in ("0-0", "2-2"):
        assert (last_logits(model, ids, used) - dense).abs().max() > 0.01


def test_the_middle_is_unused_where_no_later_layer_mixes_positions(make_model, prompt):
    """Layers 2 and 3 attend to nothing, so the last row of layer 1 is all that is read of it: its middle is unused alone."""
    model, ids = make_model("llama"), prompt(50)
    for layer in (2, 3):
        torch.nn.init.zeros_(model.model.layers[layer].self_attn.v_proj.weight)
    means = gradients(model, ids, TARGET, SMALL)[0].means[:, :, :, LOGITS].mean(1)
    assert (means[1:, SECTIONS.index("middle")] == 0).all()
    assert (means[:2, SECTIONS.index("last")] > 0).all()
    assert means[0, SECTIONS.index("middle")] > 0
    assert propose_for(model, ids) == propose_for(model, ids, rule="depth") == (1, 2, 3)
    dense = last_logits(model, ids, "none")
    torch.testing.assert_close(last_logits(model, ids, "1-3"), dense, rtol=1e-4, atol=1e-4)
    assert (last_logits(model, ids, "0-0") - dense).abs().max() > 0.01


class Largest(TorchDispatchMode):
    """The most elements that any operator yielded."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // max(1, x.element_size()))
        return out


@pytest.mark.slow
def test_memory_is_linear_in_the_length(make_model, prompt, monkeypatch):
    monkeypatch.setitem(section_gradients._BLOCK_ELEMENTS, "cpu", 2**14)
    model = make_model("llama", max_position_embeddings=4096)
    largest = []
    for length in (400, 800):
        with Largest() as watch:
            gradients(model, prompt(length), TARGET, SMALL)
        largest.append(watch.elements)
    assert largest[1] <= 2 * largest[0]
    assert largest[1] < 800 * 800 // 4


def test_nothing_is_left_on_the_model(make_model, prompt, monkeypatch):
    model, ids = make_model("llama"), prompt(20)
    frozen = model.model.norm.weight.requires_grad_(False)
    before = model(ids).logits

    def refuse(*args, **kwargs):
        raise RuntimeError("stop")

    gradients(model, ids, TARGET, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("tmbench_kernels.section_gradients.section_gradients", refuse)
        with pytest.raises(RuntimeError, match="stop"):
            gradients(model, ids, TARGET, SMALL)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert not [m for m in model.modules() if "forward" in vars(m) or m._forward_hooks or "_tmbench_slot" in vars(m)]
    torch.testing.assert_close(model(ids).logits, before)


def test_models_are_refused_as_elsewhere(make_model, prompt):
    with pytest.raises(UnsupportedModelError, match="layer 0 has a sliding window of 16"):
        gradients(make_model("mistral", sliding_window=16), prompt(17), TARGET, SMALL)


@pytest.fixture
def job(make_model, tmp_path):
    """``job(**changes)``: two samples of 40 random tokens."""
    here = environment.current(torch.device("cpu"))

    def make(*, model=("llama", {}), **changes):
        loaded = LoadedModel("small", make_model(model[0], **model[1]), None, "random", "")
        about = {"lengths": [40], "tasks": ["random"], "samples": 2, "budget": Budget(0.3), "window": Triangle(3, 7, 5)}
        return Bound(ProbeSpec, loaded, environment=here, root=tmp_path, **(about | changes))

    return make


@pytest.mark.slow
def test_rows_are_means_over_samples_and_heads(job, tmp_path):
    measured = job()
    rows = measured.run()
    assert [(row.layer, row.head) for row in rows] == [(layer, head) for layer in range(4) for head in (None, *range(4))]
    assert read_all(tmp_path, ProbeRow) == rows
    asked = list(questions("random", 40, range(2), measured.loaded, 42))
    ids = [torch.tensor([question.prompt]) for question in asked]
    found = [gradients(measured.loaded.model, x, q.answer[0], SMALL)[0].means for x, q in zip(ids, asked, strict=True)]
    means = torch.stack(found).mean(0)
    for row in rows:
        own = means[row.layer].mean(0) if row.head is None else means[row.layer, row.head]
        for s, section in enumerate(SECTIONS):
            for n, measure in enumerate(MEASURES):
                assert getattr(row, f"{section}_{measure}") == pytest.approx(float(own[s, n]), rel=1e-4, abs=1e-9)
    assert (rows[0].samples, rows[0].prompt_tokens_mean, rows[0].status) == (2, 39, "ok")
    assert rows[0].parameters == "n_init=3 n_local=7 last_n=5", "what the sections are, and nothing else of a triangle"
    assert rows[15].triangle
    assert rows[1].triangle is None
    assert rows[0].lost_share <= 0.3


@pytest.mark.slow
def test_layers_that_stay_the_models_own_are_not_probed(job, tmp_path):
    windows = {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"] * 2}
    measured = job(model=("gemma3_text", windows), budget=Budget(None, 0.9), rule="depth")
    rows = measured.run()
    layers = [row for row in rows if row.head is None]
    assert [(row.layer, row.triangle) for row in layers] == [(0, False), (2, True)]
    assert (len(rows), read_all(tmp_path, ProbeRow)) == (2 * (1 + 4), rows)
    chosen = resolve("auto", measured.loaded.shape, tmp_path)
    assert chosen.layers == (2,)
    assert set(build(tmp_path).probes[0].layers) == {0, 2}
    assert [path.suffix for path in save_all(figures(build(tmp_path)), tmp_path / "plots")]


@pytest.mark.slow
def test_where_the_last_layer_alone_has_full_attention_it_loses_nothing(job, tmp_path):
    """Of that layer the last row alone matters, so that its middle has no gradient at all."""
    windows = {"sliding_window": 16, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    measured = job(model=("gemma3_text", windows), budget=Budget(0.0))
    (layer,) = [row for row in measured.run() if row.head is None]
    assert (layer.layer, layer.triangle, layer.lost_share, layer.middle_logits) == (3, True, 0.0, 0.0)
    assert layer.streaming_logits > 0


def test_a_model_without_any_gradient_is_an_error(make_model, prompt):
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    with pytest.raises(RuntimeError, match="no layer of LlamaForCausalLM has any gradient in torch.float32"):
        gradients(model, prompt(17), TARGET, SMALL)


def test_a_layer_that_attends_twice_is_refused(make_model, prompt):
    with pytest.raises(UnsupportedModelError, match="layer 3 of DiffLlamaForCausalLM attends more than once"):
        gradients(make_model("diffllama"), prompt(17), TARGET, SMALL)


@pytest.mark.slow
def test_a_killed_probe_goes_on_with_the_next_sample(job, tmp_path, monkeypatch):
    sample, asked = probe._sample, []

    def stop_at(last):
        def measure(spec, loaded, question):
            if question.index == last:
                raise KeyboardInterrupt
            asked.append(question.index)
            return sample(spec, loaded, question)

        monkeypatch.setattr(probe, "_sample", measure)

    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        job().run()
    assert read_all(tmp_path, ProbeRow) == []
    stop_at(None)
    rows = job().run()
    more = job(samples=3).run()
    assert asked == [0, 1, 2]
    assert {row.samples for row in more} == {3}
    lines = next(tmp_path.glob("*/probe/dense.csv")).read_text().count("\n")
    job(samples=3).run()
    assert next(tmp_path.glob("*/probe/dense.csv")).read_text().count("\n") == lines, "nothing new, nothing written"
    other = job(samples=3, budget=Budget(0.0)).run()
    assert asked == [0, 1, 2]
    assert [row.triangle for row in other if row.head is None] == [False, False, False, True]
    job(overwrite=True).run()
    assert asked == [0, 1, 2, 0, 1]
    assert len(rows) == 20


@pytest.mark.slow
def test_out_of_memory_is_a_row(job, tmp_path, monkeypatch):
    def fail(spec, loaded, question):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "_sample", fail)
    rows = job(lengths=[40, 50]).run()
    assert [(row.length, row.status, row.layer) for row in rows] == [
        (40, "out_of_memory", None),
        (50, "out_of_memory", None),
    ]
    assert read_all(tmp_path, ProbeRow) == rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": [14]}, "--length 14 leaves no pair between the first 3 keys, the window of 7 and the last 5 queries"),
        ({"lengths": [16]}, "--length 16 leaves no pair .*, as a prompt has 15 tokens of it: give a longer one"),
        ({"budget": Budget(time=0.01)}, "--time-budget 0.01 is less than the 0.615 that triangle attention in all 4 layers"),
        ({"tasks": ["kv"]}, "small has no tokenizer, which --task kv needs: use --task random"),
        ({"tasks": ["poem"]}, "--task poem is unknown: choose from kv, random, niah"),
        ({"lengths": [1]}, "--length 1 is too short for random"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_anything_is_measured(changes, words, job, tmp_path):
    with pytest.raises(UserError, match=words):
        job(**changes).run()
    assert not list(tmp_path.iterdir())


def test_prompts_that_do_not_fill_their_length_are_refused_before_they_are_differentiated(job, tmp_path, monkeypatch):
    """A task's prompts may take less of a length than they might: whether they have a middle shows when they are made."""
    monkeypatch.setattr(probe, "_sample", lambda *given: pytest.fail("this one was measured"))
    asked = list(questions("random", 40, range(2), job().loaded, 42))
    short = replace(asked[1], prompt=asked[1].prompt[:14])
    monkeypatch.setattr(probe, "questions", lambda *about: iter([asked[0], short]))
    with pytest.raises(UserError, match="--length 40 leaves no pair .* as a prompt has 14 tokens of it"):
        job().run()
    short = replace(asked[1], prompt=asked[1].prompt[:20])
    with pytest.raises(UserError, match=r"--time-budget 0\.62 is less than the 0\.[78]"):
        job(budget=Budget(time=0.62)).run()
    assert not list(tmp_path.iterdir())


def test_half_precision_is_refused(job):
    made = job()
    made.loaded.model.half()
    with pytest.raises(UserError, match="--dtype float16 cannot hold gradients as small as these: use bfloat16 or float32"):
        made.check()


@pytest.mark.slow
def test_a_foreign_samples_file_is_named(job, tmp_path):
    job().run()
    path = next(tmp_path.glob("*/probe/samples/dense/random-40-*.jsonl"))
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1]
    whole = json.loads(path.read_text().splitlines()[0])
    for content in (b"{}\n", b"\xff\n", json.dumps(whole | {"index": "x"}).encode() + b"\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="line 1 is not a sample: move the file away, or use --overwrite"):
            job().run()


@pytest.mark.slow
def test_a_plot_is_drawn_the_same_each_time(job, tmp_path):
    rows = job().run()
    first, second = tmp_path / "plots" / "a.png", tmp_path / "b.png"
    drawn: list[tuple[Path, Derivative]] = [(first, "logits"), (second, "logits"), (tmp_path / "c.png", "probabilities")]
    for path, derivative in drawn:
        save(probe_figure(rows, derivative), path)
    assert first.read_bytes() == second.read_bytes() != (tmp_path / "c.png").read_bytes()


@pytest.mark.slow
def test_every_probe_of_a_folder_is_drawn_by_its_own_derivative(job, tmp_path):
    rows = job(derivative="probabilities").run()
    job(lengths=[50]).run()
    paths = save_all(figures(build(tmp_path)), tmp_path / "all")
    assert paths == save_all(figures(build(tmp_path)), tmp_path / "all")
    assert sorted((tmp_path / "all").iterdir()) == sorted(paths)
    assert ["-random-40-" in path.name for path in paths] == [True, False]
    save(probe_figure(rows, "probabilities"), tmp_path / "a.png")
    assert paths[0].read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"prompt_hash": ""}, {"target": -1}])
def test_what_was_read_of_another_prompt_or_towards_another_token_is_read_again(job, tmp_path, change):
    before = job().run()
    path = next(tmp_path.glob("*/probe/samples/dense/random-40-*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] |= {**change, "probability": 5.0}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = job().steps()
    assert sum(step.measured for step in steps) == 1
    assert next(row for step in steps for row in step.rows).probability_mean == before[0].probability_mean
    assert sum(step.measured for step in job().steps()) == 0


@pytest.mark.slow
def test_files_of_the_first_release_are_read_but_not_gone_on_from(job, tmp_path):
    job().run()
    path = next(tmp_path.glob("*/probe/samples/dense/random-40-*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in one.items() if k != "prompt_hash"}) + "\n" for one in lines))
    assert sum(step.measured for step in job().steps()) == 2
