"""Times answers on a GPU, decoded one by one as transformers does it and together in a CUDA graph, and writes a CSV.

    python benchmarks/decoding.py OUTPUT.csv [--model llama-3.1-8b] [--lengths 4096 32768] [--method dense]

Every answer has its prompt read by the method and --new-tokens tokens; drawn weights write no end token. What is compiled is
compiled first and not counted. "step_ms" is the time of a step at the end of the answer, all texts at that length, and
"weights_ms" what it takes to read the model's weights once at the bandwidth of a large copy in the same run. Along a text
decoded alone, "same_choices" is the part of the places at which a step chooses the same token, and "largest_gap" by how many
units in the last place another choice's logit was lower.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from timing import measured_on, written
from torch import Tensor

from tmbench.engine.batch import Batch
from tmbench.engine.compiled_layers import compiled
from tmbench.engine.decode_kind import step_kind
from tmbench.engine.prefill import Kind
from tmbench.engine.prefill_kind import kind_wanted
from tmbench.engine.session import compile_ahead, running
from tmbench.methods.plan import ModelShape, Plan
from tmbench.methods.spec import MethodSpec
from tmbench.models import loading
from tmbench.models.loading import LoadedModel

COLUMNS = [
    "run", "time", "device", "torch", "triton", "transformers", "model", "weights", "dtype", "method", "length",
    "new_tokens", "way", "batch_size", "samples", "seconds_per_sample", "prefill_s", "step_ms", "weights_ms", "peak_gib",
    "same_choices", "largest_gap",
]  # fmt: skip


def main() -> None:
    options = _options()
    loaded = loading.load(options.model, weights=options.weights, device="cuda", dtype=options.dtype)
    loaded.model.generation_config.eos_token_id = None
    rows = (row for length in options.lengths for row in measure(loaded, length, options))
    for row in written(options.output, COLUMNS, rows):
        shown = {name: row.get(name) for name in COLUMNS[COLUMNS.index("length") :]}
        print(", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)


@torch.inference_mode()
def measure(loaded: LoadedModel, length: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One length: first one by one, then together, at each size that was asked for."""
    model, new = loaded.model, options.new_tokens
    kind = kind_wanted(model, loaded.device, None)
    shape = ModelShape.of(model)
    plan = MethodSpec.of(options.method, {}).with_layers(shape, None, None).plan(shape)
    prompts = _prompts(loaded, length, max(options.samples, *options.sizes))
    compile_ahead(model, plan, kind, prompts[0])
    step, obstacle = step_kind(model, kind)
    if step is None:
        raise SystemExit(f"{options.model} decodes one text at a time, {obstacle}")
    known = {
        "run": options.run,
        **measured_on("cuda"),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "model": options.name or options.model,
        "weights": options.weights,
        "dtype": loaded.dtype,
        "method": options.method,
        "length": length,
        "new_tokens": new,
        "weights_ms": round(1e3 * _weights_read(loaded), 3),
    }
    torch.cuda.reset_peak_memory_stats()
    plain = [_plain(loaded, plan, kind, ids, new) for ids in prompts[: options.plain]]
    if plain:
        read, whole = statistics.mean(one[0] for one in plain), statistics.mean(one[1] for one in plain)
        about = {"way": "plain", "batch_size": 1, "samples": len(plain), "seconds_per_sample": round(whole, 4)}
        about |= {"prefill_s": round(read, 4), "step_ms": round(1e3 * (whole - read) / (new - 1), 3), "peak_gib": _peak()}
        yield known | about
    for size in options.sizes:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        batch = Batch(model, length + new, new, size=size, graph=True, runner=compiled(model).decode_layer)
        _together(batch, plan, kind, prompts[:1], min(new, 10))
        asked = prompts[: max(options.samples // batch.slots, 1) * batch.slots]
        _wait()
        start = time.perf_counter()
        read = _together(batch, plan, kind, asked, new)
        seconds = time.perf_counter() - start
        about = {"way": step, "batch_size": batch.slots, "samples": len(asked)}
        about |= {"seconds_per_sample": round(seconds / len(asked), 4), "prefill_s": round(read / len(asked), 4)}
        about |= {"step_ms": round(1e3 * _step(batch), 3), "peak_gib": _peak()}
        if plain:
            about |= _compare(batch, plan, kind, prompts[0], plain[0][2])
        yield known | about
        del batch


def _plain(loaded: LoadedModel, plan: Plan, kind: Kind, ids: Tensor, new: int) -> tuple[float, float, list[Tensor]]:
    """Seconds of the prefill and of all, and the logits of every new token, of an answer that is decoded alone."""
    _wait()
    start = time.perf_counter()
    with running(loaded.model, plan, kind) as session:
        decoding = session.read(ids)
        logits = [decoding.logits[0]]
        tokens = [int(logits[0].argmax())]
        read = time.perf_counter() - start
        while len(tokens) < new:
            logits.append(decoding.read(tokens[-1:])[0])
            tokens.append(int(logits[-1].argmax()))
    return read, time.perf_counter() - start, logits


def _compare(batch: Batch, plan: Plan, kind: Kind, ids: Tensor, logits: list[Tensor]) -> dict[str, Any]:
    """Along the text that was decoded alone: how often a step chooses the same, and how much better that was at most.

    The latter is the difference of the two choices' logits, decoded alone, in units of the last place of the higher one.
    """
    text = [int(expected.argmax()) for expected in logits]
    with running(batch.model, plan, kind) as session:
        wrote = batch.read(session, ids, len(logits), endless=True, given=text)
    while batch.texts:
        batch.advance()
    gap = 0.0
    for expected, choice in zip(logits, wrote.tokens, strict=True):
        top = expected.max()
        unit = torch.finfo(batch.model.dtype).eps * 2 ** torch.floor(torch.log2(top.abs()))
        gap = max(gap, float((top - expected[choice]) / unit))
    same = [choice == token for choice, token in zip(wrote.tokens, text, strict=True)]
    return {"same_choices": round(statistics.mean(same), 4), "largest_gap": round(gap, 2)}


def _together(batch: Batch, plan: Plan, kind: Kind, prompts: list[Tensor], new: int) -> float:
    """Have every prompt answered; the seconds of the prefills."""
    waiting, read = list(prompts), 0.0
    while waiting or batch.texts:
        while waiting and not batch.full:
            start = time.perf_counter()
            with running(batch.model, plan, kind) as session:
                batch.read(session, waiting.pop(0), new)
            read += time.perf_counter() - start
        batch.advance()
    return read


def _step(batch: Batch, steps: int = 50) -> float:
    """Seconds of one step with all texts as long as the cache."""
    batch._state.cache_seqlens.fill_(batch.cache.capacity - 1)
    assert batch._graph is not None
    _wait()
    start = time.perf_counter()
    for _ in range(steps):
        batch._graph.replay()
    _wait()
    return (time.perf_counter() - start) / steps


def _weights_read(loaded: LoadedModel) -> float:
    """Seconds to read the weights of one token's pass at the bandwidth of a large copy."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        _wait()
        start = time.perf_counter()
        target.copy_(source)
        _wait()
        times.append(time.perf_counter() - start)
    bandwidth = 2 * source.nbytes / statistics.median(times)
    embedding = loaded.model.get_input_embeddings().weight
    head = loaded.model.get_output_embeddings().weight
    read = {parameter.data_ptr(): parameter.nbytes for parameter in loaded.model.parameters()}
    if head.data_ptr() != embedding.data_ptr():
        read.pop(embedding.data_ptr())
    return float(sum(read.values()) / bandwidth)


def _prompts(loaded: LoadedModel, length: int, count: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(42)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    return [torch.randint(vocabulary, (1, length), generator=random).to("cuda") for _ in range(count)]


def _peak() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _wait() -> None:
    torch.cuda.synchronize()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--weights", default="random", choices=["random", "structured", "checkpoint"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--method", default="dense")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 64], help="Batch sizes; fewer where memory holds fewer.")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--plain", type=int, default=2, help="Answers that are decoded one by one.")
    parser.add_argument("--name", help="What to call a checkpoint that lies in a folder.")
    options = parser.parse_args()
    # Only what ran in one process is compared.
    options.run = datetime.now(UTC).strftime("%Y%m%d%H%M%S")
    return options


if __name__ == "__main__":
    main()
