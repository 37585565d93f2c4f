"""The pages and their files: what each is made of, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tmbench.report.html import layers, overview, samples, scores, times, trade_offs
from tmbench.report.html.text import script_json, templates
from tmbench.report.report import Report, Tell, nobody
from tmbench.results.files import write_whole


@dataclass(frozen=True)
class Page:
    """One page: its file is its name with ".html"."""

    name: str
    title: str
    shows: str
    """A sentence on what it shows."""
    nothing: str
    """What it says where there is nothing to show."""
    make: Callable[[Report, Path], Mapping[str, Any]]
    """What its template is given, of a report and its results folder: ``blocks`` it shows, ``data`` for its scripts, and
    ``files`` to be written beside it by their names."""
    scripts: tuple[str, ...] = ("chart.js",)
    """What it has beside ``page.js``, in this order."""


PAGES = (
    Page(
        "trade-off",
        "Accuracy against time",
        "Points that a method loses against the time that it saves, with 95 % intervals, and the front of the best.",
        "No method was both timed and asked beside dense at one length: tmbench ttft and tmbench ruler measure that.",
        trade_offs.content,
    ),
    Page(
        "times",
        "Time to first token",
        "Seconds by the prompt's length, the roofline of each method, and the share of the causal pairs that it computed.",
        "No times were measured: tmbench ttft measures them.",
        times.content,
    ),
    Page(
        "tasks",
        "Tasks by methods",
        "Points against dense over the same samples, task by task; grey where the 95 % interval spans 0.",
        "No scores were measured: tmbench ruler measures them.",
        scores.content,
        ("heat.js",),
    ),
    Page(
        "samples",
        "Samples",
        "The samples in which a method and dense have unlike scores, with both answers.",
        "No method answered the same samples as dense, or the answers are not beside the rows: tmbench ruler keeps them.",
        samples.content,
        ("samples.js",),
    ),
    Page(
        "layers",
        "Layers",
        "How much the sections of each layer's attention matter, the layers that a probe proposes, and their density.",
        "No layers were probed: tmbench probe does it.",
        layers.content,
    ),
    Page(
        "further",
        "Answers and losses",
        "Tasks of lm-eval, how far long answers stay with dense's, and negative log-likelihoods of prompts and answers.",
        "Nothing of it was measured: tmbench lm-eval, tmbench agree and tmbench probe --loss do it.",
        overview.further_content,
        (),
    ),
    Page(
        "rows",
        "Rows and commands",
        "Every row with the command that repeats it.",
        "There are no rows.",
        overview.rows_content,
        ("rows.js",),
    ),
)


def written(report: Report, root: Path, directory: Path, tell: Tell = nobody) -> Iterator[Path]:
    """Write the pages of a results folder into another, made where there is none; their paths, the first page last.

    ``tell`` is told how many of the pages are made, and then how many of them are written. Files that are there already are
    replaced. Raises OSError where the folder cannot be written.
    """
    for shared in (files("tmbench.report.html") / "static").iterdir():
        write_whole(directory / shared.name, shared.read_bytes())
    contents = {}
    for number, page in enumerate(PAGES, 1):
        contents[page.name] = page.make(report, root)
        tell(number, 2 * len(PAGES))
    shown = [(page, bool(contents[page.name]["blocks"])) for page in PAGES]
    for number, page in enumerate(PAGES, 1):
        path = directory / f"{page.name}.html"
        given = {"page": page, "pages": shown, **contents[page.name], "data": script_json(contents[page.name]["data"])}
        if (beside := contents[page.name].get("files")) is not None:
            _write_beside(directory, beside)
        write_whole(path, _rendered(f"{page.name}.html", given))
        tell(len(PAGES) + number, 2 * len(PAGES))
        yield path
    first = directory / "index.html"
    write_whole(first, _rendered("index.html", {"page": None, "pages": shown, **overview.content(report)}))
    yield first


def _write_beside(directory: Path, made: Mapping[str, str]) -> None:
    """Write the files of samples, and take away those that an earlier report had more."""
    for name, text in made.items():
        write_whole(directory / name, text)
    for path in (directory / samples.FOLDER).glob("samples-*.js"):
        if re.fullmatch(r"samples-\d+\.js", path.name) and f"{samples.FOLDER}/{path.name}" not in made:
            path.unlink()


def _rendered(template: str, given: Mapping[str, Any]) -> str:
    return templates().get_template(template).render(given)
