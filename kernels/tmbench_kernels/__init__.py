"""Attention on tensors: one folder per pattern, each with its definition and its backends.

Torch is imported when something of it is first used, so that a command line can read declarations without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmbench_kernels.exports import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {__name__} has no attribute {name}")
        return getattr(import_module(f"{__name__}.exports"), name)
