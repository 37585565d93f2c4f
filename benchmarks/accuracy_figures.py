"""Figures within sentences about the embedded model's RULER scores: in docs/accuracy.md and others.

A marker names a section of RULER scores and a method: ``points 4K tri_mix:2,4,6-7`` is how that method differs from dense.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import cache

from accuracy_tables import LAYERS, deep_layers
from sources import H100, INTEL, Block, Sources, only

from ruler_tasks import Example, examples
from ruler_tasks.sources import Sources as Texts
from tmbench.methods.layers import parse_layers
from tmbench.report.intervals import Difference
from tmbench.report.ruler import RulerCell, RulerSection
from tmbench.report.words import interval_text
from tmbench.results.rows import Row
from tmbench.results.variants import pattern_settings

PLACES: Mapping[str, Mapping[str, object]] = {
    "4K": {"device": H100, "length": 4096},
    "8K": {"device": H100, "length": 8192},
    "16K": {"device": H100, "length": 16384},
    "seed-43": {"device": INTEL, "length": 4096, "seed": 43},
    "one-thread": {"device": INTEL, "length": 4096, "seed": 42, "threads": 1},
    "sweep": {"device": INTEL, "length": 4096, "seed": 42, "threads": 2},
}
"""The sections of scores, by the names that markers give them."""
CWE = {"short": 6, "long": 30}
"""How often the common words of a prompt repeat."""


def _section(sources: Sources, place: str) -> RulerSection:
    return only(sources.results.ruler, **PLACES[place])


def is_of(row: Row, who: str) -> bool:
    """Whether a row is of a method such as ``minference``, ``tri_mix:2,4,6-7`` or ``tri_mix:2,4,7:n_local=512``."""
    method, *parts = who.split(":")
    settings = {name: str(value) for name, value in pattern_settings(row).items()}
    for part in parts:
        name, given, value = part.partition("=")
        if given and settings.get(name) != value:
            return False
        if not given and ("layers" not in settings or deep_layers(row) != parse_layers(part, LAYERS)):
            return False
    return row.method == method


def _label(section: RulerSection, who: str) -> str:
    found = {cell.label for cell in section.cells if is_of(cell.row, who)}
    if len(found) != 1:
        raise ValueError(f"{len(found)} methods are {who}")
    return found.pop()


def _cell(section: RulerSection, who: str, task: str) -> RulerCell:
    label = _label(section, who)
    (found,) = (cell for cell in section.measured(label) if cell.row.task == task)
    return found


def _difference(sources: Sources, place: str, who: str, task: str = "") -> Difference:
    section = _section(sources, place)
    found = _cell(section, who, task).difference if task else section.average_differences[_label(section, who)]
    assert isinstance(found, Difference), f"{who} at {place} is not compared with dense: {found}"
    return found


def points(sources: Sources, place: str, who: str, task: str = "") -> str:
    """Points against dense with their interval, of one task or of the average."""
    found = _difference(sources, place, who, task)
    return interval_text(found.mean, found.low, found.high)


def lost(sources: Sources, place: str, who: str, decimals: str, task: str = "") -> str:
    """How many points a method loses, without sign; raises ValueError for one that does not."""
    found = _difference(sources, place, who, task)
    if found.mean >= 0:
        raise ValueError(f"{who} at {place} loses nothing")
    return f"{-found.mean:.{decimals}f}"


def against(sources: Sources, place: str, who: str, other: str) -> str:
    """Points against another method over the same samples of all tasks, with their interval."""
    section = _section(sources, place)
    found = section.answers.compare(_label(section, who), _label(section, other), section.common_tasks)
    assert isinstance(found, Difference), f"{who} at {place} is not compared with {other}: {found}"
    return interval_text(found.mean, found.low, found.high)


def score(sources: Sources, place: str, who: str, task: str) -> str:
    """The score of one task."""
    return f"{_cell(_section(sources, place), who, task).row.score:g}"


def differing(sources: Sources, place: str, who: str, task: str = "") -> str:
    """In how many samples of a task, or of all, the score is not dense's."""
    return str(_difference(sources, place, who, task).differing)


def samples(sources: Sources, place: str, who: str) -> str:
    """How many samples a difference to dense rests on, all tasks together."""
    return str(_difference(sources, place, who).pairs)


def density(sources: Sources, place: str, who: str) -> str:
    """The density, the mean over the tasks."""
    section = _section(sources, place)
    return f"{section.densities[_label(section, who)]:.0%}".replace("%", " %")


@cache
def _drawn(count: int) -> list[Example]:
    """The first samples of cwe at 4K."""
    from tmbench.models.loading import load_tokenizer

    return list(examples("cwe", 4096, range(count), tokenizer=load_tokenizer("tiny"), sources=Texts(offline=True)))


def cwe(sources: Sources, what: str, kind: str = "") -> str:
    """Of the samples of cwe at 4K whose common words repeat often or seldom: how many there are, or a method's mean score.

    The files of predictions are older than the column that says so. The samples are drawn again, and are the same ones if
    their answers are.
    """
    section = _section(sources, "4K")
    answers = section.answers.samples[_label(section, "dense" if what == "samples" else what), "cwe"]
    found = []
    for example in _drawn(len(answers.scores)):
        if tuple(example.outputs) != answers.references[example.index]:
            raise ValueError(f"sample {example.index} of cwe is drawn otherwise now")
        if example.parameters["freq_cw"] == CWE[kind]:
            found.append(100 * answers.scores[example.index])
    return str(len(found)) if what == "samples" else f"{statistics.fmean(found):.1f}"


FIGURES: dict[str, Block] = {
    "points": points,
    "lost": lost,
    "against": against,
    "score": score,
    "differing": differing,
    "samples": samples,
    "density": density,
    "cwe": cwe,
}
