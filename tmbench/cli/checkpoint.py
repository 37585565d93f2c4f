"""The options that say how the checkpoint of --model is loaded, which every command that loads one has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from tmbench.cli.groups import grouped

PANEL = "How the checkpoint is loaded"


@dataclass(frozen=True)
class Checkpoint:
    """What the options say; their names are those of ``tmbench.models.loading.load``."""

    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit of a Hugging Face id.",
            rich_help_panel=PANEL,
            show_default="the newest",
            metavar="NAME",
        ),
    ] = None
    gguf_file: Annotated[
        str | None,
        typer.Option(
            help="A GGUF file in the folder or repository of --model, which may also be the file itself.",
            rich_help_panel=PANEL,
            show_default=False,
            metavar="FILE.gguf",
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.", rich_help_panel=PANEL),
    ] = False
    rope_scaling: Annotated[
        str | None,
        typer.Option(
            help="Scale rotary embeddings, for longer prompts than the model was trained on: yarn:factor=4,original=32768, "
            "linear, dynamic, llama3, or the JSON of a config.",
            rich_help_panel=PANEL,
            show_default="as its config says",
            metavar="SCALING",
        ),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """The options by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


AS_IT_IS = Checkpoint()


def with_checkpoint(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options in place of its parameter of the type ``Checkpoint``, which it is called with.

    ``without`` are options that the command does not have.
    """
    declared = inspect.get_annotations(Checkpoint, eval_str=True)
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    options = [
        inspect.Parameter(field.name, place, default=field.default, annotation=declared[field.name])
        for field in fields(Checkpoint)
        if field.name not in without
    ]
    return lambda command: grouped(command, Checkpoint, options, lambda values: Checkpoint(**values))
