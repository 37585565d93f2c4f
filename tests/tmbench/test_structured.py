"""Structured weights: each feature, looked for in what a model's own layers hand to attention, and the density."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tmbench.engine.attention import applied
from tmbench.errors import UserError
from tmbench.models import loading, parallel, sharding, structured
from tmbench.models.loading import LoadedModel
from tmbench_kernels import VerticalSlash
from tmbench_kernels.scores import last_query_mass

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True}
BUILDS = ("llama", "qwen3", "qwen3_moe")
"""Families that differ in more than biases and windows."""
WAVELENGTHS = 2 * math.pi * 5e5 ** (torch.arange(64, dtype=torch.float64) / 64)


@pytest.fixture(scope="module")
def build():
    """``build("llama", **config)``: a model with structured weights in evaluation mode."""

    def make(family="llama", seed=0, **changes):
        experts = EXPERTS if family == "qwen3_moe" else {}
        config = CONFIG_MAPPING[family](**(SHAPE | experts | changes))
        model = AutoModelForCausalLM.from_config(config).eval()
        structured.fill(model, seed)
        return model

    return make


@pytest.fixture(scope="module")
def read():
    """What each layer's attention is given for a prompt of random tokens, or of the given ones: (q, k) by layer."""

    def run(model, length, ids=None):
        seen = []
        if ids is None:
            ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.inference_mode(), applied(model, "streaming", n_local=256) as session:
            session.observer = lambda layer, pattern, q, k, scale: seen.append((q, k))
            model(input_ids=ids, logits_to_keep=1)
        return seen

    return run


@pytest.fixture(scope="module")
def heads_of():
    """``heads_of(model, ids)``: each layer's queries and keys before rotary embedding, ``[tokens, heads, head_dim]``."""

    def run(model, ids):
        seen = []
        for layer in model.model.layers:
            for kind in "qk":
                last = getattr(layer.self_attn, f"{kind}_norm", getattr(layer.self_attn, f"{kind}_proj"))
                last.register_forward_hook(lambda _module, _inputs, out: seen.append(out[0]))
        with torch.inference_mode():
            model(input_ids=ids, logits_to_keep=1)
        by_head = [one.reshape(ids.shape[1], -1, model.config.head_dim) for one in seen]
        return list(zip(by_head[::2], by_head[1::2], strict=True))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [128, 8])
@pytest.mark.parametrize("family", structured.FAMILIES)
def test_queries_and_keys_are_as_drawn_in_every_layer(build, heads_of, monkeypatch, family, head_dim):
    """Their mean over many tokens is what was drawn, whatever norm they went through, and the noise is of the named size."""
    drawn, draw = [], structured.draw_constants
    monkeypatch.setattr(structured, "draw_constants", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    model = build(family, head_dim=head_dim, sliding_window=None)
    ids = torch.randint(4096, (1, 2048), generator=torch.Generator().manual_seed(6))
    for constants, (q, k) in zip(drawn, heads_of(model, ids), strict=True):
        assert q[..., -1].any() == k[..., -1].any() == (not family.startswith("qwen3")), "what norms are given is taken away"
        # Of keys the first ones are sinks.
        for found, expected, noise in (
            (q, constants.queries, structured.QUERY_NOISE),
            (k[16:], constants.keys, structured.KEY_NOISE),
        ):
            torch.testing.assert_close(found.mean(0), expected, rtol=0.03, atol=0.25)
            spread = found[:, expected.any(1), :-1].std(0)
            assert spread.mean() == pytest.approx(noise, rel=0.05)
            assert spread.max() < 1.5 * noise


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [128, 8])
def test_norms_of_heads_change_no_query_and_no_key(build, heads_of, head_dim):
    """Of one seed a family with norms has the weights of one without, and the same of every token, be it sink or column."""
    plain, normed = (build(family, head_dim=head_dim) for family in ("llama", "qwen3"))
    ids = torch.randint(4096, (1, 1024), generator=torch.Generator().manual_seed(6))
    ids[0, 512:] = column_tokens(plain).nonzero().flatten().repeat(32)
    for expected, found in zip(heads_of(plain, ids), heads_of(normed, ids), strict=True):
        for one, other in zip(expected, found, strict=True):
            # In layer 0 one head has queries of 0, and the last entry is only noise.
            one, other = (part[:, one.any(-1).all(0), :-1] for part in (one, other))
            assert torch.cosine_similarity(one, other, dim=-1).min() > 0.999
            ratio = other.norm(dim=-1) / one.norm(dim=-1)
            # Tokens differ a little in size, by which a hidden state is divided.
            assert (ratio - 1).abs().max() < 0.15
            for tokens in (slice(8), slice(8, 512), slice(512, None)):
                assert ratio[tokens].mean() == pytest.approx(1, abs=0.05 if tokens.stop == 8 else 0.02)


def column_tokens(model):
    return model.model.embed_tokens.weight[:, structured.COLUMNS.start : structured.COLUMNS.stop].any(1)


@pytest.mark.slow
@pytest.mark.parametrize("family", structured.FAMILIES)
def test_every_layer_has_columns(build, read, family):
    """With every other key a column, slashes and noise average out: what is left is what being a column adds to a logit."""
    model = build(family, sliding_window=None)
    columns = column_tokens(model).nonzero().flatten()
    assert len(columns) == 4096 // structured.COLUMN_EVERY
    ids = torch.randint(4096, (1, 4096), generator=torch.Generator().manual_seed(1))
    ids[0, ::2] = columns[torch.randint(len(columns), (2048,), generator=torch.Generator().manual_seed(2))]
    low, high = structured.COLUMN_LOGITS
    # An embedding with one more part of half its size is normalised down by so much.
    shrunk = (1 + structured.COLUMN_SIZE**2) ** -0.5
    for layer, (q, k) in enumerate(read(model, 4096, ids)):
        for head in range(layer == 0, 8):
            logits = (q[0, head, -64:] @ k[0, head // 4, 8:-64].T).mean(0) / 128**0.5
            added = logits[::2].mean() - logits[1::2].mean()
            assert low * shrunk - 0.7 < added < high * shrunk + 0.7


@pytest.mark.slow
@pytest.mark.parametrize("family", BUILDS)
def test_every_layer_but_the_first_has_sinks(build, read, family):
    for layer, (q, k) in enumerate(read(build(family), 4096)):
        columns, _ = last_query_mass(q, k, 128**-0.5, 64)
        first = columns[0, :, :4].sum(1) / columns[0].sum(1)
        # The heads' sinks differ in strength: some take nearly all that there is.
        assert (first.max() > 0.8) == (layer > 0)
        assert (first.mean() > 0.2) == (layer > 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", BUILDS)
def test_one_head_of_the_first_layer_averages_over_all_keys(build, read, family):
    q, _ = read(build(family), 300)[0]
    assert not q[0, 0].any()
    assert q[0, 1:].any()


@pytest.mark.slow
@pytest.mark.parametrize("family", BUILDS)
def test_slashes_are_a_wavelength_apart_and_bands_are_local(build, read, family):
    """The mean logit of each distance is a cosine of its head's wavelength, found here by a search over all wavelengths."""
    model = build(family)
    distances = torch.arange(1500)
    kinds = {"slash": 0, "local": 0}
    for q, k in read(model, 2048)[1:]:
        for head in range(8):
            logits = (q[0, head, -512:] @ k[0, head // 4].T) / 128**0.5
            by_distance = torch.stack([logits.diagonal(2048 - 512 - int(n)).mean() for n in distances]).double()
            spectrum = {}
            for wavelength in WAVELENGTHS[20:30].tolist():
                angle = 2 * math.pi * distances / wavelength
                waves = torch.stack([angle.cos(), angle.sin(), torch.ones_like(angle)], dim=1).double()
                fitted = waves @ torch.linalg.lstsq(waves, by_distance[:, None]).solution
                spectrum[wavelength] = 1 - ((by_distance[:, None] - fitted) ** 2).mean() / by_distance.var()
            best = max(spectrum, key=spectrum.__getitem__)
            if spectrum[best] > 0.8:
                kinds["slash"] += 1
                assert structured.SLASH_WAVELENGTHS[0] <= best <= structured.SLASH_WAVELENGTHS[1]
                assert by_distance.max() - by_distance.min() > structured.SLASH_LOGITS[0]
            else:
                kinds["local"] += 1
                assert by_distance.argmax() == 0
                assert by_distance[0] - by_distance[60:].max() > 1
    assert kinds["slash"] > kinds["local"] > 0


def test_offsets_lie_where_the_first_peak_is():
    """A query component turned back by an angle meets a key's at that angle's distance: by plain rotation of pairs."""
    frequencies = 2 * math.pi / WAVELENGTHS
    constants = structured.draw_constants(frequencies, 4, 1, torch.Generator().manual_seed(3))
    slashes = ((WAVELENGTHS >= 400) & (WAVELENGTHS <= 2500)).nonzero().flatten()
    found = 0
    for query in constants.queries.double():
        for pair in slashes.tolist():
            a, b = query[pair], query[pair + 64]
            if a == b == 0:
                continue
            found += 1
            offset = (math.atan2(-b, a) / frequencies[pair]) % WAVELENGTHS[pair]
            logits = []
            for distance in range(int(WAVELENGTHS[pair])):
                angle = frequencies[pair] * distance
                key = constants.keys[0, pair].double()
                logits.append((a * math.cos(angle) - b * math.sin(angle)) * key / 128**0.5)
            peak = max(range(len(logits)), key=logits.__getitem__)
            assert abs(peak - offset) <= 1 or abs(peak - offset) >= WAVELENGTHS[pair] - 2
            assert structured.SLASH_LOGITS[0] <= logits[peak] + 0.01 <= structured.SLASH_LOGITS[1] + 0.02
    assert found >= 2


@pytest.mark.slow
@pytest.mark.parametrize("family", BUILDS)
def test_the_structure_lasts_through_all_layers(build, family):
    """The channels that projections read keep their part of the hidden state, whatever the layers add."""
    model = build(family, num_hidden_layers=24)
    ids = torch.randint(4096, (1, 1024), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
    shares = []
    for state in states:
        size = state[0].square().mean(1).sqrt()
        shares.append(float((state[0, 8:, structured.CONSTANT] / size[8:]).mean()) / 512**0.5)
    assert shares[0] == pytest.approx(structured.CONSTANT_SIZE, abs=0.03)
    assert shares[-1] == pytest.approx(shares[0], rel=0.1)
    # Of 23 layers the MLPs alone make that part, and attention's averages little more.
    added = (states[-1] - states[0])[0, 8:, structured.CHANNELS :].square().mean().sqrt()
    assert added == pytest.approx(structured.ADDED_SIZE * 0.5**0.5, rel=0.1)
    sinks = torch.stack(states)[1:, 0, :, structured.SINK]
    assert (sinks[:, 0] > 0.8 * structured.SINK_SIZE * 512**0.5).all()
    assert (sinks[:, 8:].abs() < 0.1 * sinks[:, :1]).all(), "only the first positions are sinks"


@pytest.mark.slow
def test_a_seed_is_one_structure(build):
    first, again, other = build(), build(), build(seed=1)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.model.layers[1].self_attn.q_proj.weight, other.model.layers[1].self_attn.q_proj.weight)


@pytest.mark.slow
@pytest.mark.parametrize("family", BUILDS)
def test_a_part_at_a_time_it_is_the_same_model_and_cut_a_part_of_it(build, monkeypatch, family):
    whole = build(family)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole.config)
    # Experts are not split over ranks.
    plan = {} if family == "qwen3_moe" else sharding.plan_of(family, model, 2)
    begin = partial(sharding.make_real, model, device=torch.device("cpu"))
    structured.fill(model, 0, begin, end=partial(sharding.split, model, plan))
    found, expected = dict(model.named_modules()), dict(whole.named_modules())
    assert sum(isinstance(module, sharding.Shard) for module in found.values()) == (3 * 7 if plan else 0)
    for name, module in found.items():
        cut = module.part if isinstance(module, sharding.Shard) else lambda parameter: parameter
        for own, parameter in module.named_parameters(recurse=False):
            assert torch.equal(parameter, cut(getattr(expected[name], own))), f"{name}.{own}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"norm_topk_prob": False}, {"mlp_only_layers": [0, 2]}, {"decoder_sparse_step": 2}], ids=str
)
def test_the_first_token_is_marked_whichever_experts_it_has(build, changes):
    model = build("qwen3_moe", num_experts=32, num_experts_per_tok=4, **changes)
    ids = torch.randint(4096, (64, 32), generator=torch.Generator().manual_seed(8))
    used = {}
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate.register_forward_hook(
                lambda _module, _inputs, out, index=index: used.update({index: out[2].flatten().bincount(minlength=32)})
            )
    with torch.inference_mode():
        marks = model(input_ids=ids, output_hidden_states=True).hidden_states[1][..., structured.SINK]
    marks = marks / (structured.SINK_SIZE * 512**0.5)
    # They turn on steeply where the average is large, which a token's own size shifts a little.
    assert marks[:, 0].mean() == pytest.approx(0.95, abs=0.05)
    assert marks[:, 0].min() > 0.25
    assert marks[:, 24:].abs().max() < 0.1
    assert len(used) == (1 if "mlp_only_layers" in changes or "decoder_sparse_step" in changes else 3)
    for tokens in used.values():
        assert tokens.min() > 0.7 * tokens.float().mean()
        assert tokens.max() < 1.3 * tokens.float().mean()


@pytest.mark.slow
def test_biases_do_not_disturb(build):
    model = build("qwen2")
    biases = [value for name, value in model.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 9
    assert not any(bias.any() for bias in biases)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_published_budgets_cover_a_fifth_at_128k(build, family):
    """What README promises, at full length: the keys of one layer, and of the queries those that choose."""
    length, heads = 131072, 16
    model = build(family, num_attention_heads=heads, num_key_value_heads=4, num_hidden_layers=2, vocab_size=32768)
    ids = torch.randint(32768, (1, length), generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[1]
    q_norm, k_norm = (getattr(layer.self_attn, name, torch.nn.Identity()) for name in ("q_norm", "k_norm"))
    with torch.inference_mode():
        hidden = layer.input_layernorm(model.model.embed_tokens(ids))
        turns = model.model.rotary_emb(hidden, torch.arange(length)[None])
        q = torch.zeros(1, heads, length, 128)
        q[:, :, -64:] = q_norm(layer.self_attn.q_proj(hidden[:, -64:]).view(1, 64, heads, 128)).transpose(1, 2)
        k = k_norm(layer.self_attn.k_proj(hidden).view(1, length, 4, 128)).transpose(1, 2)
        q[:, :, -64:], k = (rotated(x, *(turn[:, -x.shape[2] :] for turn in turns)) for x in (q[:, :, -64:], k))
        density = {
            budget: VerticalSlash((budget,)).pairs(q, k) / (heads * length * (length + 1) / 2)
            for budget in ((512, 2048), (1000, 6096))
        }
    # All heads of an 8B model average to 0.15 to 0.25; so few of them scatter around that by 0.01.
    assert all(0.14 <= part <= 0.26 for part in density.values()), density


def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "olmo2",
            {},
            "made for the families llama, mistral, qwen2, qwen3, qwen3_moe, not olmo2: use --weights random",
        ),
        ("gpt2", {}, "not gpt2: use --weights random"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "needs default or llama3 rotary embeddings, not yarn",
        ),
    ],
)
def test_other_models_are_refused_in_one_sentence(tmp_path, family, changes, words):
    CONFIG_MAPPING[family](**changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        loading.load(str(tmp_path), weights="structured", device="cpu")


def test_heads_must_have_room_for_the_structure(make_model):
    with pytest.raises(UserError, match="heads of 8 entries or more"):
        structured.fill(make_model("llama", head_dim=4))


@pytest.mark.slow
def test_loading_says_what_the_weights_are(tmp_path):
    CONFIG_MAPPING["llama"](**SHAPE, max_position_embeddings=512).save_pretrained(tmp_path)
    loaded = loading.load(str(tmp_path), weights="structured", device="cpu", dtype="bfloat16")
    assert isinstance(loaded, LoadedModel)
    assert (loaded.row_fields()["weights"], loaded.dtype, loaded.max_length) == ("structured", "bfloat16", None)
    embedding = loaded.model.model.embed_tokens.weight
    assert embedding[:, structured.CONSTANT].unique().numel() == 1
