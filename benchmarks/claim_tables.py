"""Tables of docs/claims.md: what the TriangleMix publication claims (He et al. 2025, arXiv 2507.21526), beside rows.

Bounds are the publication's own figures. Where it says that nothing is lost, and names no bound, the bound is the
non-inferiority margin of the report.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

from claim_sources import (
    LAYERS_OF,
    SHAPE,
    WIDER,
    compared,
    deep,
    deep_half,
    faster,
    half,
    layers_of,
    lost,
    probed,
    reports,
    sections,
    task_found,
    timed,
    variants,
)
from claims import Claim, Found, Judged, claims_table, verdicts_table
from sources import ROOT, Block, Sources

from tmbench.methods.layers import layers_text
from tmbench.report.intervals import MARGIN, by_chance
from tmbench.report.ruler import RulerSection
from tmbench.results.rows import Row
from tmbench.results.variants import pattern_settings

THOUSAND = {32: 32768, 48: 49152, 64: 65536, 80: 81920, 96: 98304, 112: 114688, 128: 131072}
"""The lengths of the published table, in thousands of tokens, and those measured here, of 1024 each."""
ATTENTION = {32: 3.7, 128: 15.3}
"""How many times less attention takes in a layer with a triangle, by thousands of tokens."""
MOST_DEEP = 10.0
"""Percent of the middle's gradient that the deep half may hold, read off the published figure of an 8B model."""
MOST_NATS = 0.01
"""By how much a loss may rise and still count as the same: perplexity rises by a hundredth."""
AGGREGATING = ("cwe", "fwe")
NO_WEIGHTS = "no trained weights of 8B parameters were run"
NO_SUITE = "`tmbench lm-eval` asks them, but no model of that size was run"
NO_ROWS = "no rows"


def attention(sources: Sources) -> list[Judged]:
    """What attention takes in one layer."""
    lines = sources.lines("benchmarks/attention.csv")
    return [
        Judged(
            Claim(f"attention of a deep layer is {times} times faster or more at {thousands}K", low=times),
            [faster(lines, name, THOUSAND[thousands]) for name in ("cuda-hopper", "triton")],
        )
        for thousands, times in ATTENTION.items()
    ]


def published_times(sources: Sources) -> dict[str, dict[int, float]]:
    """The published seconds by method and thousands of tokens."""
    lines = sources.lines("benchmarks/published/ttft.csv")
    return {line["method"]: {length: float(line[str(length)]) for length in THOUSAND} for line in lines}


def times(sources: Sources) -> list[Judged]:
    """Time to first token, by method and length."""
    published = published_times(sources)
    measured = [sources.structured, sources.random]
    found = []
    for method, reference, saves in (
        ("tri_mix", "dense", True),
        ("minference", "dense", False),
        ("tri_mix_minference", "minference", True),
    ):
        for thousands, length in THOUSAND.items():
            change = 100 * (published[method][thousands] / published[reference][thousands] - 1)
            place = f"at {thousands}K {method} takes {abs(change):.0f} % {'less' if change < 0 else 'more'} than {reference}"
            if saves:
                claim = Claim(f"{place}, or better", high=round(change))
            elif change > 0:
                claim = Claim(f"{place}: what it estimates costs more than it saves", low=0)
            else:
                claim = Claim(f"{place}, or better", high=round(change))
            cells = [timed(section, method, length, reference) for section in measured]
            found.append(Judged(claim, [one for one in cells if one is not None], NO_ROWS))
    return found


def _about(section: RulerSection, row: Row) -> str:
    layers = layers_text(layers_of(row), LAYERS_OF[row.model])
    return f"layers {layers}{' by a probe' if probed(row) else ''}"


def _all(sources: Sources, make: Callable[[RulerSection], Iterable[Found | None]]) -> list[Found]:
    return [found for section in sections(sources) for found in make(section) if found is not None]


def published_losses(sources: Sources) -> dict[str, float]:
    """The published points against dense by task, RULER at 128K, and of all tasks together."""
    lines = sources.lines("benchmarks/published/ruler.csv")
    found = {line["task"]: float(line["tri_mix"]) - float(line["dense"]) for line in lines}
    return found | {"average": statistics.fmean(found.values())}


def accuracy(sources: Sources) -> list[Judged]:
    """What is kept of RULER."""

    def against_dense(method: str, wanted: Callable[[Row], bool]) -> list[Found]:
        return _all(
            sources,
            lambda section: (
                compared(section, label, "dense", *([_about(section, row)] if "layers" in row.settings else []))
                for label, row in variants(section, method)
                if wanted(row)
            ),
        )

    def combined(section: RulerSection) -> Iterable[Found | None]:
        for label, row in variants(section, "tri_mix_minference"):
            for other, alone in variants(section, "minference"):
                if pattern_settings(alone).items() <= pattern_settings(row).items():
                    yield compared(section, label, other, _about(section, row), f"patterns {row.settings['patterns']}")

    published = published_losses(sources)
    found = [
        Judged(
            Claim(f"RULER at 128K, Llama-3.1-8B: {published['average']:+.2f} points, and so nothing is lost", low=-MARGIN),
            [],
            NO_WEIGHTS,
        ),
        Judged(
            Claim("from half the depth on, RULER loses less than a point", low=-MARGIN),
            against_dense("tri_mix", half),
            NO_ROWS,
        ),
        Judged(
            Claim("in layers that a probe chose, RULER loses less than a point", low=-MARGIN),
            against_dense("tri_mix", probed),
            NO_ROWS,
        ),
        Judged(
            Claim("MInference with triangle attention loses less than a point against MInference", low=-MARGIN),
            _all(sources, combined),
            NO_ROWS,
        ),
        Judged(
            Claim("a static pattern in every layer, streaming, loses", high=0),
            against_dense("streaming", lambda row: True),
            NO_ROWS,
        ),
    ]

    def aggregating(task: str) -> Judged:
        claim = Claim(f"{task} loses, which the published average hides ({published[task]:+.1f} points at 128K)", high=0)

        def make(section: RulerSection) -> Iterable[Found | None]:
            for label, row in variants(section, "tri_mix"):
                if half(row):
                    yield task_found(section, label, task, _about(section, row))

        return Judged(claim, _all(sources, make), NO_ROWS)

    return [
        *found,
        *map(aggregating, AGGREGATING),
        Judged(Claim("LongBench and other long-context suites: nothing is lost", low=-MARGIN), [], NO_SUITE),
    ]


def reasons(sources: Sources) -> list[Judged]:
    """Why it should work: gradients by layer, and losses in and after the prompt."""
    folders = [*reports(sources), (ROOT / "benchmarks" / "probes", sources.probes)]
    probes = [
        deep_half(root, probe) for root, report in folders for probe in report.probes if probe.setting.model in LAYERS_OF
    ]
    parts: dict[str, list[Found]] = {"prompt": [], "answer": []}
    for _, report in reports(sources):
        for section in report.losses:
            for cell in section.measured():
                if cell.row.method == "tri_mix" and cell.row.layers_source != "random" and deep(cell.row):
                    for part, own in parts.items():
                        own += [one] if (one := lost(section, cell, part)) else []
    return [
        Judged(
            Claim("the middle section fades with depth: the deep half holds less than half of its gradient", high=50.0),
            probes,
        ),
        Judged(
            Claim(f"and so little that it can be left out: less than {MOST_DEEP:.0f} %, as published", high=MOST_DEEP),
            probes,
        ),
        Judged(
            Claim("the middle of deep layers serves tokens inside the prompt: their loss rises without it", low=0),
            parts["prompt"],
        ),
        Judged(
            Claim(f"and not those after it: their loss rises by less than {MOST_NATS} nats", high=MOST_NATS), parts["answer"]
        ),
    ]


def choices(sources: Sources) -> list[Judged]:
    """Which layers, and which shape."""

    def drawn(wanted: Callable[[Row], bool]) -> list[Found]:
        def make(section: RulerSection) -> Iterable[Found | None]:
            known = list(variants(section, "tri_mix"))
            for label, row in known:
                for other, random in known:
                    if wanted(row) and random.layers_source == "random" and len(layers_of(row)) == len(layers_of(random)):
                        against = layers_text(layers_of(random), LAYERS_OF[row.model])
                        yield compared(section, label, other, f"{_about(section, row)} against {against}")

        return _all(sources, make)

    def shaped(other_shape: Mapping[str, int]) -> list[Found]:
        def make(section: RulerSection) -> Iterable[Found | None]:
            for label, row in variants(section, "tri_mix"):
                for other, without in variants(section, "tri_mix", other_shape):
                    if layers_of(row) == layers_of(without):
                        yield compared(section, label, other, _about(section, row), few=1)

        return _all(sources, make)

    return [
        Judged(Claim("the deep half keeps more than as many layers drawn at random", low=0), drawn(half), NO_ROWS),
        Judged(Claim("a probe's layers keep more than as many drawn at random", low=0), drawn(probed), NO_ROWS),
        Judged(
            Claim("the last 128 queries matter: without them more is lost", low=0), shaped(SHAPE | {"last_n": 0}), NO_ROWS
        ),
        Judged(Claim("it is the shape: as many pairs without last queries keep less", low=0), shaped(WIDER), NO_ROWS),
    ]


GROUPS: Mapping[str, tuple[str, Callable[[Sources], Sequence[Judged]]]] = {
    "attention": ("attention", attention),
    "times": ("time to first token", times),
    "accuracy": ("accuracy", accuracy),
    "reasons": ("why it works", reasons),
    "choices": ("layers and shape", choices),
}


@cache
def judged(sources: Sources, name: str) -> Sequence[Judged]:
    """A group of claims with all that was found of them."""
    return GROUPS[name][1](sources)


def group(sources: Sources, name: str) -> str:
    """All figures of a group of claims."""
    return claims_table(judged(sources, name))


def verdicts(sources: Sources) -> str:
    """All claims with their verdicts."""
    return verdicts_table([(title, judged(sources, name)) for name, (title, _) in GROUPS.items()])


def chance(sources: Sources) -> str:
    """How many of all verdicts may be wrong by chance alone, on either side."""
    count = sum(len(one.found) for name in GROUPS for one in judged(sources, name))
    return f"{2 * by_chance(count):.1f} of {count}"


CLAIMS: dict[str, Block] = {"claims": group, "claims-verdicts": verdicts, "claims-chance": chance}
