"""The command line: options, progress and tables. What is measured, and how, lives in the modules that it calls."""

from __future__ import annotations

import sys

import typer
from rich.text import Text

from ruler_tasks.errors import RulerError
from tmbench.cli import agree, info, patterns, probe, report, ruler, sweep, ttft
from tmbench.cli.screen import error_console
from tmbench.errors import UserError

app = typer.Typer(
    name="tmbench",
    help="What an attention method costs and what it keeps when a language model reads a long prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("ttft")(ttft.ttft)
app.command("ruler")(ruler.ruler)
app.command("ruler-data")(ruler.ruler_data)
app.command("agree")(agree.agree)
app.command("sweep")(sweep.sweep)
app.add_typer(patterns.app, name="patterns")
app.command("probe")(probe.probe)
app.command("report")(report.report)
app.command("list")(info.list_)
app.command("env")(info.env)


def main() -> None:
    """Run the command line: bad input is one sentence and exit code 2, Ctrl-C is exit code 130."""
    try:
        app()
    except (UserError, RulerError) as error:
        error_console().print(Text.assemble(("Error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
