"""RULER's thirteen tasks: prompts of an exact length, and their scores.

The tasks are those of Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?",
arXiv 2404.06654. The package knows text and a tokenizer; it knows no model.

Its modules are imported when something of them is first used, so that a command line can name its errors without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ruler_tasks.exports import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {__name__} has no attribute {name}")
        return getattr(import_module(f"{__name__}.exports"), name)
