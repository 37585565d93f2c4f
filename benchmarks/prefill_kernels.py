"""Tells what a prefill spends its time on, by kind of kernel, as torch's profiler sees it; writes a CSV.

    python benchmarks/prefill_kernels.py OUTPUT.csv [--model gpt-oss-20b qwen3-8b] [--length 65536] [--method dense]

A prompt is read as ``tmbench ttft`` reads it, compiled where the model can be: warmed up, timed without the profiler for
"alone_ms", and read once more under it. "ms" is the time of a kind's kernels, "share" its part of the time to first token
in that last run, and "launches" how many kernels it had. "idle" is the time in which no kernel ran, and "all" the time to
first token.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from timing import measured_on, written
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from tmbench.engine.first_token import first_token
from tmbench.engine.prefill import Kind
from tmbench.engine.prefill_kind import kind_wanted
from tmbench.engine.session import running
from tmbench.methods.plan import ModelShape, Plan
from tmbench.methods.spec import MethodSpec
from tmbench.models import loading
from tmbench.models.loading import LoadedModel
from tmbench.suites.prompts import batch_ids

ATTENTION, SELECTION, LINEAR, PRODUCTS = "attention", "selection", "linear attention", "matrix products"
GATHERS, ELEMENTWISE, OTHER, IDLE, ALL = "gathers and sorts", "elementwise", "other", "idle", "all"
KINDS = (ATTENTION, SELECTION, LINEAR, PRODUCTS, GATHERS, ELEMENTWISE, OTHER)
_ATTENDING = (
    "triangle", "lists", "skip_softmax", "_walk", "_carry", "_gather", "_combine", "_merge", "_rows", "_split",
)  # fmt: skip
_SELECTING = (
    "_list", "_mean_weights", "_search", "_search_count", "_mark", "_part_shares", "_part_sums", "_sort",
    "_sum_strides", "_blocks", "_count", "_leave", "_order", "_path",
)  # fmt: skip
OWN = dict.fromkeys(_ATTENDING, ATTENTION) | dict.fromkeys(_SELECTING, SELECTION)
"""The kernels of tmbench_kernels, by their whole names."""
SIGNS = (
    # What torch compiled is called after all that is fused in it, attention and gathers too.
    (PRODUCTS, r"^triton_(tem|mm)"),
    (ELEMENTWISE, r"^triton_"),
    (ATTENTION, r"flash|fmha|sdpa|attention"),
    (
        LINEAR,
        r"delta_rule|^_?chunk_|_chunk_fwd|recompute_w_u|inverse_kernel|solve_tril|conv1d|l2norm|norm_gated"
        r"|selective_scan|state_passing|recurrent",
    ),
    (PRODUCTS, r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitk|grouped_mm|dot_kernel"),
    (
        GATHERS,
        r"index_|indexselect|indexfunc|gather|scatter|sort|topk|radix|cub::|nonzero|embedding|histogram|searchsorted"
        r"|kernel_scan",
    ),
    (ELEMENTWISE, r"at::native|elementwise|^memcpy|^memset"),
)
"""What a name has in it, whatever its case; the first that is found counts."""
COLUMNS = (
    "time", "device", "torch", "transformers", "model", "weights", "dtype", "method", "length", "prefill", "alone_ms",
    "kind", "ms", "share", "launches",
)  # fmt: skip


class Kernel(NamedTuple):
    """One that ran, in microseconds."""

    name: str
    start: float
    end: float


def main() -> None:
    options = _options()
    with profile(activities=[ProfilerActivity.CUDA]):
        # What the profiler loads when it is first used is no prefill's.
        torch.zeros(1, device="cuda")
    rows = (row for model in options.model for row in measure(model, options))
    for row in written(options.output, COLUMNS, rows):
        about = ("model", "method", "length") if row["kind"] == KINDS[0] else ()
        print(*([f"\n{' '.join(str(row[name]) for name in about)}\n"] if about else []), end="")
        print(f"{row['kind']:>18} {row['ms']:>10} ms {float(str(row['share'])):>7.1%} {row['launches']:>7}", flush=True)


def measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Rows of a model: of each length and method its kinds of kernels, what was idle, and all."""
    loaded = loading.load(name, weights=options.weights, device="cuda", dtype="bfloat16")
    kind, shape = kind_wanted(loaded.model, loaded.device, None), ModelShape.of(loaded.model)
    for length in options.length:
        for method in options.method:
            plan = MethodSpec.of(method, {}).with_layers(shape, None, None).plan(shape)
            known = {
                **measured_on("cuda"),
                "transformers": version("transformers"),
                "model": name,
                "weights": options.weights,
                "dtype": loaded.dtype,
                "method": method,
                "length": length,
                "prefill": kind,
            }
            ids = batch_ids("random", length, loaded, 42, 1)
            for _ in range(options.warmup):
                _seconds(loaded, plan, kind, ids)
            known["alone_ms"] = f"{1000 * _seconds(loaded, plan, kind, ids):.3f}"
            profiler = profile(activities=[ProfilerActivity.CUDA])
            seconds = _seconds(loaded, plan, kind, ids, profiler)
            kernels = _kernels(profiler)
            yield from (known | row for row in shares(kernels, 1000 * seconds))
            for other, ms in unnamed(kernels):
                print(f"{OTHER}: {ms:.1f} ms of {other[:100]}")
    del loaded
    gc.collect()
    torch.cuda.empty_cache()


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    if name in OWN:
        return OWN[name]
    return next((kind for kind, sign in SIGNS if re.search(sign, name, re.IGNORECASE)), OTHER)


def shares(kernels: Iterable[Kernel], all_ms: float) -> list[dict[str, object]]:
    """Of each kind, of idle time and of all: milliseconds, their part of all, and launches.

    Time in which several kernels run is each one's, and busy once. Raises ValueError where kernels were busy for longer than
    all took: they are not of that time then.
    """
    ms: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    busy, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        kind = kind_of(kernel.name)
        ms[kind] += (kernel.end - kernel.start) / 1000
        launches[kind] += 1
        busy += max(kernel.end - max(kernel.start, reached), 0.0) / 1000
        reached = max(reached, kernel.end)
    if not launches or busy > 1.01 * all_ms:
        raise ValueError(f"the profiler has kernels of {busy:.1f} ms for a prefill of {all_ms:.1f} ms")
    ms |= {IDLE: max(all_ms - busy, 0.0), ALL: all_ms}
    launches[ALL] = sum(launches.values())
    return [
        {"kind": kind, "ms": f"{ms[kind]:.3f}", "share": f"{ms[kind] / all_ms:.4f}", "launches": launches[kind]}
        for kind in (*KINDS, IDLE, ALL)
    ]


def unnamed(kernels: Iterable[Kernel], most: int = 5) -> list[tuple[str, float]]:
    """The names of no kind on which most time is spent, and the milliseconds: ``SIGNS`` may lack one."""
    ms: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        if kind_of(kernel.name) == OTHER:
            ms[kernel.name] += (kernel.end - kernel.start) / 1000
    return sorted(ms.items(), key=lambda one: one[1], reverse=True)[:most]


def _kernels(profiler: profile) -> list[Kernel]:
    """What ran on the device, copies included."""
    found = [one for one in profiler.events() or () if one.device_type == DeviceType.CUDA]  # type: ignore[no-untyped-call]
    ran = (event for event in found if not event.is_user_annotation)
    return [Kernel(event.name, event.time_range.start, event.time_range.end) for event in ran]


@torch.inference_mode()
def _seconds(
    loaded: LoadedModel, plan: Plan, kind: Kind, ids: torch.Tensor, watched: AbstractContextManager[object] | None = None
) -> float:
    """Time to first token, of which alone ``watched`` sees the kernels."""
    with running(loaded.model, plan, kind) as session, session.prefill() as prefill, watched or nullcontext():
        return first_token(prefill, ids).seconds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", nargs="+", default=["gpt-oss-20b", "llama-4-scout-layers", "qwen3.5-9b", "qwen3-8b"])
    parser.add_argument("--weights", default="random", choices=["random", "structured", "checkpoint"])
    parser.add_argument("--length", type=int, nargs="+", default=[65536])
    parser.add_argument("--method", nargs="+", default=["dense"])
    parser.add_argument("--warmup", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
