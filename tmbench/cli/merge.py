"""``tmbench merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tmbench.cli import options as o
from tmbench.cli.progress import progress_bar
from tmbench.cli.screen import console, print_rows, say, say_failures
from tmbench.results.words import counted

if TYPE_CHECKING:
    from tmbench.results.shards import Shard


def merge(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Results folders that runs with --shard wrote to.", show_default=False),
    ],
    output_dir: o.OutputDirOption = o.RESULTS,
    as_json: o.JsonOption = False,
) -> None:
    """Join the samples that shards measured, and make the rows of them that one run would have made.

    Neither a GPU nor the model is needed. Nothing is taken away, and what was merged before is not made again.
    """
    from tmbench.measure.merge import merge as merged

    with progress_bar() as bar:
        task = bar.add_task("shards")
        found = merged(
            folders, output_dir, lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
        )
    if as_json:
        print_rows(found.made)
    else:
        before = f", {found.there} were there" * bool(found.there)
        console().print(
            f"{counted(len(found.made), 'row')} made of {counted(len(found.shards), 'shard')}{before}; "
            f"{counted(found.samples, 'sample')} joined under {output_dir}",
            highlight=False,
        )
    say_failures(found.made)
    for shard, titles in sorted(found.missing.items()):
        say(_missing(shard, titles))
    if found.missing or any(row.status != "ok" for row in found.made):
        raise typer.Exit(1)


def _missing(shard: Shard, titles: list[str]) -> str:
    named = titles[0] if len(titles) == 1 else f"{counted(len(titles), 'row')}, such as {titles[0]}"
    return f"shard {shard} has not finished {named}: run it again, or give its folder too, and merge again"
