"""The page of samples: those that a method lost or gained against dense, their answers side by side.

The texts are in files beside the page, which its script loads when they are asked for; each holds answers to the samples of
one task. Lines say how deep in its prompt an answer lay that stands there once; where prompts were kept, what is around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tmbench.report.html.blocks import Filters
from tmbench.report.html.text import script_json
from tmbench.report.intervals import Difference
from tmbench.report.report import Report
from tmbench.report.ruler import RulerCell, RulerSection
from tmbench.report.table import Table, columns
from tmbench.report.words import NOTHING
from tmbench.results.sample_texts import SampleText, depths_of, read_texts
from tmbench.results.words import length_name

CHUNK = 2**19
"""Characters of a file of texts from which on the next method's go to another."""
FOLDER = "data"
NEAR = 120
"""Characters on each side of an answer that are shown of its prompt."""
DEPTHS = 10
"""Into how many parts a prompt is divided by the map of depths."""


@dataclass(frozen=True)
class Group:
    """What one method answered to the samples of one task, against dense."""

    title: str
    by: Mapping[str, str]
    """What the filters find it by."""
    task: str
    label: str
    pairs: int
    lost: Sequence[int]
    """The samples in which dense has the higher score, by their number."""
    gained: Sequence[int]
    chunk: str


class Place(NamedTuple):
    """Where one answer lies in a prompt."""

    answer: str
    depth: float
    """The share of the prompt before it."""
    near: str
    """What is around it; "" where the prompt was not kept."""


@dataclass(frozen=True)
class Placed:
    """The scores of one sample with one answer, whose place is known."""

    section: RulerSection
    label: str
    depth: float
    """The share of the prompt before it."""
    own: float
    dense: float


def content(report: Report, root: Path) -> Mapping[str, Any]:
    """What the page's template is given; ``files`` are those to be written beside it, by their names."""
    groups: list[Group] = []
    files: dict[str, str] = {}
    placed: list[Placed] = []
    for section in report.scores:
        for task in section.tasks:
            for chunk in _chunks(section, task, root, placed):
                name = str(len(files))
                files[f"{FOLDER}/samples-{name}.js"] = f'tm.chunk("{name}",{chunk.json});\n'
                groups += [replace(group, chunk=name) for group in chunk.groups]
    groups.sort(key=lambda group: -len(group.lost) / group.pairs)
    shown = {(group.by["device"], group.by["model"], group.by["length"]) for group in groups}
    sections = [one for one in report.scores if (one.setting.device, one.setting.model, str(one.setting.length)) in shown]
    filters = Filters(
        {one.setting.device: one.cells[0].row.device_name or one.setting.device for one in sections},
        {one.setting.model: one.setting.model for one in sections},
        {str(length): length_name(length) for length in sorted({one.setting.length for one in sections})},
        {task: task for one in sections for task in one.tasks},
    )
    return {"blocks": groups[:1], "filters": filters, "data": groups, "files": files, "maps": depth_maps(placed)}


@dataclass
class Chunk:
    """What one file of texts holds: answers of some methods to samples of one task, and dense's beside them."""

    groups: list[Group] = field(default_factory=list)
    samples: dict[int, Any] = field(default_factory=dict)
    """By the sample's number: what was wanted, dense's score and answer, and the places of answers in the prompt."""
    answers: dict[str, dict[int, tuple[float, str]]] = field(default_factory=dict)
    """By the method's label and the sample's number: score and answer."""
    size: int = 0
    """Characters of all texts."""

    def add(self, group: Group, samples: Mapping[int, Any], answers: dict[int, tuple[float, str]]) -> None:
        """Add a method, with the samples in which it differs from dense."""
        self.groups.append(group)
        self.samples |= samples
        self.answers[group.label] = answers
        dense = [(one["dense"][1], *(place.near for place in one["places"])) for one in samples.values()]
        self.size += sum(len(text) for _, text in answers.values()) + sum(len(text) for texts in dense for text in texts)

    @property
    def json(self) -> str:
        """The texts, for a script."""
        return script_json({"samples": self.samples, "answers": self.answers})


def _chunks(section: RulerSection, task: str, root: Path, placed: list[Placed]) -> Iterator[Chunk]:
    """The methods that were compared with dense on a task, with what was answered where they differ from it.

    What is known of places is added to ``placed``.
    """
    cells = {cell.label: cell for cell in section.cells if cell.row.task == task}
    compared = [cell for cell in cells.values() if isinstance(cell.difference, Difference)]
    if not compared:
        return
    asked, dense = section.answers.samples["dense", task], read_texts(root, cells["dense"].row)
    places: dict[int, Sequence[Place]] = {}
    chunk = Chunk()
    for cell in compared:
        texts, scores = read_texts(root, cell.row), section.answers.samples[cell.label, task].scores
        pairs = [index for index in scores if index in asked.scores]
        for index in pairs:
            if index not in places:
                wanted = list(map(str, asked.references[index]))
                places[index] = _places(dense.get(index), wanted) or _places(texts.get(index), wanted)
            if len(asked.references[index]) == len(places[index]) == 1:
                placed.append(Placed(section, cell.label, places[index][0].depth, scores[index], asked.scores[index]))
        lost = [index for index in pairs if scores[index] < asked.scores[index]]
        gained = [index for index in pairs if scores[index] > asked.scores[index]]
        chunk.add(
            _group(section, cell, len(pairs), lost, gained),
            {
                index: {
                    "wanted": asked.references[index],
                    "dense": (asked.scores[index], _text(dense, index)),
                    "places": places[index],
                }
                for index in (*lost, *gained)
            },
            {index: (scores[index], _text(texts, index)) for index in (*lost, *gained)},
        )
        if chunk.size > CHUNK:
            yield chunk
            chunk = Chunk()
    if chunk.groups:
        yield chunk


def _group(section: RulerSection, cell: RulerCell, pairs: int, lost: Sequence[int], gained: Sequence[int]) -> Group:
    about, task = section.setting, cell.row.task
    by = {"device": about.device, "model": about.model, "length": str(about.length), "task": task}
    title = f"{section.title}; {cell.row.device_name or about.device}"
    return Group(title, by, task, cell.label, pairs, lost, gained, "")


def _text(texts: Mapping[int, SampleText], index: int) -> str:
    return texts[index].prediction if index in texts else ""


def _places(sample: SampleText | None, references: Sequence[str]) -> list[Place]:
    """Where the answers lie that stand in their prompt once."""
    if sample is None:
        return []
    prompt = sample.prompt
    depths = depths_of(prompt, references) if prompt else sample.depths
    if len(depths) != len(references):
        return []
    found = []
    for reference, depth in zip(references, depths, strict=True):
        if depth is not None:
            start = prompt.find(reference)
            near = prompt[max(0, start - NEAR) : start + len(reference) + NEAR] if prompt else ""
            found.append(Place(reference, depth, near))
    return found


def depth_maps(placed: Sequence[Placed]) -> list[Table]:
    """A table of mean scores by depth and length for each model and method; of samples with one answer, at a known place."""
    together: dict[tuple[object, str], list[Placed]] = {}
    for one in placed:
        together.setdefault((replace(one.section.setting, length=0), one.label), []).append(one)
    tables = []
    for (_, label), own in together.items():
        setting = own[0].section.setting
        lengths = sorted({one.section.setting.length for one in own})
        lines = []
        for part in range(DEPTHS):
            there = [one for one in own if min(int(one.depth * DEPTHS), DEPTHS - 1) == part]
            ends = f"{100 * part // DEPTHS} to {100 * (part + 1) // DEPTHS} %"
            lines.append([ends, *(_mean([one for one in there if one.section.setting.length == each]) for each in lengths)])
        caption = f"{label}, {setting.subject}, {setting.words}: scores of the method / dense (samples) by depth and length:"
        tables.append(Table(caption, columns("depth", *map(length_name, lengths), texts=("depth",)), lines))
    return tables


def _mean(placed: Sequence[Placed]) -> str:
    if not placed:
        return NOTHING
    own, dense = (100 * sum(scores) / len(placed) for scores in zip(*((one.own, one.dense) for one in placed), strict=True))
    return f"{own:.0f} / {dense:.0f} ({len(placed)})"
