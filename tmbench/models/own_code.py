"""Code that a checkpoint brings (``auto_map``), and what of a loaded model ran by it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

PACKAGE = "transformers_modules"
"""Under which transformers imports such code."""


def source_of(part: Any) -> str:
    """The text of the file that a checkpoint brought for this object's class; "" where it brought none."""
    name = type(part).__module__
    file = sys.modules[name].__file__ if _brought(name) else None
    return "" if file is None else Path(file).read_text(encoding="utf-8")


def _brought(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def code_hash(*parts: Any) -> str:
    """A hash of the files that these objects' classes came from, as far as a checkpoint brought them; "" for none."""
    found: set[Path] = set()
    for kind in {base for part in parts for base in type(part).__mro__}:
        if _brought(kind.__module__):
            file = sys.modules[kind.__module__].__file__
            assert file is not None
            found |= {Path(file), *map(Path, get_relative_import_files(file))}
    # The folder is transformers' own, and has another name on another machine.
    texts = sorted((path.name, path.read_bytes()) for path in found)
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:12] if texts else ""
