"""Several texts decode together: each gets the tokens that it gets alone."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, MOE
from plans import plan_of
from tmbench.engine.batch import GRAPH, STEPPED, Batch
from tmbench.engine.compiled_layers import compiled
from tmbench.engine.decode import greedy
from tmbench.engine.decode_kind import step_kind
from tmbench.engine.kv_cache import CacheSlot, KvCache
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN
from tmbench.engine.session import running
from tmbench.errors import NotFiniteError

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
WINDOW = {"starting_layer": 1, "n_init": 2, "n_local": 9, "last_n": 4}
LENGTHS = (50, 31, 64, 40, 57)


@pytest.fixture
def texts(prompt):
    return [prompt(length).to(DEVICE) for length in LENGTHS]


@torch.inference_mode()
def one_by_one(model, plan, prompts, most):
    found = []
    for ids in prompts:
        with running(model, plan, EAGER) as session:
            found.append(greedy(session.read(ids), most)[0].tolist())
    return found


@torch.inference_mode()
def together(model, plan, prompts, most, *, size, kind=EAGER, batch=None):
    """The new tokens of each prompt, and the batch that wrote them."""
    room = max(ids.shape[1] for ids in prompts) + most
    batch = batch or Batch(model, room, most, size=size, graph=step_kind(model, EAGER)[0] == GRAPH)
    waiting, found = list(enumerate(prompts)), {}
    numbers = {}
    while waiting or batch.texts:
        while waiting and not batch.full:
            number, ids = waiting.pop(0)
            with running(model, plan, kind) as session:
                text = batch.read(session, ids, most)
            numbers[text] = number
            if batch.ended(text):
                found[number] = text.tokens
        for text in batch.advance() if batch.texts else ():
            assert text.error is None
            found[numbers[text]] = text.tokens
    return [found[number] for number in range(len(prompts))], batch


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "tri_mix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_the_plain_loop(family, method, make_model, texts):
    model = make_model(family, **FAMILIES[family]).to(DEVICE)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, method, **(WINDOW if method == "tri_mix" else {}))
    expected = one_by_one(model, plan, texts, 12)
    got, batch = together(model, plan, texts, 12, size=3)
    assert got == expected
    assert batch.slots == 3


@pytest.mark.slow
@pytest.mark.parametrize("window", [2, 9, 45])
@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "gemma2", "olmo3"])
def test_windows_that_texts_reach_beyond_are_honoured_step_by_step(family, window, make_model, texts):
    """Of prompts longer and shorter than the window, with layers of full attention between."""
    kinds = {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = make_model(family, **(FAMILIES.get(family, {}) | kinds)).to(DEVICE)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "tri_mix", **WINDOW)
    got, batch = together(model, plan, texts, 12, size=3)
    assert got == one_by_one(model, plan, texts, 12)
    assert batch.slots == 3


@pytest.mark.slow
def test_the_window_of_every_layer_is_honoured_step_by_step(make_model, texts):
    model = make_model("mistral", sliding_window=64).to(DEVICE)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "dense")
    assert together(model, plan, texts, 40, size=3)[0] == one_by_one(model, plan, texts, 40)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_text_that_ends_makes_room_for_the_next(size, make_model, texts):
    model = make_model("llama").to(DEVICE)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "dense")
    free = one_by_one(model, plan, texts, 30)
    model.generation_config.eos_token_id = [free[0][4], free[2][0], free[3][17]]
    expected = one_by_one(model, plan, texts, 30)
    assert len({len(tokens) for tokens in expected}) > 2, "they end at different places"
    got, _ = together(model, plan, texts, 30, size=size)
    # One that has ended alone is not padded.
    assert got == expected


def test_a_batch_leaves_the_model_as_it_was(make_model, texts):
    model = make_model("llama").to(DEVICE)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    names = model.config._attn_implementation
    together(model, plan_of(model, "dense"), texts, 6, size=2)
    assert model.config._attn_implementation == names
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gemma3_text", {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2})],
)
def test_compiled_layers_decode_the_same(family, changes, make_model, texts, graphs):
    model = make_model(family, **changes).to(DEVICE)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "tri_mix", **WINDOW)
    expected = one_by_one(model, plan, texts, 12)
    batch = Batch(model, 80, 12, size=3, graph=GPU, runner=compiled(model).decode_layer)
    got, _ = together(model, plan, texts, 12, size=3, kind=COMPILED, batch=batch)
    assert got == expected
    seen = len(graphs)
    assert compiled(model).decode_layer(3) is compiled(model).decode_layer(3)
    batch = Batch(model, 80, 12, size=3, graph=GPU, runner=compiled(model).decode_layer)
    together(model, plan, texts, 12, size=3, kind=COMPILED, batch=batch)
    assert len(graphs) == seen, "a second batch of that size compiles nothing"


def test_a_text_whose_logits_are_not_finite_fails_alone(make_model, texts):
    # Of these tokens prompts have the first tenth, so that only a new one is poisoned.
    model = make_model("llama", vocab_size=970).to(DEVICE)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "dense")
    expected = one_by_one(model, plan, texts[:3], 12)
    others = {*range(97), *expected[0], *expected[2]}
    place = next(place for place in range(1, 11) if expected[1][place] not in {*others, *expected[1][:place]})
    poison = expected[1][place]
    model.get_input_embeddings().weight.data[poison] = torch.nan
    batch = Batch(model, 90, 12, size=3, graph=GPU)
    found = []
    with torch.inference_mode():
        for ids in texts[:3]:
            with running(model, plan, EAGER) as session:
                found.append(batch.read(session, ids, 12))
        while batch.texts:
            batch.advance()
    assert [text.error is None for text in found] == [True, False, True]
    assert f"new token {place + 2} are not finite" in str(found[1].error)
    assert [found[0].tokens, found[2].tokens] == [expected[0], expected[2]]


@pytest.mark.parametrize("where", ["prompt", "new token"])
def test_what_is_no_number_does_not_outlive_its_text(where, make_model, texts):
    """The next text in its slot is shorter than it and than the one beside, so that a step passes over what is behind."""
    model = make_model("llama", vocab_size=970).to(DEVICE)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "dense")
    beside, broken, short = texts[2], texts[0].clone(), texts[1][:, :7]
    expected = one_by_one(model, plan, [beside, short], 20)
    model.get_input_embeddings().weight.data[900] = torch.nan
    given = [900] * 20 if where == "new token" else None
    if given is None:
        broken[0, 20] = 900
    batch = Batch(model, 90, 20, size=2, graph=GPU)
    with torch.inference_mode(), running(model, plan, EAGER) as session:
        first = batch.read(session, beside, 20)
        if given is None:
            with pytest.raises(NotFiniteError):
                batch.read(session, broken, 20)
        else:
            failing = batch.read(session, broken, 20, endless=True, given=given)
    with torch.inference_mode():
        if given is not None:
            assert batch.advance() == [failing]
            assert failing.error is not None
        with running(model, plan, EAGER) as session:
            second = batch.read(session, short, 20)
        while batch.texts:
            batch.advance()
    assert [(text.error, text.tokens) for text in (first, second)] == [(None, tokens) for tokens in expected]


@torch.inference_mode()
def test_a_context_that_several_questions_follow_leaves_nothing_of_the_one_before(make_model, texts):
    plan = plan_of(model := make_model("llama").to(DEVICE), "dense")
    cache = KvCache(2, 70)
    with running(model, plan, EAGER) as session:
        for number in range(2):
            session.read_into(texts[0], CacheSlot(cache, number))
        for keys, values in cache.layers:
            keys[:, :, 20:], values[:, :, 20:] = torch.nan, torch.nan
        for number in (1, 0):
            session.read_into(texts[0][:, :24], CacheSlot(cache, number), 20, over=CacheSlot(cache, 0))
    assert all(torch.isfinite(tensor).all() for layer in cache.layers for tensor in layer)


def test_room_is_made_anew_and_texts_keep_theirs(make_model, texts):
    model = make_model("llama").to(DEVICE)
    model.generation_config.eos_token_id = None
    plan = plan_of(model, "dense")
    expected = one_by_one(model, plan, texts[:2], 20)
    batch = Batch(model, 90, 20, size=2, graph=GPU)
    with torch.inference_mode():
        found = []
        for ids in texts[:2]:
            with running(model, plan, EAGER) as session:
                found.append(batch.read(session, ids, 20))
        batch._record()
        with batch._prepared():
            batch._burst()
        batch.resize(4)
        with pytest.raises(ValueError, match="a slot that would go"):
            batch.resize(1)
        while batch.texts:
            batch.advance()
    assert [text.tokens for text in found] == expected
    assert [text.beside for text in found] == [2, 2]


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("llama", {}, ""),
        ("mixtral", {"sliding_window": None, **MOE}, ""),
        ("mistral", {"sliding_window": 64}, ""),
        ("llama4_text", {"attention_chunk_size": 16, "no_rope_layers": [1, 0] * 2, **MOE}, "scaled by their place"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "depend on"),
    ],
)
def test_which_models_decode_together(family, changes, why, make_model):
    kind, obstacle = step_kind(make_model(family, **changes).to(DEVICE), EAGER)
    # Routing to experts reads on the host how many tokens each has, so it cannot be recorded.
    recorded = GPU and family != "mixtral"
    assert kind == (None if why else GRAPH if recorded else STEPPED)
    assert why in obstacle


def test_a_model_that_answers_otherwise_decodes_alone(make_model, monkeypatch):
    model = make_model("llama").to(DEVICE)
    assert step_kind(model, PLAIN) == (None, "as its prompts are read as transformers reads them")

    def wrong(q, k, v, keys, values, seqlens, scale):
        return torch.zeros(q.shape[0], 1, q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)

    monkeypatch.setattr("tmbench.engine.decode_step.attend_with_kvcache", wrong)
    kind, obstacle = step_kind(model, EAGER)
    assert kind is None
    assert "otherwise" in obstacle


@pytest.mark.slow
def test_texts_follow_tokens_that_are_given(make_model, texts):
    """As a method follows dense's text: its choices are those of the plain loop along that text, end tokens left out."""
    model = make_model("llama").to(DEVICE)
    plan = plan_of(model, "tri_mix", **WINDOW)
    model.generation_config.eos_token_id = None
    model.generation_config.eos_token_id = [tokens[0] for tokens in one_by_one(model, plan, texts, 1)]
    given = [None, list(range(20, 32)), None, list(range(70, 58, -1)), [5] * 12]
    batch = Batch(model, 80, 12, size=2, graph=GPU)
    expected, waiting, found = [], list(zip(texts, given, strict=True)), []
    with torch.inference_mode():
        for ids, tokens in waiting:
            with running(model, plan, EAGER) as session:
                expected.append(session.follow(ids, 12, tokens))
        while waiting or batch.texts:
            while waiting and not batch.full:
                ids, tokens = waiting.pop(0)
                with running(model, plan, EAGER) as session:
                    found.append(batch.read(session, ids, 12, endless=True, given=tokens))
            batch.advance()
    assert [text.tokens for text in found] == expected


def test_a_text_that_is_too_long_is_refused(make_model, texts):
    model = make_model("llama").to(DEVICE)
    batch = Batch(model, 60, 10, size=2, graph=GPU)
    with running(model, plan_of(model, "dense"), EAGER) as session:
        for ids, most in ((texts[0], 11), (texts[2], 2)):
            with pytest.raises(ValueError, match="more than this batch has room for"):
                batch.read(session, ids, most)
