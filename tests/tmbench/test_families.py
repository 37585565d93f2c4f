"""Each family's own output under dense attention, and its own under the triangle's mask in the layers that have it."""

from __future__ import annotations

import pytest
import torch
from served_families import FAMILIES, LATENT, REFUSED, ROUTED, SLIDING, TABLE, WRAPPED, found_of, small

from family_checks import (
    LENGTH,
    SERVED,
    TRIANGLE,
    check_dense,
    check_generate,
    check_prefill,
    check_triangle,
    masked,
    near,
    served_table,
    written,
)
from plans import plan_of
from tmbench import applied
from tmbench.engine.attention import applied_plan
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN, tensors_of
from tmbench.engine.prefill_kind import obstacle_of
from tmbench.engine.session import running
from tmbench.errors import UnsupportedModelError


@pytest.mark.slow
@pytest.mark.parametrize("family", SERVED)
def test_dense_is_the_models_own(family, prompt):
    check_dense(small(family), prompt(LENGTH, 2))


@pytest.mark.slow
@pytest.mark.parametrize("family", SERVED)
def test_deep_full_layers_have_the_triangle_and_no_others(family, prompt):
    check_triangle(small(family), prompt(LENGTH, 2))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", SERVED)
def test_generate_reads_by_the_method_and_decodes_densely(family, cache, prompt):
    check_generate(family, small(family), prompt(LENGTH), cache)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EAGER, COMPILED])
@pytest.mark.parametrize("family", SERVED)
def test_prompts_are_read_alike_and_decoded_after(family, kind, prompt, graphs, short_chunks):
    check_prefill(family, small(family), prompt(LENGTH), kind)


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
def test_the_table_says_how_each_family_is_served():
    table = served_table()
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
