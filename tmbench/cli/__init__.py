"""The command line: options, progress and tables. What is measured, and how, lives in the modules that it calls."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.text import Text

from ruler_tasks.errors import RulerError
from tmbench import __version__
from tmbench.cli import (
    agree,
    demo,
    info,
    lm_eval,
    merge,
    patterns,
    probe,
    ranks,
    report,
    ruler,
    serving,
    streams,
    suite,
    sweep,
    ttft,
    tune,
)
from tmbench.cli.option_sources import with_sources
from tmbench.cli.screen import error_console
from tmbench.errors import UnfinishedError, UserError
from tmbench.models import parallel

VersionOption = Annotated[bool, typer.Option("--version", help="Print the version.")]

app = typer.Typer(
    name="tmbench",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def top(version: VersionOption = False) -> None:
    """What an attention method costs and what it keeps when a language model reads a long prompt."""
    if version:
        typer.echo(f"tmbench {__version__}")
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    "ttft": ttft.ttft,
    "ruler": ruler.ruler,
    "ruler-data": ruler.ruler_data,
    "suite": suite.suite,
    "lm-eval": lm_eval.lm_eval,
    "agree": agree.agree,
    "sweep": sweep.sweep,
    "probe": probe.probe,
    "tune": tune.tune,
    "merge": merge.merge,
    "report": report.report,
    "serving": serving.serving,
    "demo": demo.demo,
    "list": info.list_,
    "env": info.env,
}
for name, command in COMMANDS.items():
    app.command(name)(with_sources(name)(command))
app.add_typer(patterns.app, name="patterns")


def main() -> None:
    """Run the command line: bad input is one sentence and exit code 2, Ctrl-C is exit code 130.

    What ends a run in its midst is one sentence too, and exit code 1, as are rows that say that something failed.
    """
    if parallel.launched():
        ranks.across(_main)
    else:
        _main()


def _main() -> None:
    streams.prepare()
    try:
        _run()
    except (UserError, RulerError) as error:
        try:
            error_console().print(Text.assemble(("Error:", "bold red"), f" {error}"), soft_wrap=True)
        except OSError:
            streams.abandon(sys.stderr)
        # Of several ranks those that say nothing are told the sentence.
        raise SystemExit(1 if isinstance(error, UnfinishedError) else 2) from error


def _run() -> None:
    """The command, and what it has left to write: where an output takes no more, a UserError says so."""
    try:
        try:
            ranks.check_command(sys.argv[1:])
            app()
        finally:
            streams.flush()
    except OSError as error:
        # What is about a file has its name.
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            raise
        for stream, name in ((sys.stdout, "standard output"), (sys.stderr, "standard error")):
            if stream is not None and streams.is_full(stream):
                streams.abandon(stream)
                raise UserError(f"{name} cannot be written ({error.strerror}): give it another place") from error
        raise
