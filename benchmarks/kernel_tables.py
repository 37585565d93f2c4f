"""Tables and figures of docs/dynamic-kernels.md, docs/triangle-kernel.md and docs/structured-weights.md."""

from __future__ import annotations

import statistics
from itertools import pairwise

from kernel_pages import coverage_in_words, milliseconds
from sources import ROOT, Block, Line, Sources, line_of, tokens

from tmbench.report.table import Table, columns
from tmbench.report.words import NOTHING
from tmbench.report.writers import table_markdown
from tmbench.results.words import length_name

LENGTHS = ("32K", "64K", "128K")
DYNAMIC = "benchmarks/dynamic_attention.csv"
ATTENTION = "benchmarks/attention.csv"
STRUCTURED = "benchmarks/structured_density.csv"
WIDE = "benchmarks/wide_attention.csv"
CHUNKS = "benchmarks/chunks.csv"
FEW_QUERIES = "benchmarks/few_queries.csv"
CORRECTIONS = "benchmarks/delta.csv"
SKIPS = "benchmarks/skip_softmax.csv"
BUDGETS = {
    "vertical_slash 512 2048": "MInference (512, 2048)",
    "vertical_slash 1000 6096": "MInference (1000, 6096)",
    "flex_prefill 0.95": "FlexPrefill 0.95",
    "flash_prefill 0.1": "FlashPrefill 0.1",
}
SKIPPING = {"cuda-hopper": "`cuda-hopper`", "cuda-hopper, common barrier": "common barrier", "triton": "`triton`"}
SELECTIONS = {"vertical_slash": "MInference", "flex_prefill": "FlexPrefill", "flash_prefill": "FlashPrefill"}
SELECTIONS |= {"xattention": "XAttention, stride 16", "xattention by sorting": "the same by sorting", "pbs": "PBS-Attn"}


def random_blocks(sources: Sources) -> str:
    """TFLOP/s of block kernels over blocks drawn at random, by the share of the causal blocks."""
    lines = [line for line in sources.lines(DYNAMIC) if line["pattern"] == "random_blocks"]
    backends, lengths = ("flash-attn-4", "cuda-hopper", "triton"), ("64K", "128K")
    heads = [f"`{backend}`, {length}" for backend in backends for length in lengths]
    rows = []
    for share in dict.fromkeys(line["parameters"] for line in lines):
        name = f"heads of {share}" if "," in share else share
        places = [{"backend": backend, "length": tokens(length)} for backend in backends for length in lengths]
        rows.append([name, *(line_of(lines, parameters=share, **place)["tflops"] for place in places)])
    return table_markdown(Table("", columns("of the causal blocks", *heads, texts=("of the causal blocks",)), rows))


def vertical_slashes(sources: Sources) -> str:
    """Milliseconds of the vertical-slash kernels beside dense attention, selection included."""
    lines = sources.lines(DYNAMIC)
    wanted = {
        "dense, flash-attn 4": ("dense", "flash-attn-4"),
        "vertical slashes, `cuda-hopper`": ("vertical_slash", "cuda-hopper"),
        "vertical slashes, `triton`": ("vertical_slash", "triton"),
    }
    rows = []
    for name, (pattern, backend) in wanted.items():
        found = [line_of(lines, pattern=pattern, backend=backend, length=tokens(length)) for length in LENGTHS]
        rows.append([name, *(milliseconds(line["ms_median"]) for line in found)])
    return table_markdown(Table("", columns("ms, selection included", *LENGTHS, texts=("ms, selection included",)), rows))


def selections(sources: Sources) -> str:
    """The part of the fastest implementation's time that each selection takes."""
    rows = []
    for pattern, name in SELECTIONS.items():
        shares = []
        for length in LENGTHS:
            lines = [one for one in sources.lines(DYNAMIC) if (one["pattern"], one["length"]) == (pattern, tokens(length))]
            shares.append(float(lines[0]["select_ms"]) / min(float(line["ms_median"]) for line in lines))
        rows.append([name, *(f"{share:.0%}" for share in shares)])
    return table_markdown(
        Table("", columns("share of the layer's time", *LENGTHS, texts=("share of the layer's time",)), rows)
    )


def structured(sources: Sources) -> str:
    """The density of dynamic patterns on structured weights, the mean over the layers."""
    lines = sources.lines(STRUCTURED)
    places = sorted({(line["model"], int(line["length"])) for line in lines})
    rows = []
    for model, length in places:
        means = []
        for pattern in BUDGETS:
            about = (model, str(length), pattern)
            found = [float(line["density"]) for line in lines if (line["model"], line["length"], line["pattern"]) == about]
            means.append(f"{statistics.fmean(found):.2f}")
        rows.append([model, length_name(length), *means])
    names = ("preset", "tokens", *BUDGETS.values())
    return table_markdown(Table("", columns(*names, texts=("preset",)), rows))


def kernel(sources: Sources, figure: str, length: str, pattern: str, *implementation: str) -> str:
    """One figure of benchmarks/attention.csv: ms, us, TFLOP, TFLOP/s, or how many times faster than dense attention."""
    about = {"pattern": pattern, "implementation": " ".join(implementation), "length": tokens(length)}
    return _figure(line_of(sources.lines(ATTENTION), **about), figure)


def dynamic(sources: Sources, figure: str, length: str, pattern: str, backend: str) -> str:
    """One figure of benchmarks/dynamic_attention.csv, likewise."""
    return _figure(line_of(sources.lines(DYNAMIC), pattern=pattern, backend=backend, length=tokens(length)), figure)


def _figure(line: Line, figure: str) -> str:
    if figure == "ms":
        return milliseconds(line["ms_median"])
    if figure == "us":
        return f"{1000 * float(line['ms_median']):.0f}"
    if figure == "tflop":
        return f"{4 * int(line['head_dim']) * int(line['pairs']) / 1e12:#.3g}".removesuffix(".")
    return f"{float(line[{'times': 'times_dense', 'tflops': 'tflops'}[figure]]):.0f}"


def more_than_window(sources: Sources, length: str) -> str:
    """How much longer the whole pattern takes than flash-attn 4 takes for its window alone."""
    lines = [one for one in sources.lines(ATTENTION) if (one["pattern"], one["length"]) == ("triangle", tokens(length))]
    whole, window = (
        float(line_of(lines, implementation=name)["ms_median"]) for name in ("cuda-hopper", "flash-attn-4 window only")
    )
    if whole <= window:
        raise ValueError(f"the whole pattern takes no longer than its window at {length}")
    return f"{whole / window - 1:.0%}".replace("%", " %")


def wide_heads(sources: Sources) -> str:
    """Milliseconds of the triangle beside the fastest dense attention, by head size and length."""
    lines = [line for line in sources.lines(WIDE) if line["times_dense"]]
    places = dict.fromkeys((line["head_dim"], line["v_head_dim"], line["heads"], line["length"]) for line in lines)
    rows = []
    for dim, v_dim, heads, length in places:
        about = {"head_dim": dim, "v_head_dim": v_dim, "length": length}
        found = [line for line in lines if all(line[name] == value for name, value in about.items())]
        dense, triangle = (
            min((one for one in found if one["pattern"] == pattern), key=lambda one: float(one["ms_median"]))
            for pattern in ("dense", "triangle")
        )
        size = dim if dim == v_dim else f"{dim}, values {v_dim}"
        times = [
            cell for one in (dense, triangle) for cell in (f"`{one['implementation']}`", milliseconds(one["ms_median"]))
        ]
        rows.append([size, heads, length_name(int(length)), *times, f"{float(triangle['times_dense']):.0f}"])
    texts = ("head size", "dense by", "triangle by")
    return table_markdown(
        Table(
            "",
            columns("head size", "heads", "tokens", "dense by", "ms", "triangle by", "ms", "times faster", texts=texts),
            rows,
        )
    )


def in_chunks(sources: Sources) -> str:
    """Milliseconds of a prompt in one piece and in chunks by each backend, and how the times of a pair compare.

    Rows that tell them also have the part of the selection, and the time of chunks that wait for their launches.
    """
    rows, whole = [], {}
    lines = sources.lines(CHUNKS)
    apart = "select_ms" in lines[0]
    for line in lines:
        about = (line["pattern"], line["backend"])
        if line["chunk"] == line["length"]:
            whole[about] = line
            continue
        one, size = whole[about], f"{length_name(int(line['chunk']))} of {length_name(int(line['length']))}"
        size += f", length {line['prompt_length']}" if line["prompt_length"] else ""
        times = [_known(each["ms_median"]) for each in (one, line)]
        if apart:
            times[1:] = [times[1], _known(line["wall_ms"]), *(_known(each["select_ms"]) for each in (one, line))]
        cost = f"{float(line['times_one_piece']):.2f}" if line["times_one_piece"] else NOTHING
        more = [f"{int(line['pairs']) / int(one['pairs']):.2f}", cost]
        rows.append([line["pattern"], f"`{line['backend']}`", size, *times, *more])
    texts = ("pattern", "backend", "chunks")
    names = [*texts, "one piece, ms", "in chunks, ms"]
    names += ["with launches, ms", "selection in one piece, ms", "selection in chunks, ms"] if apart else []
    return table_markdown(Table("", columns(*names, "times the pairs", "times the cost of a pair", texts=texts), rows))


def few_queries(sources: Sources) -> str:
    """Milliseconds of dense attention of few queries behind many keys, by each backend that serves so many."""
    lines = sources.lines(FEW_QUERIES)
    backends = list(dict.fromkeys(line["backend"] for line in lines))
    times = {(line["length"], line["queries"], line["backend"]): milliseconds(line["ms_median"]) for line in lines}
    rows = [
        [queries, length_name(int(length)), *(times.get((length, queries, backend), NOTHING) for backend in backends)]
        for length, queries in dict.fromkeys((line["length"], line["queries"]) for line in lines)
    ]
    return table_markdown(Table("", columns("queries", "keys", *(f"`{backend}`" for backend in backends)), rows))


def _known(ms: str) -> str:
    return milliseconds(ms) if ms else NOTHING


def corrections(sources: Sources) -> str:
    """Milliseconds of the triangle, of its delta correction as it runs and as it ran, and of what that consists of."""
    lines = sources.lines(CORRECTIONS)
    wanted: dict[str, dict[str, str]] = {
        "triangle, ms": {"what": "triangle"},
        "corrected, ms": {"what": "carry", "carried_by": "triton"},
        "rows, `cuda-hopper`": {"what": "rows", "backend": "cuda-hopper"},
        "carried, Triton": {"what": "differences", "carried_by": "triton"},
        "before, ms": {"what": "carry", "carried_by": "torch"},
        "rows, `triton`": {"what": "rows", "backend": "triton"},
        "carried, torch": {"what": "differences", "carried_by": "torch"},
    }
    rows = []
    for length in dict.fromkeys(line["length"] for line in lines):
        found = {name: line_of(lines, length=length, **about) for name, about in wanted.items()}
        times = [milliseconds(line["ms_median"]) for line in found.values()]
        rows.append([length_name(int(length)), *times, f"{float(found['corrected, ms']['times_triangle']):.1f}"])
    return table_markdown(Table("", columns("tokens", *wanted, "times the triangle"), rows))


def corrected(sources: Sources, figure: str, length: str) -> str:
    """One figure of the correction that runs: "times" the triangle, what it "added" of dense's pairs, and the "least" times.

    The least is what it would be times the triangle if dense rows ran at dense attention's rate, and nothing else took time.
    """
    lines = [line for line in sources.lines(CORRECTIONS) if line["length"] == tokens(length)]
    whole = line_of(lines, what="carry", carried_by="triton")
    if figure == "added":
        return f"{100 * float(whole['added']):.1f} %"
    if figure == "times":
        return f"{float(whole['times_triangle']):.1f}"
    dense, triangle = (line_of(lines, what=what) for what in ("dense", "triangle"))
    rows = line_of(lines, what="rows", backend=whole["backend"])
    ideal = float(dense["ms_median"]) * int(rows["pairs"]) / int(dense["pairs"])
    return f"{1 + ideal / float(triangle['ms_median']):.1f}"


def skipped_tiles(sources: Sources) -> str:
    """Milliseconds of dense attention and of skip-softmax by the share of skipped tiles, and the kernels' times faster."""
    lines = sources.lines(SKIPS)
    rows = []
    for length, skipped in dict.fromkeys((line["length"], line["skipped"]) for line in lines):
        found = [line for line in lines if (line["length"], line["skipped"]) == (length, skipped)]
        ms = map(str, _dense_and(found, "cuda-hopper"))
        times = (_skipping_times(found, backend) for backend in SKIPPING)
        rows.append([length_name(int(length)), f"{float(skipped):.1%}", *map(milliseconds, ms), *times])
    names = ("tokens", "tiles skipped", "dense, ms", "`cuda-hopper`, ms", *SKIPPING.values())
    return table_markdown(Table("", columns(*names), rows))


def skipping_times(sources: Sources, length: str, skipped: str, *backend: str) -> str:
    """How many times faster than dense attention a backend of skip-softmax is, at a share of skipped tiles in percent."""
    found = [line for line in _with_skipped(sources, skipped) if line["length"] == tokens(length)]
    return _skipping_times(found, " ".join(backend))


def skipping_difference(sources: Sources, skipped: str, backend: str) -> str:
    """How far a backend's outputs are from those of skip-softmax in Triton, the greatest of all lengths."""
    found = [float(line["difference"]) for line in _with_skipped(sources, skipped) if line["backend"] == backend]
    return f"{100 * max(found):.2f} %"


def even_share(sources: Sources, length: str) -> str:
    """Where a straight line between two measured shares of skipped tiles crosses dense attention's time, on Hopper."""
    lines = [line for line in sources.lines(SKIPS) if line["length"] == tokens(length)]
    slower = []
    for share in sorted({line["skipped"] for line in lines}, key=float):
        dense, own = _dense_and([line for line in lines if line["skipped"] == share], "cuda-hopper")
        slower.append((float(share), own - dense))
    crossings = [(a, b) for a, b in pairwise(slower) if (a[1] > 0) != (b[1] > 0)]
    if len(crossings) != 1 or slower[0][1] <= 0:
        raise ValueError(f"at {length} there is no one share from which on skip-softmax is faster than dense attention")
    ((low, above), (high, below)) = crossings[0]
    return f"{100 * (low + (high - low) * above / (above - below)):.0f} %"


def _with_skipped(sources: Sources, skipped: str) -> list[Line]:
    return [line for line in sources.lines(SKIPS) if f"{float(line['skipped']):.1%}" == skipped]


def _skipping_times(lines: list[Line], backend: str) -> str:
    dense, own = _dense_and(lines, backend)
    return f"{dense / own:.2f}"


def _dense_and(lines: list[Line], backend: str) -> tuple[float, float]:
    """Milliseconds of dense attention and of a backend of skip-softmax, of lines of one length and share."""
    dense, own = line_of(lines, pattern="dense"), line_of(lines, backend=backend)
    return float(dense["ms_median"]), float(own["ms_median"])


def of_dense(sources: Sources, what: str, *shares: str) -> str:
    """flash-attn 4 over blocks at random, its throughput in percent of its own dense attention's.

    The least of all lengths and shares of the blocks for ``least``, from the least to the greatest for ``range``.
    """
    lines = sources.lines(DYNAMIC)
    found = []
    for length in map(tokens, ("64K", "128K")):
        dense = line_of(lines, pattern="dense", backend="flash-attn-4", length=length)
        for share in shares:
            about = {"backend": "flash-attn-4", "parameters": share, "length": length}
            found.append(float(line_of(lines, pattern="random_blocks", **about)["tflops"]) / float(dense["tflops"]))
    ends = [f"{100 * value:.0f}" for value in (min(found), max(found))]
    return f"{ends[0]} %" if what == "least" else f"{ends[0]} to {ends[1]} %"


def hopper_against_flash_attn(sources: Sources, length: str, *patterns: str) -> str:
    """How much longer or shorter attention alone takes in our Hopper kernel than in flash-attn 4, over the same lists."""
    changes = []
    for pattern in patterns:
        lines = [one for one in sources.lines(DYNAMIC) if (one["pattern"], one["length"]) == (pattern, tokens(length))]
        own, other = (float(line_of(lines, backend=name)["attend_ms"]) for name in ("cuda-hopper", "flash-attn-4"))
        changes.append(100 * (own / other - 1))
    low, high = min(changes), max(changes)
    if low < 0 < high:
        raise ValueError(f"at {length} some of {', '.join(patterns)} take longer and some do not")
    ends = sorted({f"{abs(change):.0f}" for change in (low, high)}, key=int)
    if ends == ["0"]:
        return "the same"
    return f"{' to '.join(ends)} % {'more' if low > 0 else 'less'}"


def density_range(sources: Sources, model: str, length: str) -> str:
    """The densities of MInference's two budgets on structured weights, the means over the layers."""
    lines = [one for one in sources.lines(STRUCTURED) if (one["model"], one["length"]) == (model, tokens(length))]
    budgets = [name for name in BUDGETS if name.startswith("vertical_slash")]
    means = [statistics.fmean(float(one["density"]) for one in lines if one["pattern"] == name) for name in budgets]
    return f"{100 * min(means):.0f} to {100 * max(means):.0f} %"


def intervals(sources: Sources) -> str:
    """What the simulation of intervals found at the worst, in a sentence."""
    import pandas as pd

    return coverage_in_words(pd.read_csv(ROOT / "benchmarks" / "interval_coverage.csv", dtype=str))


KERNELS: dict[str, Block] = {
    "random-blocks": random_blocks,
    "vertical-slashes": vertical_slashes,
    "selections": selections,
    "structured-density": structured,
    "kernel": kernel,
    "dynamic": dynamic,
    "more-than-window": more_than_window,
    "of-dense": of_dense,
    "wide-heads": wide_heads,
    "in-chunks": in_chunks,
    "few-queries": few_queries,
    "corrections": corrections,
    "corrected": corrected,
    "skipped-tiles": skipped_tiles,
    "skipping-times": skipping_times,
    "skipping-difference": skipping_difference,
    "even-share": even_share,
    "hopper-against-flash-attn": hopper_against_flash_attn,
    "density-range": density_range,
    "intervals": intervals,
}
