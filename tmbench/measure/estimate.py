"""How long a sample will take: from what was measured before on the same device, of the same model, else from the roofline.

What was measured of another task, another length, or of dense attention is scaled by the roofline's ratio of the two. The
roofline alone is a lower bound: the GEMM throughput, and every weight read once for each decoding step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ruler_tasks import TASKS
from tmbench.engine import roofline
from tmbench.engine.batch import SIZES
from tmbench.engine.calls import empty_cache
from tmbench.engine.decode_kind import why_alone
from tmbench.engine.prefix import lets_go
from tmbench.measure.ttft import expected_flop
from tmbench.methods.plan import Plan
from tmbench.methods.table import METHODS
from tmbench.models.geometry import Geometry
from tmbench.models.loading import LoadedModel
from tmbench.results.environment import Environment
from tmbench.results.rows import OK, AgreeRow, LossRow, ProbeRow, Row, TtftRow
from tmbench.results.tables import read_all
from tmbench.results.variants import identity
from tmbench.results.words import batched

PROBE = 4
"""Forward passes that a probe takes: its own, each layer's once more, and a backward pass of two."""
FREE = 0.9
"""The part of a GPU's memory that weights and caches are taken to fill."""


@dataclass(frozen=True)
class Work:
    """What the roofline counts of one sample."""

    flop: float
    """Of reading the prompt."""
    bytes: float = 0.0
    """Read while decoding: weights and keys and values."""


@dataclass(frozen=True)
class Estimate:
    """How long one sample takes, and where that is from, in words."""

    seconds: float
    basis: str


@dataclass(frozen=True)
class Rates:
    """What the roofline divides by."""

    flops: float
    """The GEMM throughput, in operations per second."""
    flops_from: str
    bytes: float
    """Bytes per second of copies."""


@dataclass(frozen=True)
class Asked:
    """One sample that is to be measured."""

    kind: type[Row]
    """Of its row."""
    plan: Plan
    length: int
    task: str = ""
    """The task or the kind of prompt."""
    new: int = 0
    """Tokens that are decoded."""
    batch_size: int = 1
    """How many prompts are read together: several only where their first tokens are timed."""
    read: bool = True
    """Whether its context is read for it, and not for another question before."""


class Estimator:
    """Estimates for one model on one device."""

    def __init__(
        self,
        loaded: LoadedModel,
        environment: Environment,
        root: Path,
        reading: Mapping[str, Any],
        batch_size: int | None = None,
    ) -> None:
        """Of a results folder's rows those count that were measured here, of this model, whose prompts were read so.

        ``batch_size`` is how many texts decode together at most; None for as many as memory holds.
        """
        self.loaded = loaded
        self.rated = False
        """Whether an estimate needed the roofline."""
        self._environment = environment
        self._root = root
        self._reading = reading
        self._batch_size = batch_size
        self._rows: dict[type[Row], list[Any]] = {}

    @cached_property
    def rates(self) -> Rates:
        """From times that were measured here before; what these do not say is measured now."""
        device, dtype = self.loaded.device, self.loaded.model.dtype
        known = [row.matrix_rate_flops for row in self._here(TtftRow) if row.dtype == self.loaded.dtype]
        measured = [rate for rate in known if rate]
        flops = statistics.median(measured) if measured else roofline.gemm_throughput(device, dtype)
        return Rates(flops, "as tmbench ttft measured" if measured else "measured now", roofline.copy_rate(device))

    @cached_property
    def _alone(self) -> bool:
        """Whether texts are decoded one by one."""
        alone = (self._batch_size or 1) == 1 and self.loaded.device.type != "cuda"
        return alone or bool(why_alone(self.loaded.model, self._reading["prefill"]))

    @cached_property
    def keeps_contexts(self) -> bool:
        """Whether a context is read once for several questions: see ``tmbench.measure.contexts``."""
        return not self._alone or lets_go(empty_cache(self.loaded.model))

    def texts(self, length: int) -> int:
        """How many texts of this length are taken to decode together."""
        if self._alone:
            return 1
        most = self._batch_size or max(SIZES)
        left = FREE * self._environment.memory_bytes - sum(
            p.numel() * p.element_size() for p in self.loaded.model.parameters()
        )
        return max(1, min(most, int(left / self._slot_bytes(length))))

    def sample(self, asked: Asked, kept: Iterable[float] = ()) -> Estimate:
        """The seconds of one sample; ``kept`` are those of its row's that are there already."""
        if own := list(kept):
            return Estimate(statistics.mean(own), "its samples so far")
        if found := self._scaled(asked, asked.kind, _seconds):
            return found
        work = self.work(asked)
        if asked.kind is not TtftRow and (found := self._scaled(asked, TtftRow, lambda row: row.ttft_median_s)):
            self.rated = True
            # What is read, and how often, is not what a first token takes.
            reading = found.seconds * work.flop / self.work(Asked(TtftRow, asked.plan, asked.length)).flop
            return Estimate(reading + work.bytes / self.rates.bytes, f"{found.basis} of tmbench ttft, and the roofline")
        return Estimate(self._roofline(work), "the roofline")

    def work(self, asked: Asked) -> Work:
        """What the roofline counts of it."""
        geometry = self.loaded.geometry
        prompt = asked.length - (asked.new if asked.kind not in (TtftRow, AgreeRow) else 0)
        flop = expected_flop(self.loaded, asked.plan, max(prompt, 1), asked.batch_size) if asked.read else 0.0
        if asked.kind is ProbeRow:
            return Work(PROBE * flop)
        if asked.kind is LossRow:
            flop += 2.0 * prompt * self.loaded.model.config.get_text_config().hidden_size * geometry.vocabulary
        together = 1 if asked.kind is LossRow else self.texts(asked.length)
        step = roofline.weight_bytes(self.loaded.model) / together + self._cache_bytes(asked.length)
        return Work(flop, max(asked.new - 1, 0) * step)

    def words(self) -> str:
        """What the roofline assumes, in a sentence."""
        rates = self.rates
        return (
            f"The roofline is a lower bound: a GEMM throughput of {rates.flops / 1e12:.3g} TFLOP/s, {rates.flops_from}, and "
            f"in each decoding step all weights read once at {rates.bytes / 1e9:.3g} GB/s, measured now."
        )

    def _slot_bytes(self, length: int) -> float:
        """What a text takes in a static cache, which keeps all keys of every layer that attends."""
        shapes = [Geometry.of(self.loaded.model, layer) for layer in range(self.loaded.shape.layers)]
        each = sum(shape.kv_heads * (shape.qk_head_dim + shape.v_head_dim) for shape in shapes)
        return float(each * length * self.loaded.model.dtype.itemsize)

    def _cache_bytes(self, length: int) -> float:
        """What a step reads of a text."""
        shape = self.loaded.geometry
        size = self.loaded.model.dtype.itemsize
        # What other layers keep is little beside the keys of full attention.
        return float(len(self.loaded.shape.full) * shape.kv_heads * (shape.qk_head_dim + shape.v_head_dim) * length * size)

    def _roofline(self, work: Work) -> float:
        self.rated = True
        return work.flop / self.rates.flops + work.bytes / self.rates.bytes

    def _scaled(self, asked: Asked, kind: type[Row], seconds: Callable[[Any], float | None]) -> Estimate | None:
        """From the row of a kind that is nearest to what is asked; None where there is none of this method or of dense."""
        dense = METHODS["dense"].plan(self.loaded.shape)
        wanted = identity(asked.plan)
        near: list[tuple[tuple[Any, ...], Any, Plan]] = []
        for row in self._of_model(kind):
            own = identity(row) == wanted
            if seconds(row) is None or not (own or row.method == "dense"):
                continue
            together = asked.batch_size if isinstance(row, TtftRow) else self._batch_size
            other_batch = together is not None and getattr(row, "batch_size", together) != together
            far = abs(math.log(row.length / asked.length))
            rank = not own, other_batch, far, _task(row) != asked.task
            near.append((rank, row, asked.plan if own else dense))
        if not near:
            return None
        least = min(rank for rank, _, _ in near)
        # Of equally near rows the newest counts: what decodes may have become faster.
        _, row, plan = max((one for one in near if one[0] == least), key=lambda one: one[1].time)
        prompts = row.batch_size if isinstance(row, TtftRow) else 1
        there = Asked(kind, plan, row.length, _task(row), _new(row, asked.new), prompts)
        new, read = (asked.new, asked.read) if kind is asked.kind else (0, True)
        here = Asked(kind, asked.plan, asked.length, asked.task, new, asked.batch_size, read)
        measured = seconds(row)
        assert measured is not None
        other, _, _, elsewhere = least
        words = "rows" + f" of {row.method}" * other + f" on {_task(row)}" * (elsewhere and kind is asked.kind)
        words += f" at {batched(prompts)}{row.length}" * ((row.length, prompts) != (asked.length, asked.batch_size))
        before, after = self.work(there), self.work(here)
        ratio = 1.0 if before == after else self._roofline(after) / self._roofline(before)
        return Estimate(measured * ratio, words)

    def _here(self, kind: type[Row]) -> Sequence[Any]:
        """The rows of a kind that were measured on this device."""
        if kind not in self._rows:
            here = self._environment
            self._rows[kind] = [
                row
                for row in read_all(self._root, kind)
                if (row.device, row.threads, row.status) == (here.device, here.threads, OK)
            ]
        return self._rows[kind]

    def _of_model(self, kind: type[Row]) -> list[Any]:
        about = {**self.loaded.row_fields(), "chunk": 0, "prompt_length": "", "ask_later": False, **self._reading}
        alike = [row for row in self._here(kind) if all(getattr(row, name) == value for name, value in about.items())]
        # A later question's time is without the reading of its context, or with that of some.
        return [row for row in alike if not row.ask_later or getattr(row, "question", 1) == 1]


def _seconds(row: Any) -> float | None:
    found = row.ttft_median_s if isinstance(row, TtftRow) else row.seconds_per_sample
    return None if found is None else float(found)


def _task(row: Any) -> str:
    return str(getattr(row, "task", "") or getattr(row, "prompt", ""))


def _new(row: Any, asked: int) -> int:
    """The tokens that were decoded for a row, as far as that is known."""
    if isinstance(row, TtftRow):
        return 0
    if isinstance(row, AgreeRow):
        return row.new_tokens
    task = _task(row)
    return TASKS[task].tokens_to_generate if task in TASKS and not isinstance(row, (LossRow, ProbeRow)) else asked
