"""Checkpoints with quantised weights: named in rows, dequantised where that is said, refused where they cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from tmbench.engine.attention import applied
from tmbench.engine.roofline import linear_flop
from tmbench.errors import UserError
from tmbench.measure.spec import ModelSource
from tmbench.models import loading
from tmbench.models.quantization import words_of

TINY = Path(loading.__file__).parent / "tiny"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TINY, tmp_path / "small", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return tmp_path / "small"


def quantised(folder: Path, how: Mapping[str, object]) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(how)}))
    return str(folder)


def to_fp8(folder: Path) -> None:
    """Have the linear layers' weights in 8 bits, with a scale for each block of 32x32."""
    found = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            found[name] = weight
            continue
        rows, columns = (-(-size // 32) for size in weight.shape)
        padded = torch.zeros(rows * 32, columns * 32)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        blocks = padded.reshape(rows, 32, columns, 32)
        scale = blocks.abs().amax((1, 3)).clamp_min(1e-8) / 448.0
        small = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
        found[name] = small.contiguous().to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale
    save_file(found, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "words"),
    [(FP8, "fp8"), (AWQ, "awq 4 bits"), (GPTQ, "gptq 4 bits"), ({"load_in_4bit": True}, "bitsandbytes 4 bits"),
     ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors int-quantized")],
)  # fmt: skip
def test_what_rows_call_it(how, words, folder):
    assert words_of(loading.load_config(quantised(folder, how))) == words
    assert words_of(loading.load_config("tiny")) == ""


@pytest.mark.parametrize("plan_only", [False, True])
@pytest.mark.parametrize(("how", "words"), [(AWQ, "awq 4 bits"), (GPTQ, "gptq 4 bits")])
def test_what_lacks_a_package_is_one_sentence(how, words, plan_only, folder):
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is installed")
    with pytest.raises(
        UserError, match=rf"^--model .* is quantised \({words}\), which cannot be loaded here \(.*\): give the"
    ):
        loading.load(quantised(folder, how), device="cpu", plan_only=plan_only)
    # Its config is enough for weights that are drawn.
    assert loading.load(str(folder), device="cpu", weights="random", plan_only=True).quantization == ""


def test_what_transformers_would_pass_over_is_refused(folder):
    with pytest.raises(
        UserError, match=r"is quantised in a way that transformers does not know \(nobody's 3 bits\): give the"
    ):
        loading.load(quantised(folder, {"quant_method": "nobody's", "bits": 3}), device="cpu")


def test_a_type_that_the_kernels_do_not_compute_in_is_refused(folder, monkeypatch):
    quantizer = AUTO_QUANTIZER_MAPPING["awq"]
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, **about: None)
    monkeypatch.setattr(quantizer, "update_dtype", lambda self, dtype: torch.float16)
    with pytest.raises(
        UserError, match=r"\(awq 4 bits\), which is computed in float16 here, not float32: add --dtype float16"
    ):
        loading.load(quantised(folder, AWQ), device="cpu", plan_only=True)
    loaded = loading.load(str(folder), device="cpu", dtype="float16", plan_only=True)
    assert loaded.quantization == loaded.row_fields()["quantization"] == "awq 4 bits"


def test_a_plan_of_what_is_loaded_elsewhere_takes_its_word(folder):
    name = quantised(folder, AWQ)
    planned = ModelSource(name, device="cpu", quantization="awq 4 bits").load(plan_only=True)
    assert planned.quantization == "awq 4 bits"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_fp8_on_a_cpu_is_dequantised_and_says_so(folder, prompt):
    plain = loading.load(str(folder), device="cpu")
    to_fp8(folder)
    loaded = loading.load(quantised(folder, FP8), device="cpu")
    assert loaded.quantization == "fp8, dequantized"
    assert ModelSource.of(loaded).quantization == "fp8, dequantized"
    assert loading.load(str(folder), device="cpu", plan_only=True).row_fields() == loaded.row_fields()
    assert loaded.dtype == "float32"
    ids = prompt(200)
    with torch.inference_mode(), applied(loaded.model, "dense"):
        got = loaded.model(ids).logits
    with torch.inference_mode():
        expected = plain.model(ids).logits
    error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < error < 0.1
    assert linear_flop(loaded.model, 100) == linear_flop(plain.model, 100)
