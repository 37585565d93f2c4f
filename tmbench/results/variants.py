"""Methods with their parameters: what tells those of one name apart, in words, and which is the dense attention to compare with.

A plan is one, and so is a row. One method may be measured in several settings, in one run or in several: what it is called
beside others follows from them, here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from tmbench.results.parameters_text import Value

DENSE = "dense"
DENSE_BACKEND = "dense_backend"
"""The one setting that decides how dense attention is computed, and not which pairs: it changes no accuracy."""
_LABEL = re.compile(r"(\w+)(?: \(([^)]*)\))?(?: |$)")


class Variant(Protocol):
    """A method with its parameters."""

    @property
    def method(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Value]: ...


V = TypeVar("V", bound=Variant)


Identity = tuple[str, frozenset[tuple[str, Value]]]
"""A method's name with its parameters, in whatever order these stand."""


def identity(one: Variant) -> Identity:
    """What two plans or rows of one method in the same setting have in common, and no others."""
    return identity_of(one.method, one.settings)


def identity_of(method: str, settings: Mapping[str, Value]) -> Identity:
    """The same of a method by its name, and of parameters as results hold them."""
    return method, frozenset(settings.items())


def pattern_settings(one: Variant) -> dict[str, Value]:
    """What decides which pairs a method computes, and so what it keeps."""
    return {name: value for name, value in one.settings.items() if name != DENSE_BACKEND}


def parameter_names(ones: Iterable[Variant]) -> list[str]:
    """The parameters that any of them has, in the order in which they have them."""
    names: list[str] = []
    for own in dict.fromkeys(tuple(pattern_settings(one)) for one in ones):
        for place, name in enumerate(own):
            if name not in names:
                # A new one comes before the next that is known.
                following = (names.index(other) for other in own[place:] if other in names)
                names.insert(next(following, len(names)), name)
    return names


def labels(ones: Sequence[Variant]) -> list[str]:
    """What each is called among all: its method's name, with those parameters in which variants of that method differ."""
    variants: dict[str, list[Variant]] = {}
    for one in ones:
        variants.setdefault(one.method, []).append(one)
    differing = {}
    for method, own in variants.items():
        settings = [one.settings for one in own]
        names = [*parameter_names(own), DENSE_BACKEND]
        differing[method] = [name for name in names if len({given.get(name, "") for given in settings}) > 1]
    return [_label(one, differing[one.method]) for one in ones]


def _label(one: Variant, differing: Sequence[str]) -> str:
    if not differing:
        return one.method
    given = one.settings
    values = ", ".join(f"{name} {given[name]}" for name in differing if name in given)
    return f"{one.method} ({values})" if values else one.method


def labels_in(text: str) -> list[str]:
    """The labels of a text that has them one after the other, with spaces between them."""
    return [match[0].strip() for match in _LABEL.finditer(text)]


def own_label(one: Variant, among: Iterable[str]) -> str:
    """What one is called among such labels; its method's name where it is none of them."""
    values = {f"{name} {value}" for name, value in one.settings.items()}
    found = {}
    for label in among:
        method, _, told = label.removesuffix(")").partition(" (")
        told_values = told.split(", ") if told else []
        if method == one.method and values.issuperset(told_values):
            found[label] = len(told_values)
    # One without a parameter that others have is called by less, so of two that fit the longer one is meant.
    return max(found, key=found.__getitem__, default=one.method)


def dense_of(ones: Sequence[V]) -> V | None:
    """The dense attention that all else is held against: as tmbench chooses its backend, else the first with a backend of
    its own; None where there is none."""
    own = [one for one in ones if one.method == DENSE]
    return min(own, key=lambda one: DENSE_BACKEND in one.settings, default=None)
