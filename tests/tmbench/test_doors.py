"""Which package may import which: never upward, never in a circle, and only what its head allows."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ruler_tasks
import tmbench
import tmbench_kernels

ROOT = Path(tmbench.__file__).parent
DOORS = {
    "errors": set(),
    "results": set(),
    "methods": {"results", "tmbench_kernels"},
    "models": {"methods", "results", "tmbench_kernels"},
    "engine": {"models", "methods", "results", "tmbench_kernels"},
    "suites": {"models", "methods", "results", "ruler_tasks"},
    "measure": {"engine", "suites", "models", "methods", "results", "tmbench_kernels", "ruler_tasks"},
    "executors": {"measure", "models", "results"},
    "serving": {"methods", "results", "tmbench_kernels"},
    "report": {"methods", "results", "ruler_tasks", "tmbench_kernels"},
    "cli": {
        "executors", "serving", "measure", "report", "engine", "suites", "models", "methods", "results", "ruler_tasks",
        "tmbench_kernels",
    },
}  # fmt: skip
"""What each package of tmbench may import beside itself, ``tmbench.errors`` and the version."""

FOREIGN = {"torch": {"ruler_tasks"}, "transformers": {"ruler_tasks", "tmbench_kernels"}, "typer": set(DOORS) - {"cli"}}
"""Libraries, and who must not import them."""


def sources():
    """(package, file) of every module of ours; a file directly in tmbench/ is a package of its own name."""
    for file in sorted(ROOT.rglob("*.py")):
        yield file.relative_to(ROOT).parts[0].removesuffix(".py"), file
    for package in (ruler_tasks, tmbench_kernels):
        assert package.__file__
        for file in sorted(Path(package.__file__).parent.rglob("*.py")):
            yield package.__name__, file


def imported(file):
    """The dotted names that a file imports, wherever in it; those of ``from tmbench.a import b`` are tmbench.a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides where it leads"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def arrows():
    """(package, imported package, file) of every import of ours by ours."""
    for package, file in sources():
        for name in imported(file):
            first, _, rest = name.partition(".")
            if first in ("ruler_tasks", "tmbench_kernels"):
                yield package, first, file
            elif first == "tmbench":
                yield package, rest.partition(".")[0], file


def test_every_file_belongs_to_a_package():
    there = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert there == {"__init__.py", "__main__.py", "errors.py", "py.typed"}
    folders = {path.name for path in ROOT.iterdir() if any(path.glob("*.py"))}
    assert folders == DOORS.keys() - {"errors"}


def test_no_arrow_but_those_allowed():
    wrong = []
    for package, other, file in arrows():
        allowed = DOORS.get(package, set()) | {package, "errors", "__version__"}
        if package not in ("__init__", "__main__") and other not in allowed:
            wrong.append(f"{file} imports tmbench.{other}")
    assert not wrong, "\n".join(wrong)


def test_the_doors_form_no_circle():
    order = list(TopologicalSorter(DOORS).static_order())
    places = [order.index(name) for name in ("results", "methods", "models", "engine", "measure", "cli")]
    assert places == sorted(places)


@pytest.mark.parametrize("package", [name for name in DOORS if name not in ("errors", "cli")])
def test_a_package_says_what_it_may_import(package):
    head = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
    assert head, "a package has a head"
    assert len(head.splitlines()) <= 8
    said = head.rpartition("May import: ")[2]
    assert said != head, "its head must say what it may import"


def test_no_library_where_it_does_not_belong():
    for package, file in sources():
        for name in imported(file):
            assert package not in FOREIGN.get(name.partition(".")[0], ()), f"{file} imports {name}"


def test_modules_form_no_circle():
    """A module that needs another to be imported first, and the other way round, is one module in two files."""
    files = {}
    for _, file in sources():
        top = next(place for place in file.parents if not (place / "__init__.py").exists())
        files[".".join(file.relative_to(top).with_suffix("").parts).removesuffix(".__init__")] = file
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        graph[module] = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    graph[module].add(name if name in files else str(node.module))
            elif isinstance(node, ast.Import):
                graph[module].update(alias.name for alias in node.names)
        graph[module] &= files.keys()
    list(TopologicalSorter(graph).static_order())
