"""A fast prefill equals the plain one: logits, cache, and the decoding that follows; the model is as before afterwards."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from plans import plan_of
from tmbench.engine import roofline
from tmbench.engine.attention import applied_plan
from tmbench.engine.kv_cache import CacheSlot, KvCache
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN, Prefill, prepared, tensors_of
from tmbench.engine.prefill_kind import obstacle_of
from tmbench.engine.prefill_state import PrefillState
from tmbench.engine.session import running
from tmbench.models.geometry import Geometry

MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
ROUTED: dict[str, Any] = MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "mistral": {"sliding_window": None, "head_dim": 128},
    "phi3": {"sliding_window": None},
    "gemma": {},
    "olmo2": {"num_key_value_heads": 4},
    "gpt_neox": {"num_key_value_heads": 4},
    "cohere": {},
    "mixtral": {"sliding_window": None, **MOE},
    "qwen3_moe": {"mlp_only_layers": [1], **MOE},
    "deepseek_v3": LATENT | ROUTED,
    "glm4_moe_lite": LATENT | {"mlp_layer_types": ["dense"] * 4},
}
WINDOW = {"n_init": 2, "n_local": 9, "last_n": 5}
METHOD_NAMES = ("dense", "tri_mix", "streaming", "minference")


pytestmark = pytest.mark.usefixtures("short_chunks")


def read(model, ids, kind, method="tri_mix"):
    """(last logits, cache) of one prefill."""
    plan = plan_of(model, method, **WINDOW)
    with torch.inference_mode(), applied_plan(model, plan) as session, prepared(model, session, kind) as prefill:
        (logits,) = prefill(ids)
        session.check_complete()
        return logits, prefill.cache


def state(model):
    return [(name, dict(vars(module))) for name, module in model.named_modules()]


def same(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_cache_and_the_next_step_are_the_plain_models(family, method, make_model, prompt, graphs):
    model, ids = make_model(family, **FAMILIES[family]), prompt(53)
    assert not obstacle_of(model)
    expected, plain = read(model, ids, PLAIN, method)
    token = expected.argmax()[None, None]
    with torch.inference_mode():
        following = model(token, past_key_values=copy.deepcopy(plain), use_cache=True).logits
        # One graph serves all methods, so that only one family need be compiled for each of them.
        for kind in (EAGER, COMPILED) if family == "llama" or method == "tri_mix" else (EAGER,):
            got, cache = read(model, ids, kind, method)
            same(got, expected)
            for kept, wanted in zip(tensors_of(cache), tensors_of(plain), strict=True):
                same(kept, wanted)
            same(model(token, past_key_values=cache, use_cache=True).logits, following)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PLAIN, EAGER, COMPILED])
def test_bfloat16_agrees_within_its_noise(kind, make_model, prompt, graphs):
    model, ids = make_model("llama"), prompt(80)
    exact, _ = read(model, ids, PLAIN)
    got, cache = read(model.bfloat16(), ids, kind)
    assert cache.layers[-1].keys.dtype == torch.bfloat16
    assert (got.float() - exact).square().mean().sqrt() < 0.06 * exact.square().mean().sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 48])
def test_any_length(length, make_model, prompt, graphs):
    model, ids = make_model("llama"), prompt(length)
    with torch.inference_mode():
        expected = model(ids).logits[0, -1]
    for kind in (PLAIN, EAGER, COMPILED):
        logits, cache = read(model, ids, kind, "dense")
        same(logits, expected)
        assert cache.get_seq_length() == length


@pytest.mark.slow
def test_layers_lengths_and_methods_share_graphs(make_model, prompt, graphs):
    model = make_model("llama", num_hidden_layers=10)
    for method in METHOD_NAMES:
        for length in (40, 61, 33):
            read(model, prompt(length), COMPILED, method)
    targets = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    operators = [[name for name in names if name.startswith("tmbench.")] for names in targets]
    last = ["tmbench.last_row", "tmbench.mlp"]
    assert operators == [["tmbench.attention", "tmbench.mlp"], [], last, last], (
        "one for the layers, one for their MLPs, one for the last layer, and one for that with all of its queries"
    )


@pytest.mark.slow
def test_an_mlp_that_takes_all_tokens_is_a_part_of_the_layers_graph(make_model, prompt, graphs):
    model = make_model("llama")
    for length in (16, 9, 40, 12, 33):
        ids = prompt(length)
        expected, _ = read(model, ids, PLAIN)
        got, _ = read(model, ids, COMPILED)
        same(got, expected)
    found = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    operators = [[name for name in names if name.startswith("tmbench.")] for names in found]
    assert operators[0] == ["tmbench.attention"], "16 tokens are one chunk"
    assert operators.count(["tmbench.attention"]) == operators.count(["tmbench.attention", "tmbench.mlp"]) == 1
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.slow
def test_experts_of_all_layers_and_lengths_share_graphs(make_model, prompt, graphs):
    model = make_model("qwen3_moe", num_hidden_layers=10, **MOE)
    for length in (40, 61, 33):
        read(model, prompt(length), COMPILED)
    products = [sum("grouped_mm" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert products == [0, 2, 0], "one graph for the layers, one for their experts, and one for the last layer"


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "gpt_oss"])
def test_experts_take_a_long_prompt_in_chunks(family, make_model, prompt):
    model, ids = make_model(family, **MOE), prompt(100)
    seen = []
    for layer in model.model.layers:
        mlp = layer.feed_forward if family == "llama4_text" else layer.mlp
        router = mlp.gate if family == "qwen3_moe" else mlp.router
        router.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    read(model, ids, EAGER)
    assert seen == [25, 25, 25, 25] * (len(model.model.layers) - 1) + [1], "at most twice the tokens of a plain MLP, evenly"


@pytest.mark.slow
def test_experts_that_cannot_be_traced_run_as_transformers_has_them_and_it_is_said_once(make_model, prompt, graphs):
    model, ids = make_model("qwen3_moe", **MOE), prompt(40)
    model.set_experts_implementation("eager")
    with torch.inference_mode():
        expected = model(ids).logits[0, -1]
    with pytest.warns(UserWarning, match="cannot trace Qwen3MoeSparseMoeBlock, which runs as transformers has it: ") as told:
        logits = [read(model, ids, COMPILED, method)[0] for method in ("dense", "dense")]
    assert len(told) == 1
    for got in logits:
        same(got, expected)


@pytest.mark.slow
def test_models_do_not_use_up_each_others_graphs(make_model, prompt, graphs):
    for hidden in range(16, 16 * 11, 16):
        read(make_model("llama", hidden_size=hidden, num_hidden_layers=2), prompt(40), COMPILED)
    assert len(graphs) == 30, "more models than torch keeps graphs for one function"


@pytest.mark.slow
def test_a_model_is_not_kept_alive(make_model, prompt, graphs):
    model = make_model("llama")
    read(model, prompt(40), COMPILED)
    alive = weakref.ref(model)
    del model
    torch._dynamo.reset()
    graphs.clear()
    gc.collect()
    assert alive() is None


@pytest.mark.slow
def test_giving_up_is_an_error(make_model, prompt, graphs):
    model = make_model("llama", num_hidden_layers=12)
    for layer in model.model.layers:
        layer.input_layernorm.__class__ = type("OwnNorm", (type(layer.input_layernorm),), {})
    before = state(model)
    with pytest.raises(RuntimeError, match="gave up on LlamaDecoderLayer, --no-compile or TORCHDYNAMO_DISABLE=1"):
        read(model, prompt(40), COMPILED)
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PLAIN, EAGER, COMPILED])
def test_the_model_is_restored(kind, make_model, prompt, graphs):
    model = make_model("llama")
    read(model, prompt(20), kind)
    before = state(model)
    read(model, prompt(20), kind)
    assert state(model) == before
    plan = plan_of(model, "dense", **WINDOW)
    with applied_plan(model, plan) as session:
        inside = state(model)

        def fail(layer, *rest):
            if layer == 2:
                raise RuntimeError("stop")

        session.observer = fail
        with pytest.raises(RuntimeError, match="stop"), prepared(model, session, kind) as prefill:
            prefill(prompt(20))
        assert prefill.cache is None
        assert session.prefill == PrefillState()
        assert state(model) == inside
    assert state(model) == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EAGER, COMPILED])
def test_decoding_inside_of_the_block_is_refused(kind, make_model, prompt, graphs):
    model = make_model("llama")
    plan = plan_of(model, "dense", **WINDOW)
    with torch.inference_mode(), applied_plan(model, plan) as session, prepared(model, session, kind) as prefill:
        prefill(prompt(20))
        with pytest.raises(RuntimeError, match="decode after the with block"):
            model(prompt(1), past_key_values=prefill.cache)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EAGER, COMPILED])
def test_the_cache_of_a_pass_is_let_go_before_the_next(kind, make_model, prompt, graphs):
    """By itself: gigabytes cannot wait for the garbage collector."""
    model = make_model("llama")
    plan = plan_of(model, "dense", **WINDOW)
    gone: list[bool] = []
    gc.disable()
    try:
        # The first pass compiles.
        caches = [weakref.ref(read(model, prompt(20), kind)[1])]
        with torch.inference_mode(), applied_plan(model, plan) as session, prepared(model, session, kind) as prefill:
            session.observer = lambda *_: gone.append(caches[-1]() is None)
            for _ in range(2):
                prefill(prompt(20))
                caches.append(weakref.ref(prefill.cache))
    finally:
        gc.enable()
    assert gone == [True] * 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EAGER, COMPILED])
@pytest.mark.parametrize("shared", ["input_layernorm", "self_attn.k_proj", "self_attn.q_proj"])
def test_a_module_of_the_last_layer_may_serve_another_too(shared, kind, make_model, prompt, graphs):
    model = make_model("llama")
    first, last = model.model.layers[0], model.model.layers[-1]
    last.set_submodule(shared, first.get_submodule(shared))
    expected, plain = read(model, prompt(40), PLAIN)
    plan = plan_of(model, "tri_mix", **WINDOW)
    with torch.inference_mode(), applied_plan(model, plan) as session, prepared(model, session, kind) as prefill:
        for _ in range(2):
            same(prefill(prompt(40))[0], expected)
            for kept, wanted in zip(tensors_of(prefill.cache), tensors_of(plain), strict=True):
                same(kept, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EAGER, COMPILED])
def test_the_last_layer_has_the_queries_that_a_dynamic_pattern_chooses_by(kind, make_model, prompt, graphs):
    model, ids = make_model("llama", max_position_embeddings=1024), prompt(901)
    plan = plan_of(model, "xattention", threshold=0.2)
    found = []
    for each in (PLAIN, kind):
        with torch.inference_mode(), applied_plan(model, plan) as session, prepared(model, session, each) as prefill:
            found.append(prefill(ids))
    same(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EAGER, COMPILED])
@pytest.mark.parametrize("family", ["llama", "phi3", "mistral"])
def test_the_cache_holds_keys_and_values_and_no_more(family, kind, make_model, prompt, graphs):
    _, cache = read(make_model(family, **FAMILIES[family]), prompt(40), kind)
    for kept in tensors_of(cache):
        assert kept.untyped_storage().nbytes() == kept.nbytes, "phi3's are views of a product that has queries as well"


@pytest.mark.slow
def test_latents_share_graphs_and_a_slot_of_a_static_cache_holds_what_they_make(make_model, prompt, graphs):
    """Keys and values of every head, which a batched step attends to in place."""
    model, ids = (
        make_model("deepseek_v3", **(LATENT | ROUTED | {"num_hidden_layers": 7, "first_k_dense_replace": 3})),
        prompt(40),
    )
    expected, plain = read(model, ids, PLAIN, "dense")
    for method in METHOD_NAMES:
        read(model, ids, COMPILED, method)
    targets = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    layers = [names for names in targets if "tmbench.attention" in names]
    assert len(layers) == 2, "one for dense layers and one for those with experts, of three or more each"
    slots = KvCache(2, 50)
    with torch.inference_mode(), running(model, plan_of(model, "dense"), COMPILED) as session:
        same(session.read_into(ids, CacheSlot(slots, 1))[0], expected)
    for number, (keys, values) in enumerate(slots.layers):
        latents = plain.layers[number]
        with torch.inference_mode():
            wanted = model.model.layers[number].self_attn.expand_kv(latents.keys, latents.values)
        for got, each in zip((keys, values), wanted, strict=True):
            same(got[1:, :, :40], each)


def test_the_mlp_sees_no_more_than_a_chunk(make_model, prompt):
    model = make_model("llama")
    seen: dict[str, list[int]] = {name: [] for name in ("gate", "query")}
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen["gate"].append(args[0].shape[1]))
        layer.self_attn.q_proj.register_forward_hook(lambda _, args, out: seen["query"].append(out.stride(1)))
    read(model, prompt(40), EAGER)
    assert seen["gate"] == [14, 14, 12] * 3 + [1]
    assert seen["query"] == [64] * 3 + [0], "the last layer's queries are one position, seen at all of them"


def test_a_prefill_without_a_method_is_plain(make_model, prompt):
    model, ids = make_model("llama"), prompt(30)
    with torch.inference_mode():
        same(Prefill(model)(ids), model(ids).logits[:, -1])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v3"])
def test_compiled_for_good(family, make_model, prompt):
    model = make_model(family, **FAMILIES[family])
    caches: list[Any] = []
    for length in (53, 53, 70):
        ids = (prompt(length) + len(caches)) % 97
        expected, plain = read(model, ids, PLAIN)
        got, cache = read(model, ids, COMPILED)
        same(got, expected, 1e-4)
        caches.append((cache, plain))
    # After all passes: what a graph has given away belongs to it no more.
    for cache, plain in caches:
        for kept, wanted in zip(tensors_of(cache), tensors_of(plain), strict=True):
            same(kept, wanted, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fused"), [("llama", 0), ("qwen2", 0), ("gemma", 0), ("phi3", 1), ("gpt_neox", 1), ("glm4_moe_lite", 0)]
)
def test_the_roofline_is_what_a_fast_prefill_multiplies(family, fused, make_model, prompt):
    """Counted by torch, operator by operator; a fused projection computes queries that nobody needs."""
    model = make_model(family, **FAMILIES[family])
    products = ("aten.mm", "aten.addmm")
    for length in (20, 41):
        with FlopCounterMode(display=False) as counter:
            read(model, prompt(length), EAGER, "dense")
        done = sum(flop for operator, flop in counter.get_flop_counts()["Global"].items() if str(operator) in products)
        unneeded = fused * 2 * 64 * Geometry.of(model).qk_head_dim * 4 * (length - 1)
        assert roofline.linear_flop(model, length) == done - unneeded


def test_the_roofline_counts_gpt_2s_linear_layers_which_are_called_convolutions(make_model):
    everywhere = 3 * 4 * 64 * 64 + 3 * 2 * 64 * 256 + 2 * 64 * 64
    once = 2 * 64 * 64 + 2 * 64 * 256 + 64 * 97
    assert roofline.linear_flop(make_model("gpt2"), 40) == 2 * (40 * everywhere + once)


def test_the_last_layer_needs_one_row_of_pairs():
    assert roofline.needed_pairs([100, 100, 100], heads=2, length=10) == 220
    assert roofline.needed_pairs([100, 100, 12], heads=2, length=10) == 212


@pytest.mark.slow
def test_two_models_at_once(make_model, prompt, graphs):
    first, ids = make_model("llama"), prompt(30)
    second = AutoModelForCausalLM.from_config(copy.deepcopy(first.config)).eval()
    expected = [read(model, ids, PLAIN, "dense")[0] for model in (first, second)]
    plan = plan_of(first, "dense", **WINDOW)
    with (
        torch.inference_mode(),
        applied_plan(first, plan) as one,
        applied_plan(second, plan) as two,
        prepared(first, one, COMPILED) as a,
        prepared(second, two, COMPILED) as b,
    ):
        for prefill, wanted in zip((a, b, a), (*expected, expected[0]), strict=True):
            same(prefill(ids)[0], wanted)
