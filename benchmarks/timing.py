"""What the scripts that time kernels share: a launch's time, and the CSV that is there row by row."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch


def written(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> Iterator[Mapping[str, object]]:
    """The rows, each once it stands in the CSV: what ends early keeps what it has."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row)
            file.flush()
            yield row


def mean_ms(run: Callable[[], object], launches: int, device: str) -> float:
    """Of a launch, the mean of these many."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(launches):
            run()
        return 1000 * (time.perf_counter() - start) / launches
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(launches):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / launches
