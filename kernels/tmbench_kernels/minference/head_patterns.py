"""The files in which MInference publishes its search results: which pattern each head of a model takes.

A list with one object per layer; each maps a head's number, as a string, to ``[type, columns, distances, score]``
(arXiv 2407.02490, section 3.2; microsoft/MInference, ``minference/configs``). The score is not used at run time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmbench_kernels.vertical_slash import DEFAULT_BUDGET

HEAD_TYPES = ("vertical_and_slash", "stream_llm", "block_sparse")


@dataclass(frozen=True)
class HeadPattern:
    """One head's entry: its type, how many columns and distances it may keep, and the score of the search."""

    type: str = "vertical_and_slash"
    vertical: int = DEFAULT_BUDGET[0]
    slash: int = DEFAULT_BUDGET[1]
    score: float = 1.0


def read_head_patterns(path: str | Path) -> list[dict[int, HeadPattern]]:
    """What a file says of each layer's heads, by the head's number; heads may be missing.

    Raises ValueError, in one sentence that names file, layer and head, for a malformed file. A file that cannot be read
    raises OSError.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, list) or not all(isinstance(layer, dict) for layer in content):
        raise ValueError(f"{path} must hold a list with one object per layer")
    return [
        {_head_number(path, index, key): _entry(path, index, key, value) for key, value in layer.items()}
        for index, layer in enumerate(content)
    ]


def load_head_patterns(path: str | Path, *, layers: int, heads: int) -> list[tuple[HeadPattern, ...]]:
    """One entry per layer and query head of a model of that size; a head that the file leaves out gets the default.

    Raises as ``read_head_patterns`` does, and ValueError for a file that is made for another number of layers or heads.
    """
    read = read_head_patterns(path)
    if len(read) != layers:
        raise ValueError(f"{path} is for a model with {len(read)} layers, but this one has {layers}")
    found = max((max(layer, default=-1) for layer in read), default=-1) + 1
    # Single heads may be missing, but the last head missing in every layer means a smaller model.
    if found not in (0, heads):
        raise ValueError(f"{path} is for a model with {found} query heads, but this one has {heads}")
    return [tuple(layer.get(head, HeadPattern()) for head in range(heads)) for layer in read]


def head_patterns_json(layers: Sequence[Sequence[HeadPattern]]) -> str:
    """The text of a file that holds these entries, one line per layer, as the published files are laid out."""
    lines = [
        json.dumps({str(number): [head.type, head.vertical, head.slash, head.score] for number, head in enumerate(layer)})
        for layer in layers
    ]
    return "[" + ",\n".join(lines) + "]\n"


def _head_number(path: Path, layer: int, key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        raise ValueError(f"{path}, layer {layer}: '{key}' is not the number of a head")
    return int(key)


def _entry(path: Path, layer: int, head: str, value: Any) -> HeadPattern:
    where = f"{path}, layer {layer}, head {head}"
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"{where}: expected [type, columns, distances, score], not {json.dumps(value)}")
    kind, vertical, slash, score = value
    if kind not in HEAD_TYPES:
        raise ValueError(f"{where}: unknown type {json.dumps(kind)}; the format has {', '.join(HEAD_TYPES)}")
    for name, count in (("columns", vertical), ("distances", slash)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{where}: the number of {name} must be a count, not {json.dumps(count)}")
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"{where}: the score must be a number, not {json.dumps(score)}")  # noqa: TRY004
    return HeadPattern(kind, vertical, slash, float(score))
