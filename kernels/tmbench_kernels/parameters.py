"""A pattern's parameters, declared once: range, default and one line of help, in the fields of its frozen dataclass.

All else follows from them: the check, the options and texts of a command line, the keywords, the columns of results. This
module imports no torch, nor does ``tmbench_kernels.shared``, so that a command line can show its help at once.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmbench_kernels.pattern import Pattern

LARGEST_COUNT = 2**31 - 1
"""More tokens than any prompt has: kernels count them in 32 bits."""
METADATA = "parameter"
"""Where a field of a dataclass keeps its declaration."""


class ParameterError(ValueError):
    """A value that a parameter cannot have. ``problem`` goes on from the parameter's name."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}{problem}")
        self.name = name
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """The declaration of one parameter.

    A range is any of the fields from ``at_least`` to ``choices``. Raises TypeError for a default from whose type it does not
    follow how a text is read, unless ``read`` says so.
    """

    default: Any
    help: str
    """One line."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    divides: int | None = None
    """A whole number that the value divides."""
    multiple_of: int | None = None
    """The value is a multiple of it, or 0 unless ``at_least`` says otherwise."""
    choices: tuple[str, ...] = ()
    tokens: bool = False
    """Whether it counts tokens, of which no prompt has more than ``LARGEST_COUNT``."""
    why: str = ""
    """What a range is for, where its message is to say so."""
    option: bool = False
    """Whether it is an option of the command line, as shared ones are; all parameters may follow a method's name."""
    shown_default: str = ""
    """The default in words, where the value does not say it."""
    unset: str = ""
    """How results name a value that is None or ""; "" leaves it out of them."""
    read: Callable[[Any], Any] | None = None
    """Makes the value of what a user gave; raises ValueError or OSError with what is wrong."""

    def __post_init__(self) -> None:
        if self.read is None and type(self.default) not in (int, float, str):
            raise TypeError(f"a parameter with the default {self.default!r} needs a function that reads it")

    def field(self) -> Any:
        """The field of a dataclass with this declaration."""
        return dataclasses.field(default=self.default, metadata={METADATA: self})

    def value(self, name: str, given: Any) -> Any:
        """The value of what a user gave, a text or a Python value; raises ParameterError for what is none."""
        try:
            found = self.read(given) if self.read is not None else self._converted(name, given)
        except ParameterError:
            raise
        except OSError as error:
            raise ParameterError(name, f": {error.filename or given} cannot be read: {error.strerror or error}") from error
        except (TypeError, ValueError) as error:
            raise ParameterError(name, f": {error}") from error
        self.check(name, found)
        return found

    def _converted(self, name: str, given: Any) -> Any:
        kind = type(self.default)
        try:
            whole = kind is not int or isinstance(given, str) or type(given) is int
            if whole and not isinstance(given, bool):
                return kind(given)
        except (TypeError, ValueError):
            pass
        wanted = {int: "a whole number", float: "a number", str: "a text"}[kind]
        raise ParameterError(name, f" must be {wanted}, not {_shown(given)}")

    def check(self, name: str, value: Any) -> None:
        """Raise ParameterError for a value out of range."""
        if problem := self._problem(value):
            raise ParameterError(name, problem)

    def _problem(self, value: Any) -> str:
        if self.choices:
            known = value in self.choices or value == self.default
            return "" if known else f" {value} is unknown: choose from {', '.join(self.choices)}"
        if self.tokens and value > LARGEST_COUNT:
            return f" is more tokens than any prompt has: give {LARGEST_COUNT} or less"
        why = f", {self.why}," * bool(self.why)
        if self.divides is not None and (value < 1 or self.divides % value):
            return f" must divide {self.divides}{why} but it is {value}"
        if self.multiple_of is not None and (value < (self.at_least or 0) or value % self.multiple_of):
            return f" must be {'' if self.at_least else '0 or '}a multiple of {self.multiple_of}, not {value}"
        # Written so that what is not a number is out of every range.
        inside = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )
        return "" if inside else f" must be {self._range()}, not {value}"

    def _range(self) -> str:
        if self.above is not None:
            return f"above {self.above:g}" + f" and at most {self.at_most or 0:g}" * (self.at_most is not None)
        if self.at_most is None:
            return f"{self.at_least:g} or more"
        return f"{self.at_most:g} or less" if self.at_least is None else f"between {self.at_least:g} and {self.at_most:g}"

    def named(self, value: Any) -> int | float | str:
        """A value as results hold it; "" where they leave it out."""
        if value is None or value == "":
            return self.unset
        return value if isinstance(value, int | float) else str(value)


def parameter(default: Any, *, help: str, **about: Any) -> Any:
    """The field of a dataclass that is a parameter of one method: see ``Parameter`` for what may be said of it."""
    return Parameter(default=default, help=help, **about).field()


class Declared(abc.ABC):
    """What a frozen dataclass of declared parameters derives from, so that they are checked when it is made.

    A ``__post_init__`` of its own begins with ``super().__post_init__()``.
    """

    def __post_init__(self) -> None:
        for name, about in declared(type(self)).items():
            about.check(name, getattr(self, name))

    @abc.abstractmethod
    def per_layer(self, layers: int, heads: int) -> Sequence[Pattern]:
        """One pattern for each layer of a model with so many layers, and so many query heads in each.

        Raises ValueError for parameters that do not fit such a model.
        """

    def useless(self) -> str:
        """Why no method is to run with these values, its parameters in braces; "" where one may."""
        return ""


@cache
def declared(kind: type[Declared]) -> Mapping[str, Parameter]:
    """The parameters that a dataclass declares, by name, in the order of its fields."""
    return {field.name: field.metadata[METADATA] for field in dataclasses.fields(kind) if METADATA in field.metadata}  # type: ignore[arg-type]


def _shown(given: Any, most: int = 60) -> str:
    """What a user gave, as a sentence can repeat it."""
    text = repr(given) if isinstance(given, str) else str(given)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"
