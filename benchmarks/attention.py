"""Times dense and triangle attention on a GPU, ours beside every peer that is installed, and writes a CSV.

    python benchmarks/attention.py OUTPUT.csv [--lengths 32768 131072] [--heads 32] [--kv-heads 8] [--head-dim 192]
        [--v-head-dim 128] [--minference FOLDER]

Peers: FlexAttention under torch.compile (also with flash-attn 4 behind it), flash-attn 4 with a window (the band alone,
for comparison), and the triangle kernel of a checkout of microsoft/MInference, whose keys and values are repeated
beforehand, which is not counted. All are interleaved, several launches a round: the chip slows as it warms, for all then.
Beside every time stands the error: RMS difference from softmax in float32 on sampled queries, over the RMS of the exact
output; next to it that of plain torch in the same type. "extra" is the memory taken at the peak beyond q, k, v and the
output.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from timing import measured_on, turn_ms, written
from torch import Tensor

from tmbench_kernels import Backend, Dense, Pattern, Triangle
from tmbench_kernels.reference import masked_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
COLUMNS = [
    "time", "device", "torch", "triton", "pattern", "implementation", "length", "heads", "kv_heads", "head_dim", "dtype",
    "n_init", "n_local", "last_n", "pairs", "launches", "ms_median", "ms_min", "ms_max", "tflops", "times_dense", "error",
    "error_of_torch", "extra_mib", "note", "v_head_dim",
]  # fmt: skip
TURN_MS = 60.0


@dataclass
class Entry:
    """One implementation of one pattern at one length."""

    pattern: Pattern
    name: str
    attend: Attend
    comparable: bool = True
    """Whether it computes the whole pattern."""
    ms: list[float] = field(default_factory=list)
    note: str = ""
    error: float | None = None
    extra: float | None = None


def main() -> None:
    options = _options()
    pattern = Triangle(options.n_init, options.n_local, options.last_n)
    rows = (row for length in options.lengths for row in measure(pattern, length, options))
    for row in written(options.output, COLUMNS, rows):
        print(
            f"{row['length']:>7} {row['pattern']:<9}{row['implementation']:<24}{row['ms_median']:>9} ms "
            f"{row['tflops']:>6} TFLOP/s {row['times_dense']:>6} x dense  error {row['error']} {row['note']}",
            flush=True,
        )


def measure(pattern: Triangle, length: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one length, all implementations interleaved."""
    q, k, v = random_qkv(length, options)
    groups = q.shape[1] // k.shape[1]
    entries = [*ours(Dense(), q, k, v), *ours(pattern, q, k, v), *flex(pattern, q, k, v), *band(pattern, q, k, v)]
    if options.minference:
        entries.append(minference(options.minference, pattern, k, v, groups))
    entries = [entry for entry in entries if entry.name not in options.skip]
    samples = {known.name: Sample(known, q, k, v) for known in (Dense(), pattern)}
    for entry in entries:
        warm_up(entry, samples[entry.pattern.name], q, k, v)
    for _ in range(options.rounds):
        for entry in entries:
            if entry.note:
                continue
            found = timed(entry.attend, q, k, v)
            if found is None:
                entry.ms, entry.note = [], "waits for the device, whose time cannot be told from the host's"
            else:
                entry.ms += found
    dense = min((statistics.median(entry.ms) for entry in entries if entry.pattern == Dense() and entry.ms), default=None)
    return [as_row(entry, samples[entry.pattern.name], q, k, v, dense) for entry in entries]


def random_qkv(length: int, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian, as a projection yields them: views of ``[1, length, heads, head_dim]``."""
    generator = torch.Generator(device="cuda").manual_seed(length)
    dtype = getattr(torch, options.dtype)
    q, k, v = (
        torch.randn(1, length, n, dim, device="cuda", generator=generator).to(dtype).transpose(1, 2)
        for n, dim in (
            (options.heads, options.head_dim),
            (options.kv_heads, options.head_dim),
            (options.kv_heads, options.v_head_dim or options.head_dim),
        )
    )
    return q, k, v


def ours(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> list[Entry]:
    """Every backend of a pattern that serves these tensors."""
    scale = q.shape[-1] ** -0.5

    def attend(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return backend.attend(pattern, q, k, v, scale)

    serving = [backend for backend in pattern.backends if not backend.obstacle(pattern, q, k, v)]
    return [Entry(pattern, backend.name, partial(attend, backend)) for backend in serving]


def flex(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor) -> list[Entry]:
    """FlexAttention over a block mask of the triangle, by its Triton kernel and, where installed, by flash-attn 4."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[2]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return pattern.attends(i, j, length)

    mask = create_block_mask(seen, None, None, length, length, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention)

    def attend(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return compiled(q, k, v, block_mask=mask, enable_gqa=True, kernel_options={"BACKEND": backend})

    entries = [Entry(pattern, "flex-triton", partial(attend, "TRITON"))]
    if importlib.util.find_spec("flash_attn") is not None:
        entries.append(Entry(pattern, "flex-flash-attn-4", partial(attend, "FLASH")))
    return entries


def band(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor) -> list[Entry]:
    """flash-attn 4 on the window alone, without sinks and last rows."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Any = flash_attn_func(q, k, v, causal=True, window_size=(pattern.n_local - 1, 0))
        tensor: Tensor = out[0] if isinstance(out, tuple) else out
        return tensor.transpose(1, 2)

    return [Entry(pattern, "flash-attn-4 window only", attend, comparable=False)]


def minference(folder: Path, pattern: Triangle, k: Tensor, v: Tensor, groups: int) -> Entry:
    """The kernel that TriangleMix was published with, from a checkout."""
    path = folder / "minference" / "ops" / "streaming_kernel.py"
    spec = importlib.util.spec_from_file_location("published_streaming_kernel", path)
    if spec is None or spec.loader is None or not path.exists():
        sys.exit(f"--minference {folder}: there is no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = {"attn_forward_config": {"n_init": pattern.n_init, "n_local": pattern.n_local, "n_last": pattern.last_n}}
    many_k, many_v = (x.repeat_interleave(groups, 1) for x in (k, v))
    return Entry(pattern, "minference", lambda q, k, v: module.tri_shape_kernel(q, many_k, many_v, config))


def warm_up(entry: Entry, sample: Sample, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Compile, and measure memory and the error; an implementation that fails says why in its row."""
    try:
        entry.attend(q, k, v)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = entry.attend(q, k, v)
        torch.cuda.synchronize()
        beyond = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
        entry.extra = max(beyond, 0) / 2**20
        if entry.comparable:
            entry.error = sample.error(out)
    except Exception as failure:
        entry.note = f"{type(failure).__name__}: {' '.join(str(failure).split())[:120]}"
        torch.cuda.empty_cache()


def timed(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> list[float] | None:
    """Milliseconds that the device takes for each launch of one turn, after one that is not counted.

    None where a launch waits for the device, so that its time cannot be told from the host's.
    """
    return turn_ms(partial(attend, q, k, v), TURN_MS, q.device.type)


class Sample:
    """48 queries of one pattern, from all over the prompt and where something begins or ends, and what is right for them."""

    def __init__(self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> None:
        length = q.shape[2]
        edges = [0, 7, 8, 511, 512, 519, 520, 521, length - 129, length - 128, length - 127, length - 1]
        rows = sorted({row for row in (*edges, *range(5, length, max(1, length // 36))) if 0 <= row < length})
        self.rows = torch.tensor(rows, device=q.device)
        i, j = self.rows[:, None], torch.arange(length, device=q.device)
        mask = pattern.attends(i, j, length) if isinstance(pattern, Triangle) else j <= i
        self.exact = masked_attention(q[:, :, self.rows], k, v, mask, dtype=torch.float32)
        self.error_of_torch = self._relative_rms(masked_attention(q[:, :, self.rows], k, v, mask, dtype=q.dtype))

    def error(self, out: Tensor) -> float:
        """Relative RMS error of ``out`` on the sampled queries."""
        return self._relative_rms(out[:, :, self.rows])

    def _relative_rms(self, rows: Tensor) -> float:
        return float((rows - self.exact).square().mean().sqrt() / self.exact.square().mean().sqrt())


def as_row(entry: Entry, sample: Sample, q: Tensor, k: Tensor, v: Tensor, dense: float | None) -> dict[str, object]:
    pattern = entry.pattern
    pairs = pattern.pairs(q, k)
    row: dict[str, object] = {
        **measured_on("cuda"),
        "triton": triton.__version__,
        "pattern": pattern.name,
        "implementation": entry.name,
        "length": q.shape[2],
        "heads": q.shape[1],
        "kv_heads": k.shape[1],
        "head_dim": q.shape[3],
        "v_head_dim": v.shape[3],
        "dtype": str(q.dtype).removeprefix("torch."),
        **dict.fromkeys(("ms_median", "ms_min", "ms_max", "tflops", "times_dense", "error", "extra_mib"), ""),
        "pairs": pairs,
        "launches": len(entry.ms),
        "error_of_torch": f"{sample.error_of_torch:.2e}",
        "note": entry.note or ("" if entry.comparable else "not the whole pattern"),
    }
    if isinstance(pattern, Triangle):
        row |= {"n_init": pattern.n_init, "n_local": pattern.n_local, "last_n": pattern.last_n}
    if entry.ms:
        median = statistics.median(entry.ms)
        row |= {
            "ms_median": f"{median:.4f}",
            "ms_min": f"{min(entry.ms):.4f}",
            "ms_max": f"{max(entry.ms):.4f}",
            "tflops": f"{2 * (q.shape[3] + v.shape[3]) * pairs / median / 1e9:.0f}" if entry.comparable else "",
            "times_dense": f"{dense / median:.2f}" if dense and entry.comparable else "",
            "error": "" if entry.error is None else f"{entry.error:.2e}",
            "extra_mib": "" if entry.extra is None else f"{entry.extra:.1f}",
        }
    return row


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--v-head-dim", type=int, help="that of values, where it is another")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--n-init", type=int, default=8)
    parser.add_argument("--n-local", type=int, default=512)
    parser.add_argument("--last-n", type=int, default=128)
    parser.add_argument("--rounds", "--turns", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=["torch-banded", "torch"], help="implementations to leave out")
    parser.add_argument("--minference", type=Path, help="a checkout of microsoft/MInference")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; benchmarks/cpu_attention.py is for the CPU")
    return options


if __name__ == "__main__":
    main()
