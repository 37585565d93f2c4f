"""The weights of a checkpoint against its config: read, or only planned with, which refuses the same."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edited_weights import change_weights
from tmbench.engine.prefill_kind import kind_wanted
from tmbench.errors import UserError
from tmbench.models import loading
from tmbench.models.checkpoint import tensor_shapes

TINY = Path(loading.model_path("tiny"))


def add(name, size=1):
    return lambda weights: weights.update({name: torch.ones(size)})


def without_prefix(weights):
    for key in list(weights):
        weights[key.removeprefix("model.")] = weights.pop(key)


@pytest.mark.slow
@pytest.mark.parametrize("plan_only", [False, True], ids=["run", "plan"])
@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda w: [w.pop(key) for key in list(w) if ".layers.3." in key],
            r"lacks 9 weights of the model, .*: model\.layers\.3\.input_layernorm\.weight, .* and 6 more; complete",
        ),
        (
            add("model.norm.weight", 7),
            r"has 1 weight of another shape .*: model\.norm\.weight \(7 instead of 256\); give the",
        ),
        (add("lm_head.bias", 4096), r"has 1 weight of parts of the model that its config does not know: lm_head\.bias;"),
        (
            add("model.layers.1.mlp.up_proj.bias", 688),
            r"has 1 weight of decoder layers .*: model\.layers\.1\.mlp\.up_proj\.bias",
        ),
        (add("model.layers.8.mlp.up_proj.weight"), r"has 1 weight of decoder layers .*: model\.layers\.8\.mlp\.up_proj"),
        (add("model.layers.1.mlp.up_proj.weight_scale_inv"), r"has 1 weight of decoder layers .*\.weight_scale_inv"),
        (
            lambda w: [w.pop(key) for key in list(w) if key.startswith("model.")] and add("transformer.h.0.x")(w),
            r"lacks \d+ weights of the model.*; it has 1 others that the model has no place for: transformer\.h\.0\.x",
        ),
    ],
)
def test_weights_of_another_config_are_refused(copy, edit, sentence, plan_only):
    change_weights(copy, edit)
    with pytest.raises(UserError, match=f"--model .*copy {sentence}"):
        loading.load(str(copy), device="cpu", plan_only=plan_only)


@pytest.mark.slow
@pytest.mark.parametrize("plan_only", [False, True], ids=["run", "plan"])
@pytest.mark.parametrize(
    "name",
    [
        "v_head.weight", "vision_tower.encoder.layers.0.q.weight", "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.k_proj.k_scale", "model.layers.8.eh_proj.weight",
    ],
)  # fmt: skip
def test_weights_without_a_use_here_are_not_minded(copy, name, plan_only):
    """Heads and towers beside the decoder, buffers and scales of a cache, and a layer that predicts further tokens."""
    change_weights(copy, add(name))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    loading.load(str(copy), device="cpu", plan_only=plan_only)


@pytest.mark.slow
@pytest.mark.parametrize("plan_only", [False, True], ids=["run", "plan"])
def test_a_base_model_has_no_head_unless_it_is_tied(copy, plan_only):
    change_weights(copy, without_prefix)
    tied = json.loads((copy / "config.json").read_text())
    assert tied["tie_word_embeddings"]
    loading.load(str(copy), device="cpu", plan_only=plan_only)
    (copy / "config.json").write_text(json.dumps(tied | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"lacks 1 weight of the model, .*: lm_head\.weight;"):
        loading.load(str(copy), device="cpu", plan_only=plan_only)


@pytest.mark.slow
@pytest.mark.parametrize("plan_only", [False, True], ids=["run", "plan"])
def test_shards_and_their_index(make_model, tmp_path, plan_only):
    def load():
        return loading.load(str(tmp_path), device="cpu", plan_only=plan_only)

    make_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    load()
    index = tmp_path / "model.safetensors.index.json"
    content = index.read_text()
    for text, sentence in (("{", "is not JSON"), ("[]", "holds no JSON object"), ("{}", "names no file for each weight")):
        index.write_text(text)
        with pytest.raises(UserError, match=f"cannot be loaded: {index.name} {sentence}.*: download it again"):
            load()
    index.write_text(content)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    weights = load_file(shard)
    dropped, _ = weights.popitem()
    save_file(weights, shard, {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 weight of the model, .*: {dropped};"):
        load()
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is damaged or incomplete"):
        load()


@pytest.mark.slow
@pytest.mark.parametrize("plan_only", [False, True], ids=["run", "plan"])
def test_weights_in_pickles(copy, plan_only):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (copy / "ran",))

    def load():
        return loading.load(str(copy), device="cpu", plan_only=plan_only)

    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    pickled = copy / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save(weights, pickled, _use_new_zipfile_serialization=zipped)
        load()
    torch.save({key: value for key, value in weights.items() if key != "model.norm.weight"}, pickled)
    with pytest.raises(UserError, match=r"lacks 1 weight of the model, .*: model\.norm\.weight"):
        load()
    pickled.write_bytes(b"no pickle" * 9)
    with pytest.raises(UserError, match="cannot be loaded: .*; download it again, or use the release of transformers"):
        load()
    pickled.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(UserError, match="cannot be loaded: "):
        load()
    assert not (copy / "ran").exists()


@pytest.mark.slow
def test_experts_that_a_checkpoint_keeps_one_by_one_are_found_by_a_plan(make_model, tmp_path):
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    make_model("mixtral", **changes).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    shapes = tensor_shapes(tmp_path / "model.safetensors")
    assert shapes is not None
    assert any("experts.3.w1" in key for key in shapes)
    loading.load(str(tmp_path), device="cpu", plan_only=True)
    change_weights(tmp_path, lambda weights: [weights.pop(key) for key in list(weights) if "experts.3.w1" in key])
    for plan_only in (False, True):
        with pytest.raises(UserError):
            loading.load(str(tmp_path), device="cpu", plan_only=plan_only)


def test_a_plan_draws_nothing_and_reads_no_weights(copy, monkeypatch):
    """Whatever is missing stays on the meta device, and a file of any size is read up to the end of its header."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    planned = loading.load(str(copy), device="cpu", plan_only=True)
    assert {tensor.device.type for tensor in planned.model.parameters()} == {"meta"}
    huge = copy / "huge.safetensors"
    header = json.dumps({"x": {"dtype": "F16", "shape": [2**34], "data_offsets": [0, 2**35]}}).encode()
    with huge.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**35)
    assert tensor_shapes(huge) == {"x": torch.Size([2**34])}


LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24,
    "num_key_value_heads": 4, "first_k_dense_replace": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        ("llama", {}, "eager"), ("qwen3", {}, "eager"), ("gpt_neox", {"num_key_value_heads": 4}, "eager"),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "eager"), ("deepseek_v3", LATENT, "eager"),
    ],
)  # fmt: skip
def test_a_plan_knows_how_the_prefill_will_run(family, changes, kind, make_model):
    model = make_model(family, **changes)
    with torch.device("meta"):
        planned = AutoModelForCausalLM.from_config(model.config)
    place = torch.device("cpu")
    wanted = kind_wanted(model, place, compiled=None)
    assert kind_wanted(planned, place, compiled=None, planned=True) == wanted
    assert wanted == kind
