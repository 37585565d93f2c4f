"""The words of the prompts: ours, a file of the same layout, or the published ones read where they are installed.

The task format is RULER's (Hsieh et al. 2024, arXiv 2404.06654, appendix on task prompts); the sentences of the shipped
`wording.toml` are our own, so scores under it do not compare with published ones. `load_wording("reference")` reads the
published sentences at run time (module `reference`).
"""

from __future__ import annotations

import hashlib
import json
import string
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruler_tasks.errors import WordingError
from ruler_tasks.files import read_text


@dataclass(frozen=True)
class Prompt:
    """A task's text: `template` up to where the model's turn begins, `answer_prefix` from there on."""

    template: str
    answer_prefix: str

    def render(self, **fields: object) -> tuple[str, str]:
        """Template and answer prefix with their {fields} filled in."""
        return self.template.format(**fields), self.answer_prefix.format(**fields)


@dataclass(frozen=True)
class Wording:
    """Every sentence that a prompt is made of; {braces} are filled in by the generators."""

    name: str
    noise: str
    needle: str
    types: Mapping[str, str] = field(hash=False)
    niah_one: Prompt
    niah_many: Prompt
    vt: Prompt
    cwe: Prompt
    fwe: Prompt
    document: str
    qa: Prompt
    vt_by_line: bool = True
    """Whether the published code of this wording puts each line of `vt` on a line of its own, as RULER does since May 2025;
    before, and in lm-eval, lines of noise end in a newline and all are joined by spaces. Only `published` drawing asks."""

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits of the SHA-256 of the sentences; the name does not enter."""
        content = {key: value for key, value in asdict(self).items() if key not in ("name", "vt_by_line")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


_FIELDS: dict[str, tuple[set[str], set[str]]] = {  # key in the file: (fields it must have, fields it may have)
    "noise": (set(), set()),
    "niah.needle": ({"key", "value"}, {"type"}),
    "niah.one.template": ({"context", "query"}, {"type"}),
    "niah.one.answer_prefix": (set(), {"type", "query"}),
    "niah.many.template": ({"context", "query"}, {"type"}),
    "niah.many.answer_prefix": (set(), {"type", "query"}),
    "vt.template": ({"context", "query"}, {"count"}),
    "vt.answer_prefix": (set(), {"count", "query"}),
    "cwe.template": ({"context"}, set()),
    "cwe.answer_prefix": (set(), set()),
    "fwe.template": ({"context"}, set()),
    "fwe.answer_prefix": (set(), set()),
    "qa.document": ({"document"}, {"i"}),
    "qa.template": ({"context", "query"}, set()),
    "qa.answer_prefix": (set(), set()),
}


MOST_MEBIBYTES = 16
"""No wording is as long as this."""


def load_wording(spec: str | Path | Wording | None = None) -> Wording:
    """The wording that `spec` asks for.

    Args:
        spec: None or "tmbench" for the shipped one; "reference" for the published one from an installed lm-eval;
            "reference:DIR" or a folder for the one of a RULER checkout or of an unpacked lm-eval; any other path for a
            TOML file laid out like the shipped one.

    Raises:
        WordingError: it cannot be found or read, or lacks a sentence or a field.
    """
    if isinstance(spec, Wording):
        return spec
    if spec is None or str(spec) == "tmbench":
        return _shipped()
    try:
        folder = Path(spec).is_dir()
        if folder or str(spec) == "reference" or str(spec).startswith("reference:"):
            from ruler_tasks.reference import read_reference

            place = spec if folder else str(spec).removeprefix("reference").removeprefix(":")
            return from_mapping(read_reference(Path(place) if place else None), "the reference wording")
        text = read_text(Path(spec), MOST_MEBIBYTES)
    except OSError as error:
        raise WordingError(f"The wording {str(spec)!r} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise WordingError(f"The wording file {spec} is not UTF-8 text.") from error
    return parse(text, str(spec))


def _shipped() -> Wording:
    return parse(files("ruler_tasks").joinpath("wording.toml").read_text(encoding="utf-8"), "the shipped wording")


def parse(text: str, where: str) -> Wording:
    """A wording from TOML text; `where` names it in error messages."""
    try:
        return from_mapping(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise WordingError(f"The wording file {where} is not valid TOML: {error}.") from error
    except RecursionError as error:
        raise WordingError(f"The wording file {where} is nested too deeply.") from error
    except ValueError as error:
        if isinstance(error, WordingError):
            raise
        raise WordingError(f"The wording file {where} holds a number that is too long.") from error


def from_mapping(content: Mapping[str, Any], where: str) -> Wording:
    """A wording from the nested tables of its TOML layout, checked.

    Raises:
        WordingError: a sentence is missing or is no string, or has not the fields that it needs.
    """
    for key, (needed, allowed) in _FIELDS.items():
        _check_fields(_string(content, key, where), key, needed, needed | allowed, where)
    types = {kind: _string(content, f"niah.types.{kind}", where) for kind in ("numbers", "words", "uuids")}
    name = content.get("name")
    if not isinstance(name, str) or not name:
        raise WordingError(f"The wording of {where} has no name.")

    def prompt(table: str) -> Prompt:
        keys = f"{table}.template", f"{table}.answer_prefix"
        return Prompt(*(_string(content, key, where) for key in keys))

    return Wording(
        name=name,
        noise=content["noise"],
        needle=content["niah"]["needle"],
        types=types,
        niah_one=prompt("niah.one"),
        niah_many=prompt("niah.many"),
        vt=prompt("vt"),
        cwe=prompt("cwe"),
        fwe=prompt("fwe"),
        document=content["qa"]["document"],
        qa=prompt("qa"),
        vt_by_line=content["vt"].get("by_line", True) is not False,
    )


def _string(content: Mapping[str, Any], key: str, where: str) -> str:
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, str) or not value.strip():
        raise WordingError(f"The wording of {where} lacks the text {key!r}.")
    return value


def _check_fields(text: str, key: str, needed: set[str], allowed: set[str], where: str) -> None:
    try:
        parts = [part for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError as error:
        raise WordingError(f"The text {key!r} of {where} has unbalanced braces: {error}.") from error
    found = {str(name) for _, name, _, _ in parts}
    if missing := needed - found:
        raise WordingError(f"The text {key!r} of {where} lacks the field {{{min(missing)}}}.")
    if unknown := found - allowed:
        raise WordingError(f"The text {key!r} of {where} has the unknown field {{{min(unknown)}}}.")
    if formatted := {str(name) for _, name, form, conversion in parts if form or conversion}:
        raise WordingError(f"The text {key!r} of {where} formats the field {{{min(formatted)}}}: write its name alone.")
