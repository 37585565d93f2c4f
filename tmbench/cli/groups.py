"""Groups of options: a command takes one object, and its command line has an option for each of the object's parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any


def grouped(
    command: Callable[..., None], kind: type, options: Sequence[inspect.Parameter], make: Callable[[Mapping[str, Any]], Any]
) -> Callable[..., None]:
    """A command with these options in place of its one parameter of type ``kind``, which ``make`` makes of their values."""
    own = inspect.signature(command, eval_str=True)
    (place,) = (parameter.name for parameter in own.parameters.values() if parameter.annotation is kind)
    parameters = [each for name, own_one in own.parameters.items() for each in (options if name == place else [own_one])]

    @wraps(command)
    def run(**given: Any) -> None:
        values = {option.name: given.pop(option.name) for option in options}
        command(**given, **{place: make(values)})

    return with_parameters(run, parameters)


def with_parameters(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """The command, which Typer now takes to have these parameters."""
    command.__signature__ = inspect.signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
