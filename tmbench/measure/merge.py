"""Shards put together: their samples joined in the files of a results folder, and rows made of them as a run makes them.

A row is made when every shard of it has its samples. Nothing is loaded for it: a shard's record has the row as far as it
is known before anything is measured, and the samples have the rest.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tmbench.errors import UserError, shortened
from tmbench.measure.accuracy import answer_rows, answers_stand
from tmbench.measure.agree import choice_rows, choices_stand
from tmbench.measure.keeping import WHEN, RowTarget
from tmbench.measure.loss import loss_rows
from tmbench.measure.probe import ProbeSample, Proposing, gradient_rows, rivals
from tmbench.measure.spec import Item
from tmbench.methods.layers import Budget
from tmbench.results.choices import Choices
from tmbench.results.environment import copy_record
from tmbench.results.failures import Failure
from tmbench.results.loss_samples import LossSample, kept_losses
from tmbench.results.predictions import Prediction
from tmbench.results.rows import OK, AgreeRow, LossRow, ProbeRow, Row
from tmbench.results.sample_files import Kept, read_entries_of
from tmbench.results.shards import Record, Shard, read_records, sample_files
from tmbench.results.tables import newest
from tmbench.results.variants import identity, labels
from tmbench.suites.suite import Suite
from tmbench.suites.table import SUITES

MACHINES = ("driver", "python")
"""Columns in which machines of one cluster may differ: a row names what all of them had."""
KEPT_BESIDE = (*WHEN, *MACHINES)
SLOT = ("method", "task", "prompt", "length", "question")
"""What people know a row by."""


@dataclass
class Merged:
    """What came of a merge."""

    shards: set[Shard] = field(default_factory=set)
    samples: int = 0
    """How many were joined now."""
    made: list[Any] = field(default_factory=list)
    """The rows that were made now."""
    there: int = 0
    """How many had been made before."""
    missing: dict[Shard, list[str]] = field(default_factory=dict)
    """Of shards that have not finished: the rows, in words, that wait for them."""


@dataclass(frozen=True)
class _Kind:
    """How rows of a kind are made of samples."""

    sample: type[Any]
    """Of a sample."""
    make: Callable[[Record[Any], Sequence[Path]], Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]]
    """What makes the rows of a record, whose results folders are these."""
    stands: Callable[[Path, Any], bool] | None = None
    latest: Callable[[Any], Any] | None = None


def _answers(suite: type[Suite], record: Record[Any], roots: Sequence[Path]) -> Any:
    return partial(answer_rows, suite(), record.files[""])


def _choices(record: Record[Any], roots: Sequence[Path]) -> Any:
    return partial(choice_rows, record.files[""])


def _gradients(record: Record[Any], roots: Sequence[Path]) -> Any:
    return partial(gradient_rows, Proposing(**{**record.wish, "budget": Budget(**record.wish["budget"])}))


def _losses(record: Record[Any], roots: Sequence[Path]) -> Any:
    row = replace(record.row, method="dense", parameters="", layers_source="")
    dense = [kept_losses(root, row).read() for root in roots]
    return partial(loss_rows, record.files[""], dict(ChainMap(*map(dict, dense))))


KINDS: Mapping[type[Row], _Kind] = {
    **{suite.row: _Kind(Prediction, partial(_answers, suite), answers_stand) for suite in SUITES.values()},
    AgreeRow: _Kind(Choices, _choices, choices_stand),
    ProbeRow: _Kind(ProbeSample, _gradients, latest=rivals),
    LossRow: _Kind(LossSample, _losses),
}
"""The kinds of rows that shards measure."""


@dataclass
class _Part:
    """A record, and the results folder that it lies in."""

    root: Path
    record: Record[Any]

    @property
    def settings(self) -> dict[str, str]:
        """All that shards of one row agree in, as texts."""
        columns = {name: str(value) for name, value in asdict(self.record.row).items() if name not in KEPT_BESIDE}
        return columns | {f"proposal's {name}": json.dumps(value) for name, value in self.record.wish.items()}


@dataclass
class _Group:
    """The parts of one row."""

    parts: list[_Part]
    label: str = ""
    """What its method is called among those of all rows."""

    @property
    def title(self) -> str:
        row = self.parts[0].record.row
        about = getattr(row, "task", "") or getattr(row, "prompt", "")
        question = getattr(row, "question", 1)
        return f"{self.label} on {about} at {row.length}" + f", question {question}" * (question > 1)

    @property
    def slot(self) -> tuple[Any, ...]:
        row = self.parts[0].record.row
        return (type(row), *(getattr(row, name, "") for name in SLOT))

    def by_count(self) -> dict[int, dict[Shard, _Part]]:
        """By how many shards the run was split into: which of them are here."""
        found: dict[int, dict[Shard, _Part]] = {}
        for part in self.parts:
            found.setdefault(part.record.shard.of, {})[part.record.shard] = part
        return found

    @property
    def whole(self) -> list[_Part]:
        """The parts of all shards, in their order; none where one is missing."""
        return next((_in_order(here) for of, here in sorted(self.by_count().items()) if len(here) == of), [])

    @property
    def missing(self) -> set[Shard]:
        """What is missing of the run that most is there of."""
        of, here = max(self.by_count().items(), key=lambda one: (len(one[1]) / one[0], -one[0]))
        return {Shard(number, of) for number in range(1, of + 1)} - set(here)


def _in_order(here: Mapping[Shard, _Part]) -> list[_Part]:
    return [here[shard] for shard in sorted(here)]


def merge(roots: Sequence[Path], output: Path, show: Callable[[str, int, int], None] = lambda *about: None) -> Merged:
    """Join the samples of all shards in these results folders, and make the rows of which all shards have theirs.

    What is in ``output`` already stays, so merging again changes nothing. ``show`` is given a title, how many rows are
    done, and how many there are.

    Raises UserError for a folder that is not there, for folders without shards, for shards that differ in what they
    measured, before anything is written, and for files that cannot be used.
    """
    for root in roots:
        # Beside one whose shards are all there, nobody would miss what a folder with a misspelt name has.
        if not root.is_dir():
            raise UserError(f"{root} is no folder: give those that runs with --shard were given as --output-dir")
    groups = {kind: _grouped(roots, kind) for kind in KINDS}
    begun = _begun(roots, groups)
    if not begun and not any(groups.values()):
        folders = ", ".join(map(str, roots))
        raise UserError(
            f"there are no shards in {folders}: give the folders that runs with --shard were given as --output-dir"
        )
    for own in groups.values():
        _check_alike(own)
        _check_whole(own)
    merged = Merged(missing=begun)
    done, total = 0, sum(map(len, groups.values()))
    for kind, own in groups.items():
        # Losses are held against those of dense.
        for group in sorted(own, key=lambda one: one.parts[0].record.row.method != "dense"):
            show(group.title, done, total)
            _merge_group(roots, output, group, KINDS[kind], merged)
            done += 1
    show("merged", done, total)
    return merged


def _grouped(roots: Sequence[Path], kind: type[Row]) -> list[_Group]:
    """The parts of each row; the same shard of a row from two folders is one part, and not two."""
    found: dict[tuple[str, ...], _Group] = {}
    parts = [_Part(root, record) for root in dict.fromkeys(roots) for record in read_records(root, kind)]
    for part in sorted(parts, key=lambda one: (one.record.shard, one.record.row.time)):
        found.setdefault(tuple(part.settings.values()), _Group([])).parts.append(part)
    groups = [found[settings] for settings in sorted(found)]
    names = labels([group.parts[0].record.row for group in groups])
    return [replace(group, label=name) for group, name in zip(groups, names, strict=True)]


def _begun(roots: Sequence[Path], groups: Mapping[type[Row], Sequence[_Group]]) -> dict[Shard, list[str]]:
    """Of each shard that has samples of rows which no shard has finished: these, by the files of the samples."""
    found: dict[Shard, list[str]] = {}
    for kind, own in groups.items():
        records = [part.record for group in own for part in group.parts]
        known = {Path(record.row.device, kind.kind, name) for record in records for name in record.files.values()}
        for shard, file in dict.fromkeys(one for root in roots for one in sample_files(root, kind)):
            if file not in known:
                found.setdefault(shard, []).append(f"the row of {file}")
    return found


def _check_alike(groups: Iterable[_Group]) -> None:
    """Raise UserError where two rows are both in part, and what the one lacks is there of the other.

    Two settings of one method that a shard has both of, or has still to measure, are of one run, whose shards may not have
    come to both yet.
    """
    partial_ones: dict[tuple[Any, ...], list[_Group]] = {}
    for group in groups:
        if not group.whole:
            partial_ones.setdefault(group.slot, []).append(group)
    for same in partial_ones.values():
        for number, one in enumerate(same):
            for other in same[:number]:
                own, there = ({part.record.shard: part.record for part in group.parts} for group in (one, other))
                lacked = sorted(one.missing & set(there))
                row = one.parts[0].record.row
                variants = identity(row) != identity(other.parts[0].record.row)
                awaited = set(own) & set(there) or all(row.parameters in there[shard].settings for shard in lacked)
                if lacked and not (variants and awaited):
                    theirs = next(part for part in other.parts if part.record.shard == lacked[0])
                    raise UserError(_differ(one.title, one.parts[0], theirs))


def _check_whole(groups: Iterable[_Group]) -> None:
    """Raise UserError where shards that have all finished do not have as many samples as their row."""
    for group in groups:
        own = _wanted(group.whole)
        failed = any(part.record.status != OK for part in group.whole)
        for numbers in () if failed else own.values():
            if len(numbers) != (samples := group.parts[0].record.row.samples):
                raise UserError(
                    f"the shards of {group.title} have {len(numbers)} samples of {samples}, so they were split by other "
                    "rules: run all of them again with one version of tmbench"
                )


def _differ(title: str, one: _Part, other: _Part) -> str:
    own, theirs = one.settings, other.settings
    apart = [
        f"{name} ({shortened(own.get(name, '')) or 'none'} and {shortened(theirs.get(name, '')) or 'none'})"
        for name in dict.fromkeys([*own, *theirs])
        if own.get(name) != theirs.get(name)
    ]
    return (
        f"shard {one.record.shard} and shard {other.record.shard} of {title} differ in {', '.join(apart)}, so they are not "
        "of one run: run one of them again as the other was"
    )


def _merge_group(roots: Sequence[Path], output: Path, group: _Group, kind: _Kind, merged: Merged) -> None:
    whole = group.whole
    parts = whole or group.parts
    lead = parts[0].record
    merged.shards |= {part.record.shard for part in parts}
    machines = {name: "+".join(sorted({getattr(part.record.row, name) for part in parts} - {""})) for name in MACHINES}
    lead = replace(lead, row=replace(lead.row, **machines))
    wanted = _wanted(parts)
    files = {name: Kept.at(output, lead.row, path, kind.sample) for name, path in lead.files.items()}
    for name, file in files.items():
        merged.samples += _join(roots, parts, file, wanted[name])
    if not whole:
        for shard in group.missing:
            merged.missing.setdefault(shard, []).append(group.title)
        return
    copy_record(parts[0].root / lead.shard.folder, output, lead.row.device, lead.row.environment)
    items = [Item(title=group.title, index=number, file=name) for name, own in wanted.items() for number in own]
    target: RowTarget[Any, Any] = RowTarget(
        group.title,
        items,
        files,
        root=output,
        rows=[lead.row],
        make=kind.make(lead, [output, *roots]),
        stands=partial(kind.stands, output) if kind.stands else None,
        latest=kind.latest,
        belongs=lambda item, kept: kept.prompt_hash == wanted[item.file][item.index],
    )
    _make(target, lead.row, output, parts, merged)


def _make(target: RowTarget[Any, Any], row: Row, output: Path, parts: Sequence[_Part], merged: Merged) -> None:
    """Make the rows, as a run does whose samples have all been measured, unless they are there."""
    before = newest(output, type(row), row.device, row.method)
    there = [one for one in target.open(overwrite=False) if one.status == OK]
    failed = next((part.record for part in parts if part.record.status != OK), None)
    if failed is not None and not there:
        have: Any = before.get(row.key)
        told = failed.status, failed.error, failed.row.samples
        there = [have] if have is not None and (have.status, have.error, have.samples) == told else []
        target.failure = Failure(failed.status, failed.error)  # type: ignore[arg-type]  # a record's are a row's
        target.backends.update(failed.backends.split("+"))
    if not there and failed is None:
        for part in parts:
            # Its samples were taken away since.
            if any((name, number) not in target.samples for name, own in part.record.own.items() for number in own):
                merged.missing.setdefault(part.record.shard, []).append(target.title)
                return
    rows = there or target.finish()
    known = set(before.values())
    merged.there += sum(one in known for one in rows)
    merged.made += [one for one in rows if one not in known]


def _wanted(parts: Iterable[_Part]) -> dict[str, dict[int, str]]:
    """The hash of the prompt of each sample, by file and number, in a run's order."""
    found: dict[str, dict[int, str]] = {}
    for part in parts:
        for name in part.record.files:
            found.setdefault(name, {}).update(part.record.own.get(name, {}))
    return {name: dict(sorted(own.items())) for name, own in found.items()}


def _join(roots: Sequence[Path], parts: Sequence[_Part], file: Kept[Any], wanted: Mapping[int, str]) -> int:
    """Append to a file what it lacks of these samples; how many that were."""
    there = {number for number, one in file.read().items() if one.prompt_hash == wanted.get(number)}
    found: dict[int, dict[str, dict[str, Any]]] = {}
    places = [*roots, *(part.root / part.record.shard.folder for part in parts)]
    for place in dict.fromkeys(places):
        for number, (sample, entry) in read_entries_of(file.within(place).path, file.kind).items():
            if number in wanted and number not in there and sample.prompt_hash == wanted[number]:
                text = json.dumps(entry, sort_keys=True)
                found.setdefault(number, {})[text] = entry
    # Of two that were both measured it is the same one that counts, in whatever order they come.
    lines = [found[number][min(found[number])] for number in wanted if number in found]
    file.join(lines)
    return len(lines)
