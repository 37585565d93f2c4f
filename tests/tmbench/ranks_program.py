"""What ``test_ranks`` starts on every rank: ``python ranks_program.py TASK FOLDER``, by torchrun or without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tmbench.engine import compiled_layers
from tmbench.engine.density import PairCounter
from tmbench.engine.prefill import COMPILED, EAGER
from tmbench.engine.roofline import linear_flop
from tmbench.engine.session import running
from tmbench.measure.attempt import attempt
from tmbench.methods.plan import Plan
from tmbench.methods.spec import MethodSpec
from tmbench.models import parallel
from tmbench.models.loading import Weights, load
from tmbench_kernels import MInferenceHeads
from tmbench_kernels.minference import HeadPattern

LENGTH = 701
HEADS = MInferenceHeads(
    (
        HeadPattern("vertical_and_slash", 40, 60),
        HeadPattern("stream_llm", 16, 64),
        HeadPattern("vertical_and_slash", 200, 150),
        HeadPattern("stream_llm", 4, 32),
    )
)


def plans(shape):
    named = {name: MethodSpec.of(name, {}).with_layers(shape, None, None).plan(shape) for name in ("dense", "tri_mix")}
    return named | {"minference": Plan("minference", (HEADS,) * shape.layers)}


def read(folder: Path, *, context_parallel: bool = False) -> None:
    """The logits of every kind of weights and method, and what is counted of them."""
    found: dict[tuple[str, str], Any] = {}
    kinds: tuple[Weights, ...] = ("random", "structured", "checkpoint")
    for weights in kinds:
        found |= read_one(weights, context_parallel)
    torch.save(found, folder / f"{parallel.size()}-{parallel.rank()}.pt")


def read_one(weights: Weights, context_parallel: bool) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    # Two prompts of an odd length, which ranks cannot share evenly.
    ids = (torch.arange(2 * LENGTH) * 37 % 3000 + 3).view(2, LENGTH)
    loaded = load("tiny", weights=weights, device="cpu", dtype="float32", context_parallel=context_parallel)
    for method, plan in plans(loaded.shape).items():
        counter = PairCounter()
        with torch.inference_mode(), running(loaded.model, plan, EAGER) as session:
            session.applied.observer = counter
            new = session.generate(ids, 4)
            with session.prefill() as prefill:
                logits = prefill(ids)
        counted = dict(counter.pairs), counter.density, linear_flop(loaded.model, LENGTH)
        found[weights, method] = {"logits": logits, "new": new.tolist(), "counted": counted}
        if prefill.split is not None:
            assert prefill.split.seconds > 0
    found[weights, "parameters"] = sum(parameter.numel() for parameter in loaded.model.model.layers.parameters())
    if weights == "checkpoint":
        with torch.inference_mode(), running(loaded.model, plan, COMPILED) as session, session.prefill() as prefill:
            found["compiled", "logits"] = prefill(ids)
    return found


def fail() -> None:
    """Work that fails on one rank, while the other counts or has ended: both say so, and go on."""

    def work(last: bool) -> int:
        if parallel.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 7 if last else parallel.summed(1)

    # In one piece, as both write to the same place.
    print(
        f"{attempt(lambda: work(False))} {attempt(lambda: work(True))} {attempt(lambda: parallel.summed(4))}\n",
        end="",
        flush=True,
    )


def wait() -> None:
    """Work that fails on one rank while the other waits for it."""
    parallel.PATIENCE = 1.0

    def work() -> None:
        if parallel.rank() == 1:
            raise RuntimeError("this GPU has had enough")
        dist.all_reduce(torch.ones(4))

    attempt(work)


if __name__ == "__main__":
    task, folder = sys.argv[1], Path(sys.argv[2])
    if parallel.launched():
        parallel.start()
    # As traced, which needs no C++ compiler.
    compiled_layers.BACKEND = "eager"
    context = partial(read, folder, context_parallel=True)
    tasks: dict[str, Callable[[], None]] = {"read": partial(read, folder), "context": context, "fail": fail, "wait": wait}
    tasks[task]()
    parallel.stop()
