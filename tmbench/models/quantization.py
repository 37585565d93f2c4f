"""Checkpoints whose weights are quantised: what rows call them, and whether transformers loads them here.

What transformers makes ordinary weights of, for want of a kernel, is said to be dequantised: its times are of another model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from tmbench.errors import UserError

REMEDY = "give the folder or id of the same model without quantisation"
MAY_DEQUANTIZE = "dequantize"
"""The attribute by which transformers' configs say that ordinary weights are to be made."""


def words_of(config: Any) -> str:
    """How a model's config says that its weights are quantised, such as "fp8" or "awq 4 bits"; "" for ordinary ones."""
    given = _given(config)
    if given is None:
        return ""
    told = [f"{given['bits']} bits"] if given.get("bits") else []
    told += [str(given["format"])] if isinstance(given.get("format"), str) else []
    method = getattr(given.get("quant_method"), "value", given.get("quant_method")) or _bitsandbytes(given)
    return " ".join([str(method or "unnamed"), *told])


def prepare(name: str, config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Have a config say how its quantised weights are loaded here; as ``words_of``, with what becomes of them.

    On a CPU those become ordinary ones that can. Raises UserError for what cannot be loaded here, and for another type than
    the kernels compute in.
    """
    words, given = words_of(config), _given(config)
    if given is None:
        return ""
    if given.get("quant_method") not in AUTO_QUANTIZER_MAPPING and not _bitsandbytes(given):
        raise UserError(f"--model {name} is quantised in a way that transformers does not know ({words}): {REMEDY}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantizer = AutoHfQuantizer.from_config(given, pre_quantized=True)
            about = quantizer.quantization_config
            if device.type == "cpu" and hasattr(about, MAY_DEQUANTIZE):
                setattr(about, MAY_DEQUANTIZE, True)
            quantizer.validate_environment(device_map={"": str(device)}, weights_only=True)
            computes_in = quantizer.update_dtype(dtype)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"--model {name} is quantised ({words}), which cannot be loaded here ({reason}): {REMEDY}"
        ) from error
    if isinstance(computes_in, torch.dtype) and computes_in != dtype:
        wanted, asked = (str(kind).removeprefix("torch.") for kind in (computes_in, dtype))
        raise UserError(
            f"--model {name} is quantised ({words}), which is computed in {wanted} here, not {asked}: add --dtype {wanted}"
        )
    if not getattr(about, MAY_DEQUANTIZE, False):
        return words
    # As a mapping, as transformers reads it from a config.
    config.quantization_config = given | {MAY_DEQUANTIZE: True}
    return f"{words}, dequantized"


def _given(config: Any) -> dict[str, Any] | None:
    """What a config says of its weights, of the whole model or of its text part."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def _bitsandbytes(given: Mapping[str, Any]) -> str:
    """What older configs say by one of two switches alone."""
    bits = next((bits for bits in ("4", "8") if given.get(f"load_in_{bits}bit")), "")
    return f"bitsandbytes {bits} bits" if bits else ""
