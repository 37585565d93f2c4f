"""Reads RULER's published wording from where it is installed, without importing or running any of it.

Two places hold it: a checkout of NVIDIA/RULER (`scripts/data/synthetic/`), and the port in lm-eval
(`lm_eval/tasks/ruler/`), whose modules download things when they are imported. Both are read as syntax trees. The
result has the layout of `wording.toml`, so that everything after it is the same for every wording.

The published needle names its type in the plural always, the question in the plural or, when one value is asked
for, in a singular that is made by replacing words in the template; the replacements are read from the source too.
The port's prefixes lack RULER's leading space, which is restored; its spelling is left as it is.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruler_tasks.errors import WordingError
from ruler_tasks.files import read_text

_PLURALS = ("numbers", "words", "uuids")
MOST_MEBIBYTES = 16
_RULER = Path("scripts/data/synthetic")
_PORT = Path("lm_eval/tasks/ruler")


def read_reference(place: Path | None = None) -> dict[str, Any]:
    """The published wording as nested tables.

    Args:
        place: a RULER checkout, its `synthetic` folder, or a folder that holds lm-eval; None for the installed lm-eval.

    Raises:
        WordingError: there is none, or its source is not laid out as in the versions known.
    """
    if place is None:
        folder, name = _installed_port()
        return _from_port(folder, name)
    for folder in (place / _RULER, place / "data/synthetic", place):
        if (folder / "constants.py").is_file() and (folder / "niah.py").is_file():
            return _from_ruler(folder)
    for folder in (place / _PORT, place / "tasks/ruler", place):
        if (folder / "niah_utils.py").is_file():
            return _from_port(folder, "reference-lm-eval")
    raise WordingError(f"There is neither a RULER checkout nor an lm-eval in {place}.")


def _installed_port() -> tuple[Path, str]:
    spec = importlib.util.find_spec("lm_eval")
    for root in spec.submodule_search_locations or () if spec else ():
        folder = Path(root) / "tasks" / "ruler"
        if folder.is_dir():
            try:
                version = importlib.metadata.version("lm_eval")
            except importlib.metadata.PackageNotFoundError:
                version = "unknown"
            return folder, f"reference-lm-eval-{version}"
    raise WordingError(
        "The reference wording needs lm-eval (the extra 'reference'), which is not installed, or a RULER checkout."
    )


def _from_ruler(folder: Path) -> dict[str, Any]:
    tasks = _literal(folder / "constants.py", "TASKS")
    niah = _pair(tasks, "niah", folder)
    code = folder / "niah.py"
    one = {key: _singular(text, code) for key, text in niah.items()}
    return _tables(
        name="reference-ruler",
        noise=_literal(code, "haystack"),
        needle=_literal(code, "needle"),
        one=one,
        many=niah,
        by_line=_by_line(folder / "variable_tracking.py"),
        vt=_pair(tasks, "variable_tracking", folder),
        cwe=_pair(tasks, "common_words_extraction", folder),
        fwe=_pair(tasks, "freq_words_extraction", folder),
        qa=_pair(tasks, "qa", folder),
        document=_literal(folder / "qa.py", "DOCUMENT_PROMPT"),
    )


def _from_port(folder: Path, name: str) -> dict[str, Any]:
    template = _literal(folder / "niah_utils.py", "TEMPLATE")
    code = folder / "prepare_niah.py"
    singular, plural = _prefixes(code)
    vt, cwe, fwe, qa = (_literal(folder / f"{task}_utils.py", "CONFIG") for task in ("vt", "cwe", "fwe", "qa"))
    return _tables(
        name=name,
        noise=_literal(code, "haystack"),
        needle=_literal(code, "NEEDLE"),
        one={"template": _singular(template, code), "answer_prefix": singular},
        many={"template": template, "answer_prefix": plural},
        by_line=_by_line(folder / "vt_utils.py"),
        vt=_pair(vt, "variable_tracking", folder),
        cwe=_pair({"cwe": cwe}, "cwe", folder),
        fwe=_pair({"fwe": fwe}, "fwe", folder),
        qa=_pair({"qa": qa}, "qa", folder),
        document=_literal(folder / "qa_utils.py", "DOCUMENT_PROMPT"),
    )


def _tables(
    *,
    name: str,
    noise: str,
    needle: str,
    document: str,
    by_line: bool,
    one: Mapping[str, str],
    many: Mapping[str, str],
    **rest: Any,
) -> dict[str, Any]:
    def table(prompt: Mapping[str, str], type_field: str) -> dict[str, str]:
        filled = {key: _renamed(text, type_needle_v=type_field, num_v="{count}") for key, text in prompt.items()}
        prefix = filled["answer_prefix"]
        filled["answer_prefix"] = prefix if prefix[:1].isspace() else f" {prefix}"
        return filled

    types = {plural: plural.removesuffix("s") for plural in _PLURALS}
    tables = {task: table(prompt, "{type}") for task, prompt in rest.items()}
    return {
        "name": name,
        "noise": noise.strip(),
        "niah": {
            "needle": _renamed(needle, type_needle_v="{type}s"),
            "types": types,
            "one": table(one, "{type}"),
            "many": table(many, "{type}s"),
        },
        **tables,
        "vt": {**tables["vt"], "by_line": by_line},
        "qa": {**tables["qa"], "document": document},
    }


def _renamed(template: str, **fields: str) -> str:
    for field, replacement in fields.items():
        template = template.replace("{" + field + "}", replacement)
    return template.replace("{num_cw}", "10")


def _pair(tasks: Any, task: str, folder: Path) -> dict[str, str]:
    try:
        return {key: str(tasks[task][key]) for key in ("template", "answer_prefix")}
    except (KeyError, TypeError) as error:
        raise WordingError(f"The source in {folder} holds no template and answer prefix for {task!r}.") from error


def _nodes(path: Path) -> Iterator[ast.AST]:
    try:
        return ast.walk(ast.parse(read_text(path, MOST_MEBIBYTES)))
    except OSError as error:
        raise WordingError(f"The reference wording cannot be read from {path}: {error.strerror or error}.") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the parser has a limited stack
        raise WordingError(f"The reference wording cannot be read from {path}: it is not Python source.") from error


def _literal(path: Path, name: str) -> Any:
    """The first literal that the source assigns to `name`, at any depth of nesting; computed values are passed over."""
    for node in _nodes(path):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            try:
                return ast.literal_eval(node.value)
            except (ValueError, RecursionError, MemoryError):
                continue
    raise WordingError(f"The source {path} assigns no literal to {name!r}.")


def _by_line(path: Path) -> bool:
    """Whether variable tracking joins its lines by newlines; so, too, where the source is missing or says nothing of it."""
    if not path.is_file():
        return True
    joined = {
        node.func.value.value
        for node in _nodes(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "join"
        and isinstance(node.func.value, ast.Constant)
        and any(isinstance(argument, ast.Name) and argument.id == "sentences" for argument in node.args)
    }
    return joined != {" "}


def _singular(template: str, path: Path) -> str:
    """The template for one value, by the `template.replace(old, new)` calls of the source in their order."""
    calls = [
        node
        for node in _nodes(path)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "replace"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "template"
    ]
    if not calls:
        raise WordingError(f"The source {path} does not say how a template becomes singular.")
    for call in sorted(calls, key=lambda call: call.lineno):
        try:
            old, new = (str(ast.literal_eval(argument)) for argument in call.args)
        except ValueError as error:
            raise WordingError(f"The source {path} does not say how a template becomes singular.") from error
        template = template.replace(old, new)
    return template


def _prefixes(path: Path) -> tuple[str, str]:
    """The port's two answer prefixes, singular and plural: the f-strings of one conditional expression."""
    for node in _nodes(path):
        if isinstance(node, ast.IfExp) and isinstance(node.body, ast.JoinedStr | ast.Constant):
            texts = [_f_string(branch) for branch in (node.body, node.orelse)]
            if all(text and "{query}" in text for text in texts):
                return str(texts[0]), str(texts[1])
    raise WordingError(f"The source {path} holds no pair of answer prefixes.")


def _f_string(node: ast.expr) -> str | None:
    """An f-string as a format template; the slice that drops the plural's s becomes the singular type's field."""
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = []
    for value in node.values:
        if isinstance(value, ast.Constant):
            parts.append(str(value.value).replace("{", "{{").replace("}", "}}"))
        elif isinstance(value, ast.FormattedValue) and isinstance(value.value, ast.Name):
            parts.append("{" + value.value.id + "}")
        elif isinstance(value, ast.FormattedValue) and isinstance(value.value, ast.Subscript):
            parts.append("{type}")
        else:
            return None
    return "".join(parts)
