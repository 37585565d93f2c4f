"""A method on a model equals the plain model under the method's mask; what cannot be right is refused."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache, T5Config, T5ForConditionalGeneration

from tmbench import applied
from tmbench.errors import UnsupportedModelError, UserError
from tmbench.models.attention_modules import windows
from tmbench_kernels import FlashPrefill, FlexPrefill, XAttention

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "mistral": {"sliding_window": None, "head_dim": 128},
    "olmo2": {"num_key_value_heads": 4},
    "granite": {"attention_multiplier": 0.3},
    "gpt_neox": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": None},
}
TRIANGLE: dict[str, Any] = {"n_init": 3, "n_local": 7, "last_n": 5}


def triangle_mask(length: int, n_init: int, n_local: int, last_n: int) -> torch.Tensor:
    """The mask by its definition, pair by pair."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1):
            mask[i, j] = j < n_init or i - j < n_local or i >= length - last_n
    return mask[None, None]


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_equals_the_plain_model(family, make_model, prompt):
    model, ids = make_model(family, **FAMILIES[family]), prompt(67, 2)
    with torch.no_grad():
        plain = model(ids).logits
        with applied(model, "dense") as session:
            torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)
    assert session.calls == 4
    assert session.backends == {"dense:sdpa"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_triangle_in_all_layers_equals_the_plain_model_under_its_mask(family, make_model, prompt):
    model, ids = make_model(family, **FAMILIES[family]), prompt(67, 2)
    with torch.no_grad():
        dense = model(ids).logits
        masked = model(ids, attention_mask=triangle_mask(67, **TRIANGLE)).logits
        with applied(model, "tri_mix", starting_layer=0, **TRIANGLE) as session:
            got = model(ids).logits
    torch.testing.assert_close(got, masked, rtol=1e-4, atol=1e-4)
    assert (got - dense).abs().max() > 0.05, "the mask must make a difference for this test to mean anything"
    assert session.calls == 4


def test_block_sparse_attention_in_all_layers_equals_the_plain_model_under_its_mask(make_model, prompt):
    """With next to no mass to cover, XAttention keeps the first block and the own one, whatever the data."""
    model, ids = make_model("qwen2", max_position_embeddings=1024), prompt(500, 2)
    i, j = torch.arange(500)[:, None], torch.arange(500)
    mask = ((j < 128) | (j // 128 == i // 128)) & (j <= i)
    with torch.no_grad():
        dense = model(ids).logits
        masked = model(ids, attention_mask=mask[None, None]).logits
        with applied(model, "xattention", threshold=1e-9):
            got = model(ids).logits
    torch.testing.assert_close(got, masked, rtol=1e-4, atol=1e-4)
    assert (got - dense).abs().max() > 0.05, "the mask must make a difference for this test to mean anything"


def test_shallow_layers_stay_dense(make_model, prompt):
    model, ids = make_model("llama"), prompt(40)
    seen = []
    with torch.no_grad(), applied(model, "tri_mix", starting_layer=3, **TRIANGLE) as session:
        session.observer = lambda layer, pattern, q, k, scale: seen.append((layer, pattern.name, tuple(q.shape)))
        model(ids)
    assert [(layer, name) for layer, name, _ in seen] == [(0, "dense"), (1, "dense"), (2, "dense"), (3, "triangle")]
    assert {shape for *_, shape in seen} == {(1, 4, 40, 16)}


def test_decoding_is_dense_over_a_complete_cache(make_model, prompt):
    model, ids = make_model("llama"), prompt(50)
    config = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        with applied(model, "tri_mix", starting_layer=0, **TRIANGLE) as session:
            got = model.generate(ids, generation_config=config)
        assert session.calls == 4, "one prefill; the decoding steps must not go through the patterns"
        cache = model(ids, attention_mask=triangle_mask(50, **TRIANGLE), use_cache=True)
        token, tokens, past = cache.logits[:, -1:].argmax(-1), [], cache.past_key_values
        for _ in range(6):
            tokens.append(int(token))
            step = model(token, past_key_values=past, use_cache=True)
            token, past = step.logits[:, -1:].argmax(-1), step.past_key_values
    assert got[0, 50:].tolist() == tokens


def test_a_static_cache_holds_more_keys_than_queries(make_model, prompt):
    model, ids = make_model("llama"), prompt(33)
    with torch.no_grad(), applied(model, "tri_mix", starting_layer=0, **TRIANGLE):
        plain = model(ids).logits
        static = model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64), use_cache=True).logits
    torch.testing.assert_close(static, plain)


def test_the_model_is_restored_after_an_error(make_model, prompt):
    model, ids = make_model("llama"), prompt(20)
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(RuntimeError, match="stop"), applied(model, "streaming", n_init=1, n_local=2):
            raise RuntimeError("stop")
        assert model.config._attn_implementation == "sdpa"
        assert not [name for module in model.modules() for name in vars(module) if "tmbench" in name]
        torch.testing.assert_close(model(ids).logits, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parameters", "pattern"),
    [
        ("flexprefill", {"gamma": 0.3, "tau": 0.2, "min_budget": 100}, FlexPrefill(0.3, 0.2, 100)),
        ("xattention", {"stride": 8, "threshold": 0.2, "first_chunk": 128}, XAttention(8, 0.2, 128)),
        ("flashprefill", {"alpha": 0.9}, FlashPrefill(0.9)),
    ],
)
def test_block_sparse_methods_run_their_patterns(method, parameters, pattern, make_model, prompt):
    """The prompt is longer than FlashPrefill's window and last queries together."""
    model, ids = make_model("llama", max_position_embeddings=2048), prompt(1300)
    seen = []

    def observe(layer, used, q, k, scale):
        assert used == pattern
        seen.append(used.mask(q, k, scale=scale).sum())

    with torch.no_grad():
        dense = model(ids).logits
        with applied(model, method, **parameters) as session:
            session.observer = observe
            sparse = model(ids).logits
    assert len(seen) == 4
    assert 0 < sum(seen) < 4 * 4 * 1300 * 1301 // 2
    assert torch.isfinite(sparse).all()
    assert (sparse - dense).abs().max() > 1e-3
    torch.testing.assert_close(sparse[:, :128], dense[:, :128], rtol=1e-4, atol=1e-4)


def test_two_models_run_two_methods_at_once(make_model, prompt):
    first, second, ids = make_model("llama"), make_model("llama"), prompt(30)
    with torch.no_grad(), applied(first, "dense"), applied(second, "streaming", n_init=1, n_local=2):
        assert (first(ids).logits - second(ids).logits).abs().max() > 0.05


def test_a_second_method_on_one_model_is_refused(make_model):
    model = make_model("llama")
    with (
        applied(model, "dense"),
        pytest.raises(UnsupportedModelError, match="already running dense"),
        applied(model, "tri_mix"),
    ):
        pass


def test_a_model_that_shares_its_config_is_told_so(make_model, prompt):
    model = make_model("llama")
    twin = AutoModelForCausalLM.from_config(model.config)
    twin.config = model.config
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config = model.config
    with applied(model, "dense"), pytest.raises(UnsupportedModelError, match="shares its config"):
        twin(prompt(8))


def test_padding_behind_a_text_is_refused(make_model, prompt):
    model, ids = make_model("llama"), prompt(12, 2)
    mask = torch.ones_like(ids)
    with applied(model, "dense"):
        model(ids, attention_mask=mask)
        mask[0, 9:] = 0
        with pytest.raises(UnsupportedModelError, match="padding behind"):
            model(ids, attention_mask=mask)


def test_a_chunked_prefill_is_refused(make_model, prompt):
    model, ids = make_model("llama"), prompt(12)
    with applied(model, "dense"):
        past = model(ids, use_cache=True).past_key_values
        with pytest.raises(UnsupportedModelError, match="5 tokens continue a cache of 12"):
            model(prompt(5), past_key_values=past)


def test_a_mask_of_the_callers_own_is_refused(make_model, prompt):
    model = make_model("llama")
    with applied(model, "dense"), pytest.raises(UnsupportedModelError, match="layer 0 was given a mask"):
        model(prompt(12), attention_mask=triangle_mask(12, **TRIANGLE))


def test_packed_sequences_are_refused(make_model, prompt):
    model = make_model("llama")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with applied(model, "dense"), pytest.raises(UnsupportedModelError, match="packed"):
        model(prompt(6), position_ids=positions, use_cache=False)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {}),
        ("phi3", {}),
    ],
)
def test_a_window_that_no_query_reaches_changes_nothing_and_one_that_is_reached_is_refused(
    family, changes, make_model, prompt
):
    model, wide = (make_model(family, sliding_window=window, **changes) for window in (24, 512))
    with torch.inference_mode():
        expected = wide(prompt(24)).logits
        with applied(model, "dense"):
            torch.testing.assert_close(model(prompt(24)).logits, expected, atol=1e-4, rtol=1e-4)
        with applied(model, "tri_mix"), pytest.raises(UnsupportedModelError, match=r"layer \d has a sliding window of 24"):
            model(prompt(25))


def test_a_dynamic_rotary_embedding_does_not_remember_longer_prompts(make_model, prompt):
    """transformers keeps the frequencies of the longest prompt so far for all shorter ones past the trained positions."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model, ids = make_model("llama", max_position_embeddings=64, rope_parameters=scaling), prompt(200)
    with torch.inference_mode():
        expected = model(ids[:, :100]).logits
        model(ids)
        assert (model(ids[:, :100]).logits - expected).abs().max() > 0.05
        with applied(model, "dense"):
            torch.testing.assert_close(model(ids[:, :100]).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_window_that_is_switched_off_is_none(family, make_model, prompt):
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    model = make_model(family, sliding_window=16, use_sliding_window=False, **moe)
    assert not windows(model)
    with torch.inference_mode():
        expected = model(prompt(40)).logits
        with applied(model, "dense"):
            torch.testing.assert_close(model(prompt(40)).logits, expected, atol=1e-4, rtol=1e-4)


def test_models_without_the_interface_are_refused():
    config = T5Config(vocab_size=97, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0)
    with pytest.raises(UnsupportedModelError), applied(T5ForConditionalGeneration(config), "dense"):
        pass


def test_layers_of_another_kind_are_refused(make_model):
    model = make_model("llama")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 5
    model.config = config
    with pytest.raises(UnsupportedModelError, match="5 layers but 4 attention modules"), applied(model, "dense"):
        pass


def test_bad_parameters_name_the_option(make_model):
    model = make_model("llama")
    for changes, message in (
        ({"starting_layer": 5}, "--starting-layer must be between 0 and 4"),
        ({"starting_layer": -1}, "--starting-layer"),
        ({"n_local": -1}, "--n-local must be 0 or more"),
        ({"n_init": 0, "n_local": 0}, "both 0"),
    ):
        with pytest.raises(UserError, match=message), applied(model, "tri_mix", **cast(dict[str, Any], changes)):
            pass
    with pytest.raises(UserError, match="gamma must be above 0"), applied(model, "tri_mix_flexprefill", gamma=0):
        pass
    with pytest.raises(UserError, match="choose from dense, tri_mix"), applied(model, "trimix"):
        pass
