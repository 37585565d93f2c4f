"""A method's parameters as the one text that rows keep of them: ``layers=16- n_init=8 n_local=512 last_n=128``.

Pairs stand in the order in which the method declares them, which is how they are shown; what was measured does not depend on
it, so keys are made of the pairs in the order of their names. Numbers stand bare, and so does a text that is no number and
holds neither white space nor quotes; any other text is a string of JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from tmbench.errors import shortened

Value = int | float | str

_PAIR = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)=("(?:[^"\\]|\\.)*"|[^\s"]+)(?: (?=\S)|$)')


def parameters_text(parameters: Mapping[str, Value]) -> str:
    """The text of parameters; those at "" are left out, as are those that a method does not read."""
    return " ".join(f"{name}={_value_text(value)}" for name, value in parameters.items() if value != "")


def _value_text(value: Value) -> str:
    if not isinstance(value, str):
        return repr(value)
    bare = re.fullmatch(r'[^\s"]+', value) is not None and isinstance(_bare(value), str)
    return value if bare else json.dumps(value)


def _bare(text: str) -> Value:
    """The number that ``parameters_text`` writes so, or the text itself."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if repr(number) == text and math.isfinite(number):
            return number
    return text


@lru_cache(maxsize=4096)
def parse_parameters(text: str) -> Mapping[str, Value]:
    """The parameters of such a text, in its order; raises ValueError for any other."""
    found: dict[str, Value] = {}
    place = 0
    while place < len(text):
        pair = _PAIR.match(text, place)
        if pair is None or pair[1] in found:
            raise ValueError(f"parameters is {shortened(text)!r}, which is no list of them")
        value = pair[2]
        found[pair[1]] = json.loads(value) if value.startswith('"') else _bare(value)
        place = pair.end()
    return MappingProxyType(found)
