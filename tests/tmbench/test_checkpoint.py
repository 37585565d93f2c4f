"""Checkpoints that are not whole, not of their config, or not checkpoints: one sentence each, and none loaded in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from edited_weights import change_weights
from tmbench.engine.roofline import attention_flop
from tmbench.errors import UserError
from tmbench.models import loading
from tmbench.models.checkpoint import first_sentence
from tmbench.models.geometry import Geometry, max_positions

TINY = Path(loading.model_path("tiny"))


def change(path, edit):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(edit(content)))


def rename_layer(weights, old, new):
    for key in [key for key in weights if f"layers.{old}." in key]:
        weights[key.replace(f"layers.{old}.", f"layers.{new}.")] = weights.pop(key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda w: [w.pop(f"model.layers.3.self_attn.{x}_proj.weight") for x in "kv"],
            r"lacks 2 weights of the model, .*: model\.layers\.3\.self_attn\.k_proj\.weight, .*v_proj\.weight; complete the",
        ),
        (lambda w: w.pop("model.norm.weight"), r"lacks 1 weight of the model, .*: model\.norm\.weight; complete"),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(256)}),
            r"has 1 weight of decoder layers that its config does not know: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (lambda w: rename_layer(w, 7, 8), r"lacks \d+ weights of the model, .*layers\.7.* and \d+ more"),
    ],
)
def test_weights_that_do_not_belong_to_the_config(copy, damage, sentence):
    change_weights(copy, damage)
    with pytest.raises(UserError, match=sentence):
        loading.load(str(copy), device="cpu")


def test_more_layers_than_the_config_says(copy):
    change(copy / "config.json", lambda config: config | {"num_hidden_layers": 6})
    with pytest.raises(UserError, match=r"weights of decoder layers that its config does not know: model\.layers\.6"):
        loading.load(str(copy), device="cpu")


def test_weights_of_another_shape(copy):
    change_weights(copy, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(
        UserError, match=r"has 1 weight of another shape than its config says: model\.norm\.weight \(7 instead of 256\)"
    ):
        loading.load(str(copy), device="cpu")


def test_what_a_checkpoint_may_leave_out_is_not_missed(make_model, tmp_path):
    """A tied head, and tables of rotary embeddings, which are computed."""
    for tied in (True, False):
        folder = tmp_path / str(tied)
        make_model("llama", tie_word_embeddings=tied).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / name, folder)
        loading.load(str(folder), device="cpu")


def cut(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 28\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(POINTER), r"model\.safetensors is a pointer of Git LFS"),
        (lambda f: (f / "tokenizer.json").write_bytes(POINTER), r"tokenizer\.json is a pointer of Git LFS"),
        (lambda f: cut(f / "model.safetensors", 0.5), r"model\.safetensors is damaged or incomplete: download it again"),
        (lambda f: cut(f / "model.safetensors", 0.00001), r"model\.safetensors is damaged or incomplete"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is empty: download it again"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), r"model\.safetensors is damaged or incomplete"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            r"no weights in the folder \(model.*: add them, or use --weights random",
        ),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), r"config\.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object, so it is no config"),
        (lambda f: change(f / "config.json", lambda c: {"hidden_size": 4}), "has no model_type"),
        (lambda f: change(f / "config.json", lambda c: c | {"model_type": "x", "auto_map": {}}), "brings code of its own"),
        (lambda f: change(f / "config.json", lambda c: c | {"num_attention_heads": "many"}), "cannot be loaded: "),
        (lambda f: cut(f / "tokenizer.json", 0.5), "the tokenizer of --model .*copy cannot be loaded: "),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer of --model .*copy cannot be loaded: "),
        (lambda f: (f / "tokenizer.json").write_bytes(b""), r"tokenizer\.json is empty"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer files: add them"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), r"tokenizer_config\.json holds no JSON object"),
        (lambda f: (f / "generation_config.json").write_text("{"), r"generation_config\.json is not JSON"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), r"chat_template\.jinja is no text"),
        (lambda f: change(f / "config.json", lambda c: c | {"model_type": "new"}), "knows no model_type 'new', as its"),
        (lambda f: change(f / "tokenizer.json", lambda t: t | {"model": {"type": "New"}}), "the tokenizer of --model "),
    ],
)
def test_damaged_files_are_one_sentence(copy, damage, sentence, tmbench):
    damage(copy)
    code, out, err = tmbench("ttft", "--model", str(copy), "--length", "256", "--method", "dense", "--device", "cpu")
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    with pytest.raises(UserError, match=sentence):
        loading.load(str(copy), device="cpu")


def test_a_missing_shard_is_named(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"1 of its shards is missing: {shard.name}; download the checkpoint again"):
        loading.load(str(tmp_path), device="cpu")


def test_what_is_no_checkpoint_folder(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("tmbench.models.gguf.find_spec", lambda package: None)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.Q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    original, beside = tmp_path / "original", tmp_path / "beside"
    for folder, there in ((original, "model.Q4.gguf"), (beside, "tf_model.h5")):
        folder.mkdir()
        shutil.copy(copy / "config.json", folder)
        (folder / there).write_bytes(b"weights")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, sentence in {
        str(original): r"holds its weights as a GGUF file: add --gguf-file model\.Q4\.gguf",
        str(beside): r"no weights in the folder \(.*\); tf_model\.h5 is not what transformers loads: add them",
        str(tmp_path / "link"): "there is no such folder",
        f"{copy}/below": "there is no such folder",
        "C:\\models\\it": "there is no such folder",
        "": "--model is empty: give tiny",
        "x" * 300: "it cannot be looked into",
        str(copy / "config.json"): f"is a file: give the folder of the checkpoint, {copy}",
        str(copy / "model.safetensors"): "is a file: give the folder",
        str(tmp_path / "gguf" / "model.Q4.gguf"): "is a GGUF file, which is read by gguf and accelerate",
        str(tmp_path / "gguf"): r"holds a GGUF file: add --gguf-file model\.Q4\.gguf",
        str(tmp_path / "adapter"): "is an adapter, not a whole model: merge it",
        str(tmp_path / "empty"): r"has no config\.json, so it is no checkpoint",
        str(tmp_path / "nowhere"): "there is no such folder",
        "./nowhere": "there is no such folder",
        "~/nowhere/at/all": "there is no such folder",
    }.items():
        with pytest.raises(UserError, match=sentence):
            loading.load(name, device="cpu")


def test_a_folder_that_is_missing_is_told_from_an_id_of_the_hub(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    monkeypatch.setattr(loading, "load_config", lambda name: dict[str, str]()["the Hub"])
    for name, sentence in {
        "copy/inner": "there is no such folder; check the path",
        "owner/model": "there is no folder of that name, and the Hub did not give it .*; check the name, the network",
        "model": "there is no folder of that name, and the Hub did not give it .*; check the name, the network",
    }.items():
        with pytest.raises(UserError, match=f"--model {name} cannot be loaded: {sentence}"):
            loading.load(name, device="cpu")


def test_a_home_folder_is_found(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    loaded = loading.load("~/copy", device="cpu")
    assert loaded.model_hash == loading.load(str(copy), device="cpu").model_hash


@pytest.mark.slow
def test_code_of_a_checkpoints_own_is_not_run_and_that_is_said(copy, tmbench):
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(copy / "config.json", lambda config: config | {"auto_map": own})
    (copy / "own.py").write_text("open('ran', 'w')")
    given = ("--model", str(copy), "--length", "256", "--method", "dense", "--repeats", "1", "--device", "cpu")
    code, _, err = tmbench("ttft", *given)
    assert code == 0
    assert "brings code of its own (auto_map), which tmbench does not run: its family is transformers' own" in err
    change(
        copy / "tokenizer_config.json",
        lambda t: t | {"tokenizer_class": "No", "auto_map": {"AutoTokenizer": ["own.T", None]}},
    )
    code, out, err = tmbench("ttft", *given)
    assert (code, out) == (2, "")
    assert err.startswith(
        f"Error: the tokenizer of --model {copy} brings code of its own (auto_map), which tmbench does not run"
    )
    assert not (copy / "ran").exists()
    assert not Path("ran").exists()


def test_an_adapter_beside_the_weights_is_not_left_out_in_silence(copy, monkeypatch):
    monkeypatch.setattr("tmbench.models.checkpoint.find_spec", lambda name: None)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match="holds an adapter beside its weights, which is not applied as peft is not installed"
    ):
        loading.load(str(copy), device="cpu")


def test_a_tokenizer_of_more_words_than_the_model_has(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    loaded = loading.load(str(tmp_path), device="cpu")
    with pytest.raises(UserError, match=r"the tokenizer of .* has 3057 tokens and the model 97, so RULER cannot use it"):
        loaded.need_tokenizer("RULER")


def test_what_is_wrong_with_a_config_is_not_put_down_to_weights_that_nobody_asked_for(copy):
    (copy / "model.safetensors").unlink()
    change(copy / "config.json", lambda config: config | {"num_attention_heads": "many"})
    with pytest.raises(UserError, match="num_attention_heads.*; download it again, or use the release of transformers"):
        loading.load(str(copy), weights="random", device="cpu")


def test_a_damaged_tokenizer_is_no_absent_one(copy):
    cut(copy / "tokenizer.json", 0.5)
    with pytest.raises(UserError, match="the tokenizer of --model"):
        loading.load(str(copy), weights="random", device="cpu")


def test_an_error_without_words_is_named_by_its_type():
    assert first_sentence(KeyError("x")) == "KeyError: 'x'"
    assert first_sentence(ValueError("This is what went wrong. And more.")) == "This is what went wrong."


LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24,
    "first_k_dense_replace": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"),
    [("deepseek_v3", LATENT), ("glm4_moe_lite", LATENT), ("llama", {}), ("qwen3", {"head_dim": 32})],
)
def test_the_geometry_is_what_attention_receives(family, changes, make_model, prompt):
    from tmbench.engine.attention import applied

    model = make_model(family, **changes)
    loaded = loading.LoadedModel("m", model, None, "random", "")
    seen = set()
    with torch.inference_mode(), applied(model, "dense") as session:
        session.observer = lambda layer, pattern, q, k, scale: seen.add((q.shape, k.shape))
        kind = type(session.plan.by_layer[0])
        before = kind.attend

        def attend(pattern, q, k, v, **asked):
            seen.add(v.shape)
            return before(pattern, q, k, v, **asked)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "attend", attend)
            model(prompt(9))
    q, k, v = (x.shape for x in loaded.qkv(9))
    assert seen == {(q, k), v}


@pytest.mark.parametrize(("name", "sizes"), [("deepseek_v3", (128, 192, 128)), ("glm-4-lite", (20, 256, 256))])
def test_operations_of_latent_attention(name, sizes):
    """As torch counts the two products of 30 queries with 50 keys of one head."""
    shape = Geometry.of(CONFIG_MAPPING[name]() if name in CONFIG_MAPPING else loading.load_config(name))
    heads, qk_dim, v_dim = sizes
    assert (shape.heads, shape.kv_heads, shape.qk_head_dim, shape.v_head_dim) == (heads, heads, qk_dim, v_dim)
    with FlopCounterMode(display=False) as counter:
        weights = torch.zeros(30, qk_dim) @ torch.zeros(qk_dim, 50)
        weights @ torch.zeros(50, v_dim)
    assert attention_flop(30 * 50, shape) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("family", "changes", "limit"),
    [
        ("qwen2", {"max_position_embeddings": 32768}, 32768),
        (
            "qwen2",
            {"max_position_embeddings": 32768,
             "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        (
            "qwen3",
            {"max_position_embeddings": 40960,
             "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        (
            "llama",
            {"max_position_embeddings": 131072,
             "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 8192}},
            131072,
        ),
        ("llama", {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 16384),
        ("llama", {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
        (
            "phi3",
            {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
             "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}},
            131072,
        ),
        ("deepseek_v3", {}, 163840),
    ],
)  # fmt: skip
def test_scaled_positions(family, changes, limit):
    scaling = {"rope_parameters": {"rope_theta": 1e6, **changes.pop("rope_scaling")}} if "rope_scaling" in changes else {}
    if family == "deepseek_v3":
        changes = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
                                       "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
                   "max_position_embeddings": 163840}  # fmt: skip
    assert max_positions(CONFIG_MAPPING[family](**changes, **scaling)) == limit


TEXT = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "text", "vision"),
    [
        ("mistral3", {"model_type": "mistral", "sliding_window": None}, VISION | {"model_type": "pixtral", "head_dim": 16}),
        ("llava", {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}),
        (
            "qwen2_5_vl",
            {"model_type": "qwen2_5_vl_text",
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
            {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
             "fullatt_block_indexes": [0]},
        ),
        (
            "qwen3_vl",
            {"model_type": "qwen3_vl_text",
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
            {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
             "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        ),
    ],
)  # fmt: skip
def test_the_text_of_a_model_that_reads_images_too(family, text, vision, tmp_path, tmbench):
    torch.manual_seed(0)
    vocabulary = json.loads((TINY / "config.json").read_text())["vocab_size"]
    ids = {"image_token_id": 5, "image_token_index": 5, "video_token_id": 6, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[family](text_config=TEXT | {"vocab_size": vocabulary} | text, vision_config=vision, **ids)
    folder = tmp_path / family
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    code, out, err = tmbench(
        "ttft", "--model", str(folder), "--length", "512", "--method", "dense", "--method", "tri_mix", "--repeats", "1",
        "--n-local", "64", "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads(out)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert [row["prefill"] for row in rows] == ["eager", "eager"]
    assert rows[0]["coverage"] == 1 > rows[1]["coverage"]
    # Of the decoder alone, two layers: what yields keys and values runs on every token, the rest of the last layer on one.
    layer, keys = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96), 2 * 2 * 64 * 32
    once = layer - keys + 2 * 64 * vocabulary
    pairs = 4 * (512 * 513 // 2 + 512)
    assert rows[0]["flop"] == 512 * (layer + keys) + once + 4 * 16 * pairs


@pytest.mark.slow
def test_a_plan_builds_no_weights(copy, tmbench, monkeypatch):
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", None)
    code, out, err = tmbench("ttft", "--model", str(copy), "--length", "1K", "--dry-run", "--device", "cpu")
    assert code == 0, err
    assert "tri_mix" in out
    planned = loading.load("llama-3.1-8b", weights="random", device="cpu", plan_only=True)
    assert {parameter.device.type for parameter in planned.model.parameters()} == {"meta"}
    assert planned.device.type == "cpu"
    assert {x.device.type for x in planned.qkv(100)} == {"cpu"}
    code, out, err = tmbench(
        "ttft", "--model", "llama-3.1-8b", "--weights", "random", "--length", "128K", "--dry-run", "--device", "cpu"
    )
    assert code == 0, err
    assert "131072" in out


@pytest.mark.slow
def test_a_plan_refuses_what_a_run_would(copy, tmbench):
    change_weights(copy, lambda weights: weights.pop("model.norm.weight"))
    for given, sentence in (
        (("--length", "32K"), "more than the 16384 positions"),
        (("--dense-backend", "flash-attn-4"), "--dense-backend flash-attn-4"),
        (("--layers", "2,9"), "is not within the layers"),
        (("--model", "llama-3.1-8b"), "is a preset"),
        (("--model", str(copy)), "lacks 1 weight of the model"),
    ):
        code, _, err = tmbench("ttft", *given, "--dry-run", "--device", "cpu")
        assert code == 2
        assert sentence in err
    code, _, err = tmbench("sweep", "--model", str(copy), "--last-n", "0", "--last-n", "4", "--dry-run", "--offline")
    assert code == 2
    assert "lacks 1 weight of the model" in err


@pytest.mark.slow
def test_a_failed_row_says_why_on_the_screen(tmbench, monkeypatch):
    from tmbench.measure import ttft

    def fail(*given, **options):
        raise RuntimeError("the reason of it")

    monkeypatch.setattr(ttft, "first_token", fail)
    code, out, err = tmbench("ttft", "--length", "256", "--method", "dense", "--repeats", "1", "--device", "cpu")
    assert code == 1
    assert "failed" in out
    assert "dense at 256 failed: RuntimeError: the reason of it" in err
