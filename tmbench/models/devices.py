"""On which device a model is loaded, and in which type."""

from __future__ import annotations

from typing import Any

import torch

from tmbench.errors import UserError
from tmbench_kernels import Dense

AUTO = "auto"
"""For --dtype: the checkpoint's own."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> torch.device:
    """The torch device of that name; raises UserError where this machine has none, or no backend runs on its type."""
    types = dict.fromkeys(place for backend in Dense.backends for place in backend.devices)
    try:
        device = torch.device(name)
        if device.type not in types:
            raise UserError(f"--device {name} has no backend of attention: choose from {', '.join(types)}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {name} cannot be used here ({reason}): try --device {default_device()}") from error
    return device


def check_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The torch type of that name; None means bfloat16 on a GPU and float32 elsewhere."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype {name} is unknown: choose from {', '.join((*DTYPES, AUTO))}")
    return DTYPES[name]


def saved_dtype(name: str, config: Any) -> torch.dtype:
    """The type that a checkpoint's config says it is saved in; raises UserError where it says none that is served."""
    saved = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    saved = getattr(torch, saved, None) if isinstance(saved, str) else saved
    if saved not in DTYPES.values():
        says = "no type" if saved is None else str(saved).removeprefix("torch.")
        raise UserError(f"--dtype auto: the config of {name} says {says}: choose from {', '.join(DTYPES)}")
    assert isinstance(saved, torch.dtype)
    return saved
