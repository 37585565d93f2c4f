"""Lists of layers: as texts, as a probe proposes them, and as the files of probes and of ``tmbench tune`` hold them.

A proposal gives the deep pattern to layers whose middle section matters little. Without the middle sections of the layers T
the share ``sum of m_l over T / sum of m_l over all layers`` is lost, where ``m_l`` is layer l's mean gradient of the middle
section: all layers have the same number of pairs there. See ``tmbench.measure.probe`` for the gradient.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from tmbench.errors import UserError, shortened
from tmbench.methods.plan import DeepLayers, ModelShape
from tmbench.results.rows import OK, ProbeRow
from tmbench.results.tables import csv_paths, kind_of, read
from tmbench.results.tune_rows import TuneRow
from tmbench.results.words import counted

RESULTS = Path("results")
"""Where result files are, unless something else is said."""
AUTO = "auto"
RANDOM = "random:"
LIST = frozenset("0123456789,- ")
"""What lists of layers are written with: such a text is never looked for as a file."""
MOST_DIGITS = 18
"""Python itself refuses to read thousands of digits, with an error of its own."""
Rule = Literal["rank", "depth"]
"""Which layers a proposal may take: those that matter least, wherever they are, or all from some depth on."""
ACCURACY_BUDGET = 0.1
"""The cut published for a 32-layer model, 16, loses 0.08 of the gradients shown with it; a cut at 15 would lose 0.106."""


@dataclass(frozen=True)
class Budget:
    """How much a proposal may cost: a share of the middle sections' gradient, or else of dense attention's pairs.

    Raises UserError unless exactly one of them is given, and it is a share.
    """

    accuracy: float | None = None
    """The largest share of the middle sections' gradient, summed over all layers, that may be lost."""
    time: float | None = None
    """The largest share of dense attention's pairs that may be computed, over all layers."""

    def __post_init__(self) -> None:
        if (self.accuracy is None) == (self.time is None):
            raise UserError("--accuracy-budget and --time-budget exclude each other: give one of them")
        for name in ("accuracy", "time"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise UserError(f"--{name}-budget is a share, from 0 to 1, not {share:g}")

    def __str__(self) -> str:
        return f"time budget {self.time:g}" if self.accuracy is None else f"accuracy budget {self.accuracy:g}"


@dataclass(frozen=True)
class Proposal:
    """Which layers are to have triangle attention, and what that costs."""

    layers: tuple[int, ...]
    lost: float
    """The share of the middle sections' gradient that these layers hold."""
    pairs: float
    """The share of dense attention's pairs that is still computed."""


def propose(middle: Sequence[float], kept: float, budget: Budget, rule: Rule) -> Proposal:
    """The triangle layers under a budget: as many as an accuracy budget allows, as few as a time budget demands.

    Args:
        middle: each layer's mean gradient of the middle section, none of them negative.
        kept: the share of a layer's causal pairs that triangle attention computes.
        budget: what may be lost or spent.
        rule: whether the layers are taken by rank or from a depth on.

    Raises:
        UserError: triangle attention in all layers still takes more than the time budget.
        ValueError: the gradients are not finite, or negative.
    """
    count = len(middle)
    if not all(math.isfinite(value) and value >= 0 for value in middle):
        raise ValueError("a proposal needs gradients that are finite and not negative")
    # Of two layers that matter alike the deeper one comes first.
    order = sorted(range(count), key=(lambda layer: (middle[layer], -layer)) if rule == "rank" else (lambda layer: -layer))
    if budget.time is not None:
        if budget.time < kept:
            raise UserError(
                f"--time-budget {budget.time:g} is less than the {kept:.3g} that triangle attention in "
                f"all {counted(count, 'layer')} takes: give at least that, or shorten --n-local"
            )
        # A hair less than is asked for counts as it: shares such as 0.55 have no exact binary form.
        taken = 0 if budget.time >= 1 else math.ceil(count * (1 - budget.time) / (1 - kept) - 1e-9)
    else:
        assert budget.accuracy is not None
        limit, taken = budget.accuracy * (1 + 1e-12), 0
        # Shares are compared, since a part of the smallest numbers would round to the whole.
        while taken < count and _part(middle, order[: taken + 1]) <= limit:
            taken += 1
    layers = tuple(sorted(order[:taken]))
    return Proposal(layers, _part(middle, layers), (count - taken + taken * kept) / count)


def _part(middle: Sequence[float], layers: Iterable[int]) -> float:
    """The share of all gradients that some layers hold; 0 where none holds any, as the last of all layers does."""
    return math.fsum(middle[layer] for layer in layers) / (math.fsum(middle) or 1.0)


def layers_text(layers: Iterable[int], count: int) -> str:
    """Layers of a model with ``count`` as ``--layers`` takes them: "5,7,10-15", and "16-" for all from 16 on.

    No layer is "32-" in a model with 32, since it takes what is from its end on.
    """
    named = sorted(set(layers))
    start = count - len(named)
    if named == list(range(start, count)):
        return f"{start}-"
    runs: list[list[int]] = []
    for layer in named:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def whole_number(text: str) -> int | None:
    """A number that a text of digits stands for; None for any other text, and for more digits than any number here has."""
    return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else None


def parse_layers(text: str, count: int, native: Mapping[int, str] = MappingProxyType({})) -> tuple[int, ...]:
    """The layers that a list names, of a model with ``count``; raises UserError for what is no such list.

    ``native`` are layers that stay the model's own, with their kind in words. What goes on to the model's end leaves them
    out. All others are named one by one, or by a first and a last, and must be none of them.
    """
    full = [layer for layer in range(count) if layer not in native]
    if text.strip() == "none":
        return ()
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UserError(
                f"--layers {shortened(text)} is neither a list of layers, such as 16- or 5,7,10-15, nor {AUTO} nor a file "
                "of probe results"
            )
        low, high = whole_number(first), whole_number(last or first)
        inside = low is not None and high is not None and low <= high < count
        # From the model's end on there is no layer.
        if not inside and not (dash and not last and low == count):
            wrong = f"--layers {shortened(text)}: {shortened(part.strip())}"
            raise UserError(f"{wrong} is not within the layers 0 to {count - 1} of this model")
        assert low is not None
        assert high is not None
        if dash and not last:
            found.update(layer for layer in full if layer >= low)
            continue
        named = range(low, high + 1)
        if kinds := dict.fromkeys(native[layer] for layer in named if layer in native):
            raise UserError(
                f"--layers {shortened(text)} names layers that stay the model's own ({', '.join(kinds)}): name layers of "
                f"full attention, {layers_text(full, count)}"
            )
        found.update(named)
    return tuple(sorted(found))


def random_layers(text: str, full: Sequence[int]) -> tuple[int, ...]:
    """The layers of "random:4" or, with a seed other than 0, "random:4:7", of ``full``; raises UserError for neither."""
    given, _, seed = text.removeprefix(RANDOM).partition(":")
    drawn = whole_number(seed or "0")
    if not given.isdecimal() or drawn is None:
        raise UserError(
            f"--layers {shortened(text)} must say how many layers, and may name a seed of at most {MOST_DIGITS} digits: "
            f"{RANDOM}4 or {RANDOM}4:7"
        )
    number = whole_number(given)
    if number is None or number > len(full):
        raise UserError(
            f"--layers {shortened(text)} asks for {shortened(given)} of {counted(len(full), 'layer')}: ask for fewer"
        )
    return tuple(sorted(random.Random(drawn).sample(full, number)))


def chosen_layers(
    shape: ModelShape, layers: str | None = None, starting_layer: int | str | None = None, root: Path = RESULTS
) -> DeepLayers | None:
    """The deep layers that were asked for, of a model of this shape; None where none were.

    Args:
        shape: the model's.
        layers: what ``--layers`` takes: see ``resolve``.
        starting_layer: what ``--starting-layer`` takes: 16 is "16-", all layers from that one on.
        root: the folder of result files, in which "auto" looks.

    Raises:
        UserError: both were given, one that is no text, as Python lets it be, or one that does not fit the model.
    """
    if layers is not None and starting_layer is not None:
        raise UserError(
            f"--starting-layer {shortened(str(starting_layer))} and --layers {shortened(str(layers))} both say where "
            "triangle attention is: give one of them"
        )
    if layers is not None and not isinstance(layers, str):
        raise UserError(f'--layers must be a text, such as "16-" or "5,7,10-15", not {shortened(repr(layers))}')
    if layers is not None:
        return resolve(layers.strip(), shape, root)
    if starting_layer is None:
        return None
    text = str(starting_layer).strip()
    if not text.removeprefix("-").isdecimal():
        raise UserError(f"--starting-layer {shortened(text)} is not the number of a layer: --layers takes other choices")
    start = whole_number(text)
    if start is None or start > shape.layers:
        raise UserError(
            f"--starting-layer must be between 0 and {shape.layers}, the number of layers of {shape.name}, "
            f"not {shortened(text)}"
        )
    return DeepLayers(tuple(layer for layer in shape.full if layer >= start), "given")


def resolve(text: str, shape: ModelShape, root: Path) -> DeepLayers:
    """The layers that a ``--layers`` stands for.

    Args:
        text: "16-" for all from 16 on, "16" for that one, a list such as "5,7,10-15", "none", "random:4" for so many layers
            drawn at random, against which a choice can be compared, a file of ``tmbench probe`` or ``tmbench tune``, or
            "auto" for the newest probe of the model under ``root``.
        shape: the model's. Rows of other contents do not count, nor does for "auto" a probe that does not say.
        root: the folder of result files.

    Raises:
        UserError: the text is neither, or there is no proposal for this model.
    """
    if text.startswith(RANDOM):
        return DeepLayers(random_layers(text, shape.full), "random")
    if text != AUTO and not text.endswith(".csv") and (LIST.issuperset(text) or not _is_file(text)):
        return DeepLayers(parse_layers(text, shape.layers, shape.native), "given")
    if text != AUTO and kind_of(Path(text), ProbeRow, TuneRow) is TuneRow:
        return _tuned(text, shape)
    rows = probe_rows(text, shape, root)
    layers = {row.layer: row.triangle for row in rows}
    found = tuple(layer for layer in shape.full if layers[layer])
    newest = rows[0]
    return DeepLayers(found, f"probe of {newest.task} at {newest.length}, {newest.proposal}", newest.length)


def probe_rows(text: str, shape: ModelShape, root: Path, *, option: str = "--layers") -> list[ProbeRow]:
    """A row for each layer of full attention, of the newest probe in a file, or with "auto" under ``root``.

    Raises UserError where there is none of this model.
    """
    model, model_hash = shape.name, shape.model_hash
    if text == AUTO:
        named = [row for path in csv_paths(root, ProbeRow) for row in _proposed(path, model)]
        rows = [row for row in named if model_hash in ("", row.model_hash)]
        where = f"finds {{}} under {root}"
    else:
        named = _proposed(Path(text), model)
        rows = [row for row in named if model_hash == "" or row.model_hash in ("", model_hash)]
        where = "holds {}"
    if not rows:
        which = f"no probe of {model}" if not named else f"no probe of the files that {model} has now"
        raise UserError(f"{option} {text} {where.format(which)}: run tmbench probe --model {model} first")
    # All rows of a proposal are written at once. Of two in one second the later one counts.
    newest = max(reversed(rows), key=lambda row: row.time)
    chosen = [row for row in rows if (row.time, row.probed) == (newest.time, newest.probed)]
    layers = [row.layer for row in chosen if row.layer is not None]
    if sorted(set(layers)) != list(shape.full):
        raise UserError(
            f"{option} {text}: its newest probe of {model} is of {counted(len(set(layers)), 'layer')}, but the model has "
            f"{len(shape.full)}: run tmbench probe --model {model} again"
        )
    return list({row.layer: row for row in chosen}.values())


def middle_of(rows: Iterable[ProbeRow]) -> dict[int, float]:
    """Each layer's mean gradient of the middle section, by the attention logits."""
    return {row.layer: row.middle_logits for row in rows if row.layer is not None and row.middle_logits is not None}


def _tuned(text: str, shape: ModelShape) -> DeepLayers:
    """The layers that the newest run of ``tmbench tune`` in a file chose; raises UserError where there is none."""
    model, model_hash = shape.name, shape.model_hash
    named = [row for row in read(Path(text), TuneRow) if row.chosen and row.status == OK and row.model == model]
    rows = [row for row in named if model_hash == "" or row.model_hash in ("", model_hash)]
    if not rows:
        which = f"no choice for {model}" if not named else f"no choice for the files that {model} has now"
        raise UserError(f"--layers {text} holds {which}: run tmbench tune --model {model} first")
    newest = max(reversed(rows), key=lambda row: row.time)
    layers = parse_layers(str(newest.settings["layers"]), shape.layers, shape.native)
    about = f"{newest.method} on {newest.task} at {newest.lengths}, margin {newest.margin:g} nats"
    return DeepLayers(layers, f"tune of {about}, {100 * newest.confidence:g} % confidence", newest.length)


def _is_file(text: str) -> bool:
    """Whether there is such a file; what is too long for a path, or out of reach, is none."""
    try:
        return Path(text).is_file()
    except OSError:
        return False


def _proposed(path: Path, model: str) -> list[ProbeRow]:
    """The rows of a file that say whether a layer of this model is to have triangle attention, oldest first."""
    rows = [row for row in read(path, ProbeRow) if isinstance(row, ProbeRow)]
    return [row for row in rows if row.status == OK and row.model == model and row.triangle is not None]
