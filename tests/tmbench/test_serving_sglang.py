"""The plug-in for SGLang over a fake of its objects: chunks give the rows of whole prompts, and all else is SGLang's own."""

from __future__ import annotations

import random
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fake_sglang import AttentionType, ForwardMode, Options, RadixAttention, Runner, install
from tmbench import __version__
from tmbench.errors import UserError
from tmbench.serving.settings import VARIABLE
from tmbench_kernels import Triangle
from tmbench_kernels.reference import masked_attention

ROOT = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 16, 24
LAYERS, CHOSEN = 4, (1, 3)
PATTERN = Triangle(4, 30, 20)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """``engine(runner, text)``: what SGLang makes of ``--prefill-attention-backend tmbench``, with these settings."""
    choices, backends = install(monkeypatch)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["sglang.srt.plugins"]["tmbench"].partition(":")
    getattr(import_module(module), name)()
    assert "tmbench" in choices

    def make(runner, text='layers = "1,3"\nn_init = 4\nn_local = 30\nlast_n = 20\n'):
        file = tmp_path / "triangle.toml"
        file.write_text(text)
        monkeypatch.setenv(VARIABLE, str(file))
        return backends["tmbench"](runner)

    return make


def layers(*, dim=DIM, v_dim=V_DIM, **changes):
    """Four layers; ``changes`` are those of layer 3."""
    return [RadixAttention(i, HEADS, KV_HEADS, dim, v_dim, **(changes if i == 3 else {})) for i in range(LAYERS)]


class Served:
    """Texts that a runner reads, each with a prompt of so many tokens and more tokens that are decoded."""

    def __init__(self, engine, runner, prompts, decoded=3):
        self.backend, self.runner, self.prompts = engine(runner), runner, prompts
        self.ends = [length + decoded for length in prompts]
        self.done, generator = [0] * len(prompts), torch.Generator().manual_seed(1)
        shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, V_DIM))
        self.qkv = [
            [
                [torch.randn(end, *shape, generator=generator).to(runner.device, runner.dtype) for shape in shapes]
                for _ in range(LAYERS)
            ]
            for end in self.ends
        ]
        self.out: list[list[list[torch.Tensor]]] = [[[] for _ in range(LAYERS)] for _ in prompts]

    def step(self, mode, sizes, **batch):
        """One forward of all layers, over the next ``sizes[request]`` tokens of each request that is named."""
        rows = []
        for request, size in sizes.items():
            start = self.done[request]
            self.done[request] = end = start + size
            rows.append((request, start, end, max(end, self.prompts[request])))
        forward_batch = self.runner.batch(mode, rows, **batch)
        for layer in self.runner.layers:
            parts = [[x[start:end] for x in self.qkv[request][layer.layer_id]] for request, start, end, _ in rows]
            q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
            out = self.backend.forward(q.flatten(1), k, v, layer, forward_batch)
            assert out.shape == (len(q), HEADS * V_DIM)
            for (request, *_), part in zip(rows, out.split(list(sizes.values())), strict=True):
                self.out[request][layer.layer_id].append(part.unflatten(1, (HEADS, V_DIM)))

    def check(self, tolerance=1e-5):
        """Every row of every layer is that of the definition: over whole prompts, then dense."""
        for request, (length, done) in enumerate(zip(self.prompts, self.done, strict=True)):
            for layer in range(LAYERS):
                q, k, v = (x[:done].transpose(0, 1)[None] for x in self.qkv[request][layer])
                mask = torch.ones(done, done, dtype=torch.bool, device=q.device).tril()
                if layer in CHOSEN:
                    whole = torch.zeros(1, 1, length, 1, device=q.device)
                    mask[:length, :length] = PATTERN.mask(whole, whole)[0, 0]
                exact = masked_attention(q, k, v, mask, scale=0.3)
                out = torch.cat(self.out[request][layer]).transpose(0, 1)[None]
                assert (out - exact).abs().max() < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_random_sizes_give_the_rows_of_whole_prompts(engine, device, seed):
    drawn = random.Random(seed)
    prompts = [300, 97, drawn.randrange(1, 300)]
    served = Served(engine, Runner(layers(), device=device), prompts)
    while left := {r: n - served.done[r] for r, n in enumerate(prompts) if served.done[r] < n}:
        named = drawn.sample(sorted(left), drawn.randint(1, len(left)))
        sizes = {request: drawn.choice((1, 64, 100, left[request])) for request in named}
        served.step(ForwardMode.EXTEND, {r: min(size, left[r]) for r, size in sizes.items()}, host=drawn.random() < 0.5)
    for _ in range(3):
        served.step(ForwardMode.DECODE, dict.fromkeys(range(3), 1))
    served.check(1e-5 if device == "cpu" else 2e-3)
    assert {layer for mode, layer in served.backend.served if mode == "extend"} == {0, 2}
    assert {layer for mode, layer in served.backend.served if mode == "decode"} == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_decoded_in_a_prefill_s_batch_are_dense(engine, device):
    served = Served(engine, Runner(layers(), dtype=torch.bfloat16, device=device), [250, 200])
    served.step(ForwardMode.EXTEND, {0: 250})
    for size in (64, 100, 36):
        served.step(ForwardMode.MIXED, {1: size, 0: 1})
    served.check(0.05)


def test_a_batch_that_is_filled_anew_is_read_anew(engine):
    """As where a graph is replayed: the same objects stand for the next batch."""
    runner = Runner(layers())
    backend = engine(runner)
    batch = runner.batch(ForwardMode.EXTEND, [(0, 0, 100, 200)])
    q = torch.randn(100, HEADS * DIM)
    k, v = torch.randn(100, KV_HEADS, DIM), torch.randn(100, KV_HEADS, V_DIM)
    middle = backend.forward(q, k, v, runner.layers[1], batch)
    batch.orig_seq_lens.fill_(100)
    last = backend.forward(q, k, v, runner.layers[1], batch)
    assert torch.equal(middle[:80], last[:80])
    assert not torch.allclose(middle[80:], last[80:])


def test_caps_sinks_and_keys_that_are_there_already(engine):
    runner = Runner(layers(logit_cap=2.0))
    backend, layer = engine(runner), runner.layers[3]
    q, k, v = torch.randn(100, HEADS, DIM), torch.randn(100, KV_HEADS, DIM), torch.randn(100, KV_HEADS, V_DIM)
    sinks = torch.linspace(-1, 1, HEADS)
    batch = runner.batch(ForwardMode.EXTEND, [(2, 0, 100, 100)])
    out = backend.forward(q.flatten(1), k, v, layer, batch, sinks=sinks, k_rope=None)
    again = backend.forward(q.flatten(1), None, None, layer, batch, save_kv_cache=False, sinks=sinks)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    exact = masked_attention(q, k, v, PATTERN.mask(q, k), scale=0.3, softcap=2.0, sinks=sinks)
    assert (out.unflatten(1, (HEADS, V_DIM)).transpose(0, 1) - exact[0]).abs().max() < 1e-5
    assert torch.equal(out, again)
    with pytest.raises(ValueError, match="asks for score_mod"):
        backend.forward(q, k, v, layer, batch, score_mod=abs)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"orig_seq_lens": None}, "no orig_seq_lens"),
        ({"orig_seq_lens": torch.tensor([100, 100])}, "1 chunks, 1 rows of slots and 2 orig_seq_lens"),
        ({"orig_seq_lens": torch.tensor([99])}, "rows 0 to 100 are no chunk of a prompt of 99 tokens"),
        ({"forward_mode": ForwardMode.TARGET_VERIFY}, "the forward mode TARGET_VERIFY"),
    ],
)
def test_batches_that_say_too_little_are_refused(engine, change, error):
    runner = Runner(layers())
    backend = engine(runner)
    batch = runner.batch(ForwardMode.EXTEND, [(0, 0, 100, 100)])
    vars(batch).update(change)
    q, k, v = torch.randn(100, HEADS * DIM), torch.randn(100, KV_HEADS, DIM), torch.randn(100, KV_HEADS, V_DIM)
    with pytest.raises(ValueError, match=error):
        backend.forward(q, k, v, runner.layers[1], batch)


@pytest.mark.parametrize(
    ("runner", "error"),
    [
        ({"use_mla_backend": True}, "multi-head latent attention"),
        ({"kv_cache_dtype": torch.float8_e4m3fn}, "the cache holds float8_e4m3fn, and the model computes float32"),
        ({"translates": True}, "unified memory pool"),
        ({"decode_attention_backend_str": "tmbench"}, "--decode-attention-backend tmbench is none"),
        ({"decode_attention_backend_str": "flashmla"}, "give one of fa3, fa4, flashinfer, triton, torch_native"),
        ({"server_args": Options(attn_dp_size=2)}, "does not serve --attn-dp-size"),
        ({"server_args": Options(pp_size=2)}, "does not serve --pp-size"),
        ({"server_args": Options(speculative_algorithm="EAGLE")}, "does not serve --speculative-algorithm"),
        ({"server_args": Options(enable_two_batch_overlap=True)}, "does not serve --enable-two-batch-overlap"),
        ({"server_args": Options(enable_kv_cache_sharding=True)}, "does not serve --enable-kv-cache-sharding"),
        ({"server_args": Options(prefill_graph="full")}, "give breakable or disabled"),
    ],
)
def test_servers_that_it_is_not_exact_for_are_refused_at_their_start(engine, runner, error):
    with pytest.raises(UserError, match=error):
        engine(Runner(layers(), **runner))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sliding_window_size": 511}, r"\(a sliding window of 512\): name layers of full attention, 0-2"),
        ({"is_cross_attention": True}, "cross attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention to later tokens"),
        ({"use_irope": True}, "attention by chunks"),
        ({"logit_cap": 2.0, "logit_capping_method": "sigmoid"}, "logits capped by sigmoid"),
        ({"xai_temperature_len": 1024}, "a temperature by position"),
        ({"pos_encoding_mode": "ALIBI"}, "positions by ALIBI"),
    ],
)
def test_layers_that_it_is_not_exact_for_are_refused_at_their_start(engine, change, error):
    with pytest.raises(UserError, match=error):
        engine(Runner(layers(**change)))
    engine(Runner(layers(**change)), 'layers = "1-"')


def test_a_cache_of_another_layout_is_refused_at_the_start(engine):
    runner = Runner(layers())
    pool = runner.token_to_kv_pool
    pool.k[3] = pool.k[3].transpose(0, 1)
    with pytest.raises(UserError, match=r"the cache of layer 3 is \[2, 1601, 16\] of float32, not 2 heads of 16"):
        engine(runner)


def test_layers_that_the_model_has_not_are_refused(engine):
    with pytest.raises(UserError, match="--layers 9: 9 is not within the layers 0 to 3"):
        engine(Runner(layers()), 'layers = "9"')
    hybrid = [layer for layer in layers() if layer.layer_id != 1]
    with pytest.raises(UserError, match="no attention over a cache"):
        engine(Runner(hybrid), 'layers = "1"')
    with pytest.raises(UserError, match="are none of this model's"):
        engine(Runner(layers()), 'layers = "none"')


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("layers = 16", 'layers must be a text, such as "16-"'),
        ("n_init = 4", 'it has no layers: add a line such as layers = "16-"'),
        ('layers = "1"\nlayer = "2"', "layer is unknown: it may have layers, n_init, n_local, last_n"),
        ('layers = "1"\nn_local = -1', "n_local must be 0 or more"),
        ('layers = "1"\nn_local = 1.5', "n_local must be a whole number"),
        ('layers = "1"\nlast_n = 0', "last_n must be 1 or more"),
        ('layers = "1"\nn_init = 0\nn_local = 0', "n_init and n_local are both 0"),
        ("layers", "is no TOML"),
    ],
)
def test_settings_that_say_nothing_of_use_are_refused(engine, text, error):
    with pytest.raises(UserError, match=rf"^{VARIABLE}=.*triangle.toml.*{error}"):
        engine(Runner(layers()), text)


def test_without_settings_there_is_no_server(engine, monkeypatch, tmp_path):
    from tmbench.serving.settings import Settings

    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UserError, match=f"{VARIABLE} names no file"):
        Settings.read()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Settings.read({VARIABLE: str(tmp_path / "none.toml")})


@pytest.mark.slow
def test_the_command_writes_what_the_plug_in_reads(tmbench, engine):
    code, out, err = tmbench("serving", "--layers", "1,3", "--n-init", "4", "--output", "made/triangle.toml")
    assert code == 0, err
    assert f"{VARIABLE}=made/triangle.toml sglang serve --model-path tiny" in out
    text = Path("made/triangle.toml").read_text()
    assert text.startswith(f"# tmbench {__version__}: triangle attention in tiny, layers by this choice: given\n")
    extend = engine(Runner(layers()), text).forward_extend
    assert extend.layers == set(CHOSEN)
    assert extend.pattern == Triangle(4, 512, 128)
    assert tmbench("serving", "--output", "half.toml")[0] == 0
    assert 'layers = "4-"' in Path("half.toml").read_text(), "half of tiny's depth, as for tri_mix"
    for given, error in [
        (("--last-n", "0"), "last_n must be 1 or more"),
        (("--layers", "none"), "layers 8- are none of this model's"),
        (("--layers", "auto"), "run tmbench probe --model tiny first"),
        (("--model", "llama-3.1-8b"), "which a serving engine needs: give the real checkpoint"),
    ]:
        code, _, err = tmbench("serving", *given, "--output", "refused.toml")
        assert code == 2
        assert error in err
    assert not Path("refused.toml").exists()
    assert "--output: /dev/null/t.toml cannot be written" in tmbench("serving", "--output", "/dev/null/t.toml")[2]
