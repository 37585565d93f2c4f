"""The weights that a checkpoint has, against those that its config asks for.

transformers draws at random what it misses, and drops what it has no place for, with a table in its log. Both change every
figure, so both are refused, whether the weights are read or a run is only planned.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tmbench.errors import UserError
from tmbench.models import fingerprint
from tmbench.models.attention_modules import self_attentions
from tmbench.models.checkpoint import some, tensor_shapes

NOT_USED = ("k_scale", "v_scale", "q_scale", "inv_freq", "masked_bias")
"""How names end of what a decoder layer may hold without a use here: scales of a cache in 8 bits, older buffers."""
PREDICTED = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Where configs say how many layers follow the last one that predict further tokens, which transformers leaves out."""

DIGITS = re.compile(r"\.\d+\.")


def check_loaded(name: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise UserError where a checkpoint lacks weights of the model, or has some in its layers that the model has not.

    ``info`` is what ``from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`` returns. What is tied
    or computed, such as a tied head and tables of rotary embeddings, transformers does not count as missing.
    """
    unexpected = sorted(map(str, info["unexpected_keys"]))
    if missing := sorted(map(str, info["missing_keys"])):
        others = (
            f"; it has {len(unexpected)} others that the model has no place for: {some(unexpected)}" if unexpected else ""
        )
        raise UserError(
            f"--model {name} lacks {_count(missing)} of the model, which would be drawn at random: {some(missing)}{others}; "
            "complete the checkpoint, give the config that belongs to it, or use --weights random"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        shown = (f"{key} ({_shape(has)} instead of {_shape(wanted)})" for key, has, wanted in mismatched)
        raise UserError(
            f"--model {name} has {_count(mismatched)} of another shape than its config says: {some(shown)}; "
            "give the config that belongs to the weights"
        )
    belongs = _belongs(model)
    if unused := [key for key in unexpected if belongs(key)]:
        where = "decoder layers" if all(DIGITS.search(key) for key in unused) else "parts of the model"
        raise UserError(
            f"--model {name} has {_count(unused)} of {where} that its config does not know: {some(unused)}; "
            "give the config that belongs to the weights"
        )


def check_planned(name: str, model: PreTrainedModel, folder: Path) -> None:
    """As ``check_loaded``, for a model on the meta device and weights of which only names and shapes are read."""
    if getattr(model.config, "quantization_config", None) is not None:
        # Its weights have other shapes than the model's, and what fits them may need a GPU.
        return
    weights = {key: _without_data(shape) for key, shape in _shapes(folder).items()}
    _, info = _bare(type(model)).from_pretrained(
        None,
        config=model.config,
        state_dict=weights,
        dtype=model.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loaded(name, model, info)


def _shapes(folder: Path) -> dict[str, torch.Size]:
    found: dict[str, torch.Size] = {}
    for file in fingerprint.weight_files(folder):
        path = folder / file
        if path.suffix == ".safetensors":
            found |= tensor_shapes(path) or {}
        elif path.suffix == ".bin":
            tensors = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
            found |= {key: tensor.shape for key, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    return found


class _Named(torch.Tensor):
    """A tensor of the meta device that stays there: transformers moves all that it loads to the device of the model."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to:
            args, kwargs = args[:1], {"dtype": (kwargs or {}).get("dtype") or args[0].dtype}
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _without_data(shape: torch.Size) -> torch.Tensor:
    made: torch.Tensor = torch.empty(shape, dtype=torch.float16, device="meta").as_subclass(_Named)
    return made


def _bare(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same class, which leaves what it misses on the meta device and draws nothing."""

    def leave(*given: Any, **options: Any) -> None: ...

    body = {
        "_move_missing_keys_from_meta_to_device": leave,
        "_initialize_missing_keys": leave,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), body)


def _belongs(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a weight of this name is in a decoder layer, there or not, or in a part of the model that has weights."""
    modules = dict(model.named_modules())
    attentions = set(self_attentions(model))
    stacks = {_stack(name, modules) for name, module in modules.items() if module in attentions} - {""}
    text = model.config.get_text_config()
    predicted = max(int(getattr(text, name, None) or 0) for name in PREDICTED)
    base = model.base_model_prefix

    def belongs(key: str) -> bool:
        if key.rpartition(".")[2].endswith(NOT_USED) or ".rotary_emb." in key:
            return False
        for name in (key, f"{base}.{key}"):
            for stack in stacks:
                number = name.removeprefix(f"{stack}.").partition(".")[0] if name.startswith(f"{stack}.") else ""
                if number.isdecimal():
                    beyond = int(number) - len(modules[stack])
                    return not 0 <= beyond < predicted
            parent = modules.get(name.rpartition(".")[0])
            if parent is not None and next(parent.parameters(recurse=False), None) is not None:
                return True
        return False

    return belongs


def _stack(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The list of layers that a module is in; "" where it is in none."""
    while name:
        name = name.rpartition(".")[0]
        if isinstance(modules.get(name), nn.ModuleList):
            return name
    return ""


def _shape(size: Iterable[int]) -> str:
    return "x".join(map(str, size)) or "a number"


def _count(names: list[Any]) -> str:
    return f"{len(names)} weight{'s' * (len(names) != 1)}"
