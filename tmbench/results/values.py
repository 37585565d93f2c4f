"""The values of a row's columns as texts of a CSV, and back."""

from __future__ import annotations

import re
from typing import Any, Final

from tmbench.errors import shortened

UNESCAPED: Final = {r"\\": "\\", r"\n": "\n", r"\r": "\r"}
"""How line ends, and the backslash that stands for them, are written in every column but ``error``."""
ESCAPES: Final = str.maketrans({plain: written for written, plain in UNESCAPED.items()})


def field_text(value: Any, name: str) -> str:
    """A value as its column holds it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return repr(value)
    # A row is one line of the file, whatever it holds. Of an error the words count; all else must read back as it was, or a
    # row would not be found under its own key.
    return " ".join(str(value).split()) if name == "error" else str(value).translate(ESCAPES)


def parse_value(text: str, hint: Any, name: str) -> Any:
    """A column's value, of the type that it is declared with; raises ValueError, naming it, for a text that is none."""
    kinds = getattr(hint, "__args__", (hint,))
    if text == "" and type(None) in kinds:
        return None
    if bool in kinds:
        if text not in ("yes", "no"):
            raise ValueError(f"{name} is {shortened(text)!r}, not yes or no")
        return text == "yes"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                raise ValueError(f"{name} is {shortened(text)!r}, not a number") from None
    # Hardly any text has one, and a search in each takes as long as all else of a row.
    if name == "error" or "\\" not in text:
        return text
    return re.sub(r"\\[\\nr]", lambda found: UNESCAPED[found[0]], text)
