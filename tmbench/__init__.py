"""tmbench: what an attention method costs and what it keeps when a language model reads a long prompt.

>>> with tmbench.applied(model, "tri_mix", layers="16-"):
...     new = tmbench.generate(model, inputs, max_new_tokens=256)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmbench.engine.attention import Applied, applied
    from tmbench.engine.decode import generate, read_prefix
    from tmbench.engine.prefix import Prefix
    from tmbench.errors import NotFiniteError, UnsupportedModelError, UserError
    from tmbench.methods.table import METHODS

__all__ = [
    "METHODS", "Applied", "NotFiniteError", "Prefix", "UnsupportedModelError", "UserError", "applied", "generate",
    "read_prefix",
]  # fmt: skip
__version__ = "0.1.0"

_HOME = {
    "applied": "engine.attention",
    "Applied": "engine.attention",
    "METHODS": "methods.table",
    "generate": "engine.decode",
    "read_prefix": "engine.decode",
    "Prefix": "engine.prefix",
}


def __getattr__(name: str) -> object:
    # Imported on first use: the command line's help must not wait for torch and transformers.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"tmbench.{_HOME.get(name, 'errors')}"), name)
    raise AttributeError(f"module 'tmbench' has no attribute {name!r}")
