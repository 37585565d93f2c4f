"""The files in which MInference publishes its search results: which pattern each head of a model takes.

A list with one object per layer; each maps a head's number, as a string, to ``[type, columns, distances, score]``
(arXiv 2407.02490, section 3.2; microsoft/MInference, ``minference/configs``). The score is not used at run time.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmbench_kernels.vertical_slash import DEFAULT_BUDGET

MOST_MEBIBYTES = 64
"""A published file has a tenth of one."""
MOST_DIGITS = 9
HEAD_TYPES = ("vertical_and_slash", "stream_llm", "block_sparse")


@dataclass(frozen=True)
class HeadPattern:
    """One head's entry: its type, how many columns and distances it may keep, and the score of the search."""

    type: str = "vertical_and_slash"
    vertical: int = DEFAULT_BUDGET[0]
    slash: int = DEFAULT_BUDGET[1]
    score: float = 1.0


@dataclass(frozen=True)
class HeadPatterns:
    """What a file holds, read once. As a text it is the file's stem and a hash of its content."""

    path: Path
    digest: str
    layers: tuple[Mapping[int, HeadPattern], ...]
    """Each layer's heads, by the head's number; heads may be missing."""

    @classmethod
    def read(cls, path: str | Path) -> HeadPatterns:
        """The patterns of a file; raises as ``read_head_patterns`` does."""
        layers = tuple(read_head_patterns(path))
        return cls(Path(path), hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8], layers)

    def fitted(self, *, layers: int, heads: int) -> list[tuple[HeadPattern, ...]]:
        """One entry per layer and query head of a model of that size; a head that is missing gets the default.

        Raises ValueError for a model of another size.
        """
        path, read = self.path, self.layers
        if len(read) != layers:
            raise ValueError(
                f"{path} is for a model with {len(read)} layer{'s' * (len(read) != 1)}, but this one has {layers}"
            )
        found = max((max(layer, default=-1) for layer in read), default=-1) + 1
        # Single heads may be missing, but the last head missing in every layer means a smaller model.
        if found not in (0, heads):
            raise ValueError(f"{path} is for a model with {found} query heads, but this one has {heads}")
        return [tuple(layer.get(head, HeadPattern()) for head in range(heads)) for layer in read]

    def __str__(self) -> str:
        return f"{self.path.stem}:{self.digest}"


def read_head_patterns(path: str | Path) -> list[dict[int, HeadPattern]]:
    """What a file says of each layer's heads, by the head's number; heads may be missing.

    Raises ValueError, in one sentence that names file, layer and head, for a malformed file. A file that cannot be read
    raises OSError.
    """
    path = Path(path)
    text = _text(path)
    try:
        content = json.loads(
            text, parse_int=_whole_number, parse_constant=_refuse_constant, object_pairs_hook=_object_without_twins
        )
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} must hold a list with one object per layer, but is nested too deeply") from None
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
    return HeadPatterns.read(path).fitted(layers=layers, heads=heads)


def head_patterns_json(layers: Sequence[Sequence[HeadPattern]]) -> str:
    """The text of a file that holds these entries, one line per layer, as the published files are laid out."""
    lines = [
        json.dumps({str(number): [head.type, head.vertical, head.slash, head.score] for number, head in enumerate(layer)})
        for layer in layers
    ]
    return "[" + ",\n".join(lines) + "]\n"


def _text(path: Path) -> str:
    """A file's text; what has no end, such as a pipe or a device, is refused before it is opened."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):  # opening a folder says so itself
        raise ValueError(f"{path} is a pipe or a device: give a file")
    if stat.S_ISREG(about.st_mode) and about.st_size > MOST_MEBIBYTES * 2**20:
        raise ValueError(f"{path} has more than {MOST_MEBIBYTES} MiB, which no file of patterns has")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not valid JSON: it is not UTF-8 text") from None


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits is no count")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _object_without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _shown(value: Any) -> str:
    """A value as a sentence can repeat it."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "lists within lists"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _head_number(path: Path, layer: int, key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= MOST_DIGITS and key == str(int(key))):
        raise ValueError(f"{path}, layer {layer}: '{key[:60]}' is not the number of a head")
    return int(key)


def _entry(path: Path, layer: int, head: str, value: Any) -> HeadPattern:
    where = f"{path}, layer {layer}, head {head}"
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"{where}: expected [type, columns, distances, score], not {_shown(value)}")
    kind, vertical, slash, score = value
    if kind not in HEAD_TYPES:
        raise ValueError(f"{where}: unknown type {_shown(kind)}; the format has {', '.join(HEAD_TYPES)}")
    for name, count in (("columns", vertical), ("distances", slash)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{where}: the number of {name} must be a count, not {_shown(count)}")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"{where}: the score must be a number, not {_shown(score)}")
    return HeadPattern(kind, vertical, slash, float(score))
