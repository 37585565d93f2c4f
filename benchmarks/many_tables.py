"""The tables of docs/many-gpus.md, and of docs/commands.md on prompts that are read together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

from model_tables import against_dense
from sources import Block, Line, Sources

from tmbench.report.settings import TtftSetting
from tmbench.report.table import Table, columns
from tmbench.report.ttft import TtftCell, TtftSection
from tmbench.report.words import NOTHING, figure_text, significant
from tmbench.report.writers import table_markdown
from tmbench.results.words import length_name

WORKERS = "benchmarks/many-gpus/workers.csv"
RUN = ("model", "device", "method", "length", "samples")
"""What runs have in common that differ in how many workers there are, and by which executor."""
BEGUN = "begun_samples_per_minute"
TEXTS = ("model", "weights", "method", "against dense")


def tensor_parallel(sources: Sources) -> str:
    """Times of models that several GPUs share, and how many times faster than one they are."""
    heads = ("over roofline", "times one GPU's speed")
    return _split(sources, "tensor_parallel_size", heads, lambda cell, one: [_over_roofline(cell), _times(cell, one)])


def context_parallel(sources: Sources) -> str:
    """Times of prompts that several GPUs share, the part that waits for other GPUs, and how much faster that is than one."""
    heads = ("waits for GPUs", "times one GPU's speed")
    return _split(sources, "context_parallel_size", heads, lambda cell, one: [_waits(cell), _times(cell, one)])


def _split(
    sources: Sources, size: str, heads: tuple[str, ...], more: Callable[[TtftCell, TtftCell | None], list[str]]
) -> str:
    """A line for each method and length of models of several GPUs, and of the same on one; ``size`` counts the GPUs.

    Raises ValueError where no rows are of several.
    """
    found = {section.setting: section for section in sources.many_gpus.ttft}
    split = [setting for setting in found if getattr(setting, size) > 1]
    if not split:
        raise ValueError(f"nothing of {sources.many_rows} has a {size} above 1")
    shown = {*split, *({_on_one(setting) for setting in split} & found.keys())}
    rows = []
    for setting in sorted(shown, key=lambda one: (one.model, one.weights, getattr(one, size), one)):
        alone = found.get(_on_one(setting)) if setting in split else None
        for cell in _by_length(found[setting]):
            one = next((other for other in alone.measured(cell.label) if _same(other, cell)), None) if alone else None
            gpus = str(getattr(setting, size))
            rows.append([setting.model, setting.weights, gpus, *_times_of(cell), *more(cell, one)])
    names = ("model", "weights", "GPUs", "tokens", "method", "TTFT, s", "against dense", *heads)
    return table_markdown(Table("", columns(*names, texts=TEXTS), rows))


def batches(sources: Sources) -> str:
    """Times of prompts that are read together, how many tokens that is a second, and the memory that it takes."""
    cells = [(section.setting, cell) for section in sources.batches.ttft for cell in section.measured()]

    def place(one: tuple[TtftSetting, TtftCell]) -> tuple[str, str, int, str, int]:
        setting, cell = one
        label = "" if cell.label == "dense" else cell.label
        return setting.model, setting.weights, cell.row.length, label, setting.batch_size

    rows = []
    for setting, cell in sorted(cells, key=place):
        peak = cell.row.peak_memory_bytes
        figures = [figure_text(cell.row.tokens_per_second, ",.0f"), figure_text(peak and peak / 2**30, ".1f")]
        length, label, *times = _times_of(cell)
        rows.append([setting.model, setting.weights, length, label, str(setting.batch_size), *times, *figures])
    names = ("model", "weights", "tokens", "method", "prompts", "TTFT, s", "against dense", "tokens/s", "peak GiB")
    return table_markdown(Table("", columns(*names, texts=TEXTS), rows))


def workers(sources: Sources) -> str:
    """How many samples a minute several workers measure, and how many times one worker's that is.

    Medians over rounds, and within which bounds the rounds lie against one worker's of the same round: of the same executor
    where there is one, else of one process. Raises ValueError where a run's scores are not those of the others.
    """
    lines = [line for line in sources.lines(WORKERS) if line["status"] == "ok"]
    if any(line["same_scores"] != "yes" for line in lines):
        raise ValueError(f"{WORKERS} has scores that differ by how many workers there were")
    runs: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        runs.setdefault(tuple(line[name] for name in (*RUN, "executor", "workers")), []).append(line)
    rows = []
    for (*about, executor, count), own in runs.items():
        figures = [significant(_median(own, name)) for name in ("seconds", "samples_per_minute", BEGUN)]
        one = runs.get((*about, executor, "1")) or runs.get((*about, "processes", "1"), [])
        model, device, method, length, samples = about
        rows.append(
            [model, device, method, length_name(int(length)), samples, executor, count, *figures, _times_one(own, one)]
        )
    texts = ("model", "device", "method", "executor")
    names = ("model", "device", "method", "tokens", "samples", "executor", "workers", "command, s")
    heads = ("samples a minute", "once begun", "times one worker's")
    return table_markdown(Table("", columns(*names, *heads, texts=texts), rows))


def _times_one(lines: list[Line], one: list[Line]) -> str:
    """The least and the most of all rounds, once where these are the same."""
    by_round = {line["round"]: float(line[BEGUN]) for line in one}
    times = [float(line[BEGUN]) / by_round[line["round"]] for line in lines if line["round"] in by_round]
    bounds = dict.fromkeys(f"{bound(times):.2f}" for bound in (min, max)) if times else [NOTHING]
    return " to ".join(bounds)


def _on_one(setting: TtftSetting) -> TtftSetting:
    """The same on one GPU."""
    return replace(setting, tensor_parallel_size=1, context_parallel_size=1)


def _median(lines: list[Line], name: str) -> float:
    return statistics.median(float(line[name]) for line in lines)


def _by_length(section: TtftSection) -> Iterator[TtftCell]:
    """Those that came out well, shortest first, and dense first at each length."""
    yield from sorted(section.measured(), key=lambda cell: (cell.row.length, section.labels.index(cell.label)))


def _same(cell: TtftCell, other: TtftCell) -> bool:
    return (cell.row.length, cell.row.prompt_hash) == (other.row.length, other.row.prompt_hash)


def _times_of(cell: TtftCell) -> list[str]:
    against = NOTHING if cell.label == "dense" else against_dense(cell)
    return [length_name(cell.row.length), cell.label, significant(cell.seconds), against]


def _over_roofline(cell: TtftCell) -> str:
    return figure_text(cell.row.ttft_over_floor, ".2f")


def _times(cell: TtftCell, one: TtftCell | None) -> str:
    return NOTHING if one is None else f"{one.seconds / cell.seconds:.2f}"


def _waits(cell: TtftCell) -> str:
    waited = cell.row.communication_s
    return NOTHING if waited is None else f"{waited / cell.seconds:.1%}"


MANY: dict[str, Block] = {
    "tensor-parallel": tensor_parallel,
    "context-parallel": context_parallel,
    "workers": workers,
    "batches": batches,
}
