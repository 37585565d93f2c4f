"""Each family's own output under dense attention, and its own under the triangle's mask in the layers that have it."""

from __future__ import annotations

import csv
from contextlib import contextmanager

import pytest
import torch
import transformers
from served_families import (
    FAMILIES,
    LATENT,
    NO_STATIC_CACHE,
    REFUSED,
    ROUTED,
    SLIDING,
    TABLE,
    WRAPPED,
    found_of,
    small,
)
from transformers import GenerationConfig

from plans import plan_of
from tmbench import applied
from tmbench.engine.attention import applied_plan
from tmbench.engine.calls import cache_name
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN, Kind, tensors_of
from tmbench.engine.prefill_kind import obstacle_of
from tmbench.engine.session import running
from tmbench.errors import UnsupportedModelError
from tmbench.models.attention_modules import attention_modules

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
LENGTH = 45
"""Longer than the windows and chunks, and than three blocks of a recurrence."""
NEW = 5
TRIANGLE = {"n_init": 3, "n_local": 7, "last_n": 5}
SERVED = [*FAMILIES, *WRAPPED]


@pytest.fixture(scope="module")
def table():
    """How docs/models.md says that each family is served, by its name."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {line["family"]: line for line in csv.DictReader(file)}


def near(got, expected):
    """Equal up to 1e-4 of the root mean square."""
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def triangle_mask(length, keys):
    """The mask by its definition, pair by pair; keys beyond the prompt are those of an empty static cache."""
    i, j = torch.arange(length)[:, None], torch.arange(keys)
    kept = (j < TRIANGLE["n_init"]) | (i - j < TRIANGLE["n_local"]) | (i >= length - TRIANGLE["last_n"])
    # In numbers, as some families add their masks to the logits.
    return torch.zeros(length, keys).masked_fill(~(kept & (j <= i)), torch.finfo(torch.float32).min)[None, None]


@contextmanager
def masked(model, layers, keys=LENGTH):
    """Inside, transformers' own attention of these layers sees the pairs of the triangle alone, in prompts."""

    def mask(module, args, kwargs):
        length = (args[0] if args else kwargs["hidden_states"]).shape[1]
        if length > 1:
            kwargs["attention_mask"] = triangle_mask(length, keys)
        return args, kwargs

    chosen = [module for module in attention_modules(model) if module.layer_idx in layers]
    hooks = [module.register_forward_pre_hook(mask, with_kwargs=True) for module in chosen]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def written(model, ids, **options):
    """What transformers' own greedy decoding writes."""
    if model.config.model_type == "llama4_text" and "cache_implementation" in options and TRANSFORMERS < (5, 18):
        pytest.skip("transformers 5.17 fails to make the masks of Llama 4 for a static cache")
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **options)
    return model.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", SERVED)
def test_dense_is_the_models_own(family, prompt):
    model, ids = small(family), prompt(LENGTH, 2)
    with torch.inference_mode():
        expected = model(ids).logits
        with applied(model, "dense") as session:
            near(model(ids).logits, expected)
            session.check_complete()


@pytest.mark.slow
@pytest.mark.parametrize("family", SERVED)
def test_deep_full_layers_have_the_triangle_and_no_others(family, prompt):
    model, ids = small(family), prompt(LENGTH, 2)
    deep = plan_of(model, "tri_mix", **TRIANGLE)
    layers = [layer for layer, pattern in deep.by_layer.items() if pattern.name == "triangle"]
    assert layers, "half of the full layers, the deeper ones"
    assert len(layers) == (len(deep.by_layer) + 1) // 2
    with torch.inference_mode():
        dense = model(ids).logits
        with masked(model, layers):
            expected = model(ids).logits
        with applied_plan(model, deep):
            near(model(ids).logits, expected)
    assert (expected - dense).norm() > 0.01 * dense.norm(), "the mask must make a difference for this test to mean anything"


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", SERVED)
def test_generate_reads_by_the_method_and_decodes_densely(family, cache, prompt):
    if cache == "static" and family in NO_STATIC_CACHE:
        pytest.skip("transformers has no such cache for it")
    model, ids = small(family), prompt(LENGTH)
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    plan = plan_of(model, "tri_mix", **TRIANGLE)
    layers = [layer for layer, pattern in plan.by_layer.items() if pattern.name == "triangle"]
    with torch.inference_mode():
        # The last token that is written is never read.
        with masked(model, layers, keys=LENGTH if cache == "dynamic" else LENGTH + NEW - 1):
            expected = written(model, ids, **options)
        with applied_plan(model, plan):
            assert written(model, ids, **options) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EAGER, COMPILED])
@pytest.mark.parametrize("family", SERVED)
def test_prompts_are_read_alike_and_decoded_after(family, kind, prompt, graphs, short_chunks, table):
    model, ids = small(family), prompt(LENGTH)
    found: Kind = PLAIN if obstacle_of(model) else kind
    assert (found == PLAIN) == table[family]["prompts"].startswith("as transformers, ")
    plan = plan_of(model, "tri_mix", **TRIANGLE)
    layers = [layer for layer, pattern in plan.by_layer.items() if pattern.name == "triangle"]
    with torch.inference_mode():
        with masked(model, layers):
            output = model(ids, use_cache=True)
            cache = getattr(output, "cache", None) or output.past_key_values
            held = [tensor.clone() for tensor in tensors_of(cache)]
            after = model(torch.tensor([[5]]), use_cache=True, **{cache_name(model): cache}).logits[:, -1]
        with running(model, plan, found) as session:
            decoding = session.read(ids)
            near(decoding.logits, output.logits[:, -1])
            kept = tensors_of(decoding.cache)
            assert len(kept) == len(held)
            for got, expected in zip(kept, held, strict=True):
                near(got, expected)
            near(decoding.read([5]), after)


HYBRIDS = [
    *[("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": count}) for count in (0, 4)],
    ("granitemoehybrid", {"layer_types": ["mamba", "attention", "attention", "mamba"]}),
    *[
        ("nemotron_h", {"layers_block_type": ["attention", "mlp", "mamba", last]})
        for last in ("attention", "moe", "mlp", "mamba")
    ],
    ("minimax", {"layer_types": ["full_attention", "linear_attention"] * 2}),
]
"""Hybrids that end with another layer than full attention, have no experts, or nothing between two attentions."""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), HYBRIDS)
def test_hybrids_may_end_with_a_layer_of_any_kind(family, changes, make_model, prompt, graphs, short_chunks):
    model = make_model(family, **(FAMILIES[family] | changes))
    ids = prompt(LENGTH)
    found = {}
    for kind in (PLAIN, EAGER, COMPILED):
        with torch.inference_mode(), running(model, plan_of(model, "tri_mix", **TRIANGLE), kind) as session:
            decoding = session.read(ids)
            found[kind] = [decoding.logits, *(tensor.clone() for tensor in tensors_of(decoding.cache)), decoding.read([5])]
    assert not obstacle_of(model)
    for kind in (EAGER, COMPILED):
        for got, expected in zip(found[kind], found[PLAIN], strict=True):
            near(got, expected)


def test_a_recurrence_beside_attention_is_named_as_the_reason_for_reading_plainly():
    assert obstacle_of(small("falcon_h1")) == "as its layers have a recurrence beside their attention"


def test_two_attentions_in_a_layer_are_named_as_the_reason_for_reading_plainly(make_model):
    changes = ROUTED | LATENT | {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2}
    assert obstacle_of(make_model("longcat_flash", **changes)) == "as its layers have several attentions"


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        *[("gemma3_text", SLIDING | {"sliding_window": tokens}, f"{tokens} token") for tokens in (1, 0, -3)],
        ("gemma3_text", SLIDING | {"sliding_window": None}, "0 tokens"),
        ("mistral", {"sliding_window": 1}, "1 token"),
        ("llama4_text", FAMILIES["llama4_text"] | {"attention_chunk_size": 1}, "1 token"),
    ],
)
def test_windows_and_chunks_that_hold_no_other_token_are_refused(family, changes, found, make_model):
    """transformers' cache keeps all keys of such a window, and decoding would see them."""
    model = make_model(family, **changes)
    for method in ("dense", "tri_mix"):
        with (
            pytest.raises(UnsupportedModelError, match=f"layer 0 of .* has windows or chunks of {found}"),
            applied(model, method),
        ):
            pass


@pytest.mark.slow
def test_layers_of_each_kind_share_a_graph(make_model, prompt, graphs):
    kinds = ["sliding_attention", "full_attention"] * 4
    model = make_model("gemma3_text", num_hidden_layers=8, sliding_window=16, layer_types=kinds)
    counts = []
    for method in ("dense", "tri_mix"):
        with torch.inference_mode(), running(model, plan_of(model, method, **TRIANGLE), COMPILED) as session:
            for length in (LENGTH, 2 * LENGTH):
                session.read(prompt(length))
                assert {name.partition(":")[0] for name in session.applied.backends} >= {"window", "dense"}
                counts.append(len(graphs))
    # Windows, full attention, the last layer, MLPs; and for the second length once more.
    assert counts[1] == counts[-1] <= 8


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma4_text", "mimo_v2_flash"])
def test_one_compiled_model_reads_batches_and_prompts_of_one_and_of_more(family, prompt, graphs):
    """Each has graphs of its own, and so has each kind of layer: more than torch keeps of one function."""
    model = small(family)
    plan = plan_of(model, "tri_mix", **TRIANGLE)
    for length, batch in ((45, 1), (45, 3), (1, 1), (1, 2)):
        ids, read = prompt(length, batch), []
        for kind in (EAGER, COMPILED):
            with torch.inference_mode(), running(model, plan, kind) as session:
                read.append(session.read(ids).logits)
        near(read[1], read[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "gemma2", "llama4_text"])
def test_windows_and_chunks_are_computed_by_a_kernel_and_no_mask_is_made(family, prompt, monkeypatch):
    def make(*sizes, **about):
        raise AssertionError("a mask was made")

    model, ids = small(family), prompt(LENGTH)
    with torch.inference_mode():
        expected = model(ids).logits
        monkeypatch.setattr("tmbench.engine.own_attention.sdpa_mask", make)
        with applied(model, "dense") as session:
            near(model(ids).logits, expected)
    assert session.backends & {"window:torch-banded", "chunks:sdpa"}


@pytest.mark.slow
def test_sinks_of_any_size_are_those_of_the_model(prompt):
    """Sinks that take nearly all of the weight, and hardly any."""
    model, ids = small("gpt_oss"), prompt(LENGTH)
    plan = plan_of(model, "tri_mix", **TRIANGLE)
    for size in (-8.0, 8.0):
        for module in model.modules():
            if hasattr(module, "sinks"):
                module.sinks.data = size + torch.arange(4.0)
        with torch.inference_mode():
            with masked(model, [3]):
                expected = model(ids).logits
            with applied_plan(model, plan):
                near(model(ids).logits, expected)


@pytest.mark.parametrize("family", REFUSED)
def test_what_no_method_can_be_applied_to_is_refused_by_name(family):
    model = small(family)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=REFUSED[family][1]), applied(model, "tri_mix"):
        pass
    assert model.config._attn_implementation == before


@pytest.mark.slow
def test_the_table_says_how_each_family_is_served(table):
    assert list(table) == [*FAMILIES, *WRAPPED, *REFUSED]
    for family, line in table.items():
        # Transformers 5.17 has other words for layers with an indexer.
        found = {
            name: value.replace("deepseek_sparse_attention", "indexed_attention").replace("qwen_sparse", "indexed")
            for name, value in found_of(family).items()
        }
        assert line == found, f"{TABLE.name} is older than the code: run python tests/tmbench/served_families.py"


@pytest.mark.slow
@pytest.mark.parametrize("window", [7, 16, 60])
@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_windows_of_any_size_stay_the_models_own(family, window, make_model, prompt):
    """One full layer in six, and windows that no query reaches."""
    changes = {
        "num_hidden_layers": 6,
        "sliding_window": window,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    }
    model, ids = make_model(family, **changes), prompt(LENGTH)
    plan = plan_of(model, "tri_mix", **TRIANGLE)
    assert list(plan.by_layer) == [5]
    with torch.inference_mode():
        with masked(model, [5]):
            expected = model(ids).logits
        with applied_plan(model, plan):
            near(model(ids).logits, expected)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_where_every_layer_has_a_window_dense_is_the_models_own_beyond_it(family, make_model, prompt):
    model, ids = make_model(family, sliding_window=16), prompt(LENGTH)
    assert obstacle_of(model)
    with torch.inference_mode():
        expected, text = model(ids).logits, written(model, ids)
        with applied(model, "dense") as session:
            near(model(ids).logits, expected)
            session.check_complete()
            assert written(model, ids) == text
        with applied(model, "streaming"), pytest.raises(UnsupportedModelError, match="layer 0 has a sliding window of 16"):
            model(ids)
