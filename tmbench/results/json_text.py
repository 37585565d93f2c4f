"""JSON as other programs read it too: the format has no word for a number that is not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(content: Any) -> str:
    """Indented JSON of nested mappings, lists and tuples; floats that are not finite are null.

    Letters beyond ASCII are escaped, so that no terminal's encoding can change them.
    """
    return json.dumps(finite(content), indent=2, allow_nan=False)


def finite(content: Any) -> Any:
    """The same nested content with null for floats that are not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content
