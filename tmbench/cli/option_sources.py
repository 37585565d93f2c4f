"""Where a command's options come from beside the command line: a file of a run, and environment variables."""

from __future__ import annotations

import copy
import hashlib
import inspect
import sys
import tomllib
from collections.abc import Callable, Container, Mapping
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tomli_w
import typer
from typer.models import OptionInfo

from tmbench import __version__
from tmbench.cli.groups import with_parameters
from tmbench.errors import UserError, shortened

PREFIX = "TMBENCH"
COMMAND = "command"
"""What a file of a run calls the command that it is of."""
RUNS = "runs"
"""The folder of those files, below the one of the results."""
NO_PART = ("config", "plan")
"""Options that are no part of a run."""


def with_sources(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the option ``--config``, and each of its options an environment variable.

    ``--batch-size`` of ``tmbench ttft`` is ``TMBENCH_TTFT_BATCH_SIZE``, or ``TMBENCH_BATCH_SIZE`` for all commands. The
    command line comes before those, and those before the file. A run that has measured leaves such a file behind, below its
    ``--output-dir``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [_with_variables(name, parameter) for parameter in own]
        names = {parameter.name: _long(parameter) for parameter in parameters}
        repeated = {parameter.name for parameter in parameters if _repeated(parameter)}

        def read(context: typer.Context, value: Path | None) -> Path | None:
            if value is not None:
                context.default_map = _read(value, name, names, repeated)
            return value

        @wraps(command)
        def run(context: typer.Context, config: Path | None, **given: Any) -> None:
            measured = False
            try:
                command(**given)
                measured = True
            except (typer.Exit, KeyboardInterrupt):
                measured = True
                raise
            finally:
                if measured and "output_dir" in given and not given.get("plan"):
                    _write(given["output_dir"] / RUNS, name, _given(context, names, given))

        option = typer.Option(
            "--config", metavar="FILE.toml", is_eager=True, callback=read, rich_help_panel="Output",
            help="Take options from this file, such as one that an earlier run left behind.",
        )  # fmt: skip
        added = [
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            inspect.Parameter(
                "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, option]
            ),
        ]
        return with_parameters(run, [*parameters, *added])

    return decorate


def _info(parameter: inspect.Parameter) -> OptionInfo | None:
    found = [about for about in getattr(parameter.annotation, "__metadata__", ()) if isinstance(about, OptionInfo)]
    return found[0] if found else None


def _long(parameter: inspect.Parameter) -> str:
    """The option's name without its dashes."""
    info = _info(parameter)
    # The first argument of typer.Option is a name as well, inside of Annotated.
    texts = [] if info is None else [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
    declared = [text.partition("/")[0].partition(",")[0] for text in texts if text.startswith("--")]
    return declared[0].removeprefix("--") if declared else parameter.name.replace("_", "-")


def _repeated(parameter: inspect.Parameter) -> bool:
    kind = getattr(parameter.annotation, "__origin__", parameter.annotation)
    return any(get_origin(each) is list for each in (kind, *get_args(kind)))


def _with_variables(command: str, parameter: inspect.Parameter) -> inspect.Parameter:
    info = _info(parameter)
    if info is None or info.envvar:
        return parameter
    option, of = (text.upper().replace("-", "_").replace(" ", "_") for text in (_long(parameter), command))
    own = copy.copy(info)
    own.envvar, own.show_envvar = [f"{PREFIX}_{of}_{option}", f"{PREFIX}_{option}"], False
    return parameter.replace(annotation=Annotated[parameter.annotation.__origin__, own])


def _read(file: Path, command: str, names: Mapping[str, str], repeated: Container[str]) -> dict[str, Any]:
    """The values of a file by the names of the command's parameters, as the texts that the command line would have.

    ``repeated`` are the parameters that take several values. Raises UserError for what is no option, or no value of one.
    """
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} is no TOML: {shortened(str(error))}") from error
    of = found.pop(COMMAND, command)
    if of != command:
        raise UserError(f"--config {file} is of tmbench {of}, not of tmbench {command}: give a file of the latter")
    options = {long.replace("-", "_"): parameter for parameter, long in names.items()}
    values = {}
    for key, value in found.items():
        parameter = options.get(key.replace("-", "_"))
        if parameter is None or parameter in NO_PART:
            near = get_close_matches(key.replace("-", "_"), options, 1)
            meant = f"did you mean {names[options[near[0]]]}?" if near else f"tmbench {command} --help lists them"
            raise UserError(f"--config {file}: {shortened(key)} is no option of tmbench {command}; {meant}")
        values[parameter] = _texts(file, key, [value] if parameter in repeated and not isinstance(value, list) else value)
    return values


def _texts(file: Path, key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(file, key, one) for one in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, str | int | float):
        return str(value)
    raise UserError(f"--config {file}: {key} must be a text, a number, true, false, or a list of those")


def _given(context: typer.Context, names: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, whether on the command line, by a variable or in a file: the rest has the values of this version."""
    found = {}
    for parameter, long in names.items():
        source, value = context.get_parameter_source(parameter), values[parameter]
        if parameter not in NO_PART and value is not None and source is not None and source.name != "DEFAULT":
            found[long] = [_plain(one) for one in value] if isinstance(value, list | tuple) else _plain(value)
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | bool | int | float) else str(value)


def _write(folder: Path, command: str, options: Mapping[str, Any]) -> None:
    about = f"# Repeat with tmbench {command} --config, by tmbench {__version__} on Python {sys.version.split()[0]}.\n"
    text = tomli_w.dumps({COMMAND: command, **options})
    file = folder / f"{command.replace(' ', '-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.toml"
    if file.exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(about + text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}, which would repeat this run, cannot be written: {error.strerror}") from error
