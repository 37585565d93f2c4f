"""Methods that other packages bring: entry points of the group ``tmbench.methods``, loaded when they are asked for.

The name of an entry point is the method's, and its object a ``Method``.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from tmbench.errors import UserError, shortened
from tmbench.methods.table import METHODS, Method, register

GROUP = "tmbench.methods"


def method_names() -> list[str]:
    """All methods: those of the table, then those that installed packages name; nothing is loaded."""
    return list(dict.fromkeys([*METHODS, *(point.name for point in _points())]))


def get_method(name: str) -> Method:
    """The method of that name, dashes as good as underscores.

    Raises UserError with the choices where there is none, and, naming the package, for one that cannot be loaded.
    """
    wanted = name.replace("-", "_")
    if wanted not in METHODS:
        points = [point for point in _points() if point.name == wanted]
        if not points:
            raise UserError(f"--method {shortened(name)} is unknown: choose from {', '.join(method_names())}")
        _load(points)
    return METHODS[wanted]


def _points() -> Iterable[EntryPoint]:
    return entry_points(group=GROUP)


def _load(points: list[EntryPoint]) -> None:
    """Register what entry points of one name stand for; raises UserError unless it is one method of that name."""
    packages = ", ".join(sorted(f"{point.dist.name if point.dist else '?'}" for point in points))
    name, remedy = points[0].name, "update or uninstall it"
    if len({point.value for point in points}) > 1:
        raise UserError(f"--method {name} is registered by several packages, {packages}: uninstall all but one")
    try:
        method = points[0].load()
        if isinstance(method, Method) and method.name != name:
            raise ValueError(f"its name is {method.name}")
        register(method)
    except Exception as error:
        # A package of somebody else's fails in ways of its own.
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"--method {name} of the package {packages} cannot be loaded ({type(error).__name__}: {reason}): {remedy}"
        ) from error
