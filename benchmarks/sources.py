"""What is rendered into the docs comes from here: reports on committed rows, and the CSVs of benchmarks."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from tmbench.report.report import AnySection, Report, build
from tmbench.report.ttft import TtftSection

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "benchmarks" / "smollm2-135m"
SERVED = ROOT / "benchmarks" / "served"
EQUAL_DENSITY = ROOT / "benchmarks" / "equal-density"
MANY_GPUS = ROOT / "benchmarks" / "many-gpus"
BATCHES = ROOT / "benchmarks" / "batches"
S = TypeVar("S", bound=AnySection)
H100, H200, INTEL, EPYC = "nvidia-h100-80gb-hbm3", "nvidia-h200", "cpu-intel-xeon-2-cores", "cpu-amd-epyc-2-cores"
Line = dict[str, str]


class Sources:
    """Committed rows, each read once.

    Attributes:
        smollm2_rows: the folder of SmolLM2's.
        served_rows: the folder of those of prompts in chunks and of later questions.
        density_rows: the folder of those of methods at one density.
        many_rows: the folder of those of several GPUs.
        batch_rows: the folder of those of several prompts read together.
    """

    def __init__(
        self,
        smollm2_rows: Path = SMOLLM2,
        served_rows: Path = SERVED,
        density_rows: Path = EQUAL_DENSITY,
        many_rows: Path = MANY_GPUS,
        batch_rows: Path = BATCHES,
    ) -> None:
        self.smollm2_rows = smollm2_rows
        self.served_rows = served_rows
        self.density_rows = density_rows
        self.many_rows = many_rows
        self.batch_rows = batch_rows

    @cached_property
    def results(self) -> Report:
        """What was measured for the report."""
        return build(ROOT / "results")

    @property
    def structured(self) -> TtftSection:
        """Times of Llama-3.1-8B's geometry with structured weights, on an H100."""
        return only(self.results.ttft, device=H100, weights="structured", batch_size=1)

    @property
    def random(self) -> TtftSection:
        """The same with random weights, on an H200."""
        return only(self.results.ttft, device=H200, model="llama-3.1-8b", weights="random", batch_size=1)

    @cached_property
    def checkpoint(self) -> Report:
        """What a checkpoint of 8B parameters takes."""
        return build(ROOT / "benchmarks" / "checkpoint")

    @cached_property
    def probes(self) -> Report:
        """Further probes of the embedded model."""
        return build(ROOT / "benchmarks" / "probes")

    @cached_property
    def smollm2(self) -> Report | None:
        """SmolLM2-135M-Instruct; None before its rows are there."""
        return build(self.smollm2_rows) if any(self.smollm2_rows.glob("*/*/*.csv")) else None

    @cached_property
    def served(self) -> Report | None:
        """Prompts in one piece, in chunks, and with later questions; None before there are rows."""
        return build(self.served_rows) if any(self.served_rows.glob("*/*/*.csv")) else None

    @cached_property
    def presets(self) -> Report:
        """Times of models with layers of several kinds, and of other newer ones."""
        return build(ROOT / "benchmarks" / "presets")

    @cached_property
    def density(self) -> Report | None:
        """Methods at one density; None before there are rows."""
        return build(self.density_rows) if any(self.density_rows.glob("*/*/*.csv")) else None

    @cached_property
    def many_gpus(self) -> Report:
        """Times of models and prompts that several GPUs shared, and of one GPU beside them."""
        return build(self.many_rows)

    @cached_property
    def batches(self) -> Report:
        """Times of several prompts that were read together."""
        return build(self.batch_rows)

    def lines(self, path: str) -> list[Line]:
        """The lines of a CSV, its path from the root of the repository on."""
        with (ROOT / path).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


Block = Callable[..., str]
"""Makes a table or a text of ``Sources`` and the words behind its name."""


def only(sections: Iterable[S], **about: object) -> S:
    """The one section whose setting has these values; raises ValueError where there are none or several."""
    found = [one for one in sections if all(getattr(one.setting, name) == value for name, value in about.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} sections have {about}")
    return found[0]


def line_of(lines: Iterable[Line], **about: str) -> Line:
    """The one line of a CSV with these values; raises ValueError where there are none or several."""
    found = [line for line in lines if all(line[name] == value for name, value in about.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} lines have {about}")
    return found[0]


def tokens(name: str) -> str:
    """A number of tokens as CSVs have it: 128K is 131072."""
    return str(int(name[:-1]) * 1024) if name.endswith("K") else name
