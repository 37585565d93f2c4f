"""What goes into the pages: templates that escape everything, and JSON that no browser takes for markup."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tmbench.results.json_text import finite
from tmbench.results.words import counted

IN_SCRIPTS = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}
"""What could end a script, or begin something else in it, and how JSON writes it otherwise."""


def script_json(content: Any) -> str:
    """Compact JSON of dataclasses, mappings and lists, for a script of a page.

    Letters beyond ASCII are escaped too, U+2028 among them.
    """
    text = json.dumps(finite(content), separators=(",", ":"), ensure_ascii=True, allow_nan=False, default=_fields)
    return text.translate(IN_SCRIPTS)


def _fields(content: Any) -> Any:
    """A dataclass as a mapping of its fields; raises TypeError for what is none."""
    return finite({field.name: getattr(content, field.name) for field in fields(content)})


@cache
def templates() -> Environment:
    """The templates of the pages; a name that a template is not given is an error."""
    made = Environment(
        loader=PackageLoader("tmbench.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"counted": counted, "coded": coded}
    return made


def coded(text: str) -> Markup:
    """A text in which what stands between backticks is code, all of it escaped."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(text.split("`"))
    )
