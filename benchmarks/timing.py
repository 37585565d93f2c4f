"""What the scripts that time kernels share: times by the device's clock and the host's, and a CSV that grows row by row."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

MOST_SLEEPS = 6
"""How often launches are queued anew behind a sleep of twice the length before they are said to wait for the device."""
CYCLES_OF_MS = 2_000_000
"""For which a device of 2 GHz sleeps a millisecond; one of a faster clock wakes sooner, and sleeps longer the next time."""


def written(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> Iterator[Mapping[str, object]]:
    """The rows, each once it stands in the CSV: what ends early keeps what it has."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row)
            file.flush()
            yield row


def measured_on(device: str) -> dict[str, object]:
    """What a row says of when and where it was measured: its columns time, device and torch."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


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


def wall_and_host_ms(run: Callable[[], object], device: str) -> tuple[float, float | None]:
    """Of a run on a device that has nothing else to do: until all is done, and until the host has launched all of it.

    The second is None on a CPU, which computes what it launches.
    """
    if device == "cpu":
        return mean_ms(run, 1, device), None
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start), 1000 * (launched - start)


def queued_ms(runs: Sequence[Callable[[], object]], host_ms: float | None, device: str) -> float | None:
    """The time that a device takes for all of these runs, as ``queued_each`` has it of each."""
    each = queued_each(runs, host_ms, device)
    return None if each is None else sum(each)


def queued_each(runs: Sequence[Callable[[], object]], host_ms: float | None, device: str) -> list[float] | None:
    """The device's own time for each of these runs, one after the other, with no wait for a launch in it.

    The device sleeps until the launches are queued, at first for twice ``host_ms``, which the host takes for them. Where a
    queue holds fewer launches than there are, the host fills it up while the device works. So no run counts before all of
    it was launched while the device still had the one before to do: otherwise all are queued anew behind a longer sleep.
    None where that never comes to be, as for a run that waits for the device itself: its time cannot be told from the
    host's. On a CPU it is the time that the runs take.
    """
    if device == "cpu":
        return [mean_ms(run, 1, device) for run in runs]
    sleep = max(2 * (host_ms or 0.0), 1.0)
    for _ in range(MOST_SLEEPS):
        done = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda._sleep(int(sleep * CYCLES_OF_MS))  # type: ignore[no-untyped-call]
        done[0].record()
        waited = False
        for number, run in enumerate(runs):
            run()
            done[number + 1].record()
            waited = waited or done[number].query()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        if not waited:
            return [float(begin.elapsed_time(end)) for begin, end in itertools.pairwise(done)]
        sleep *= 2
    return None


def turn_ms(run: Callable[[], object], about_ms: float, device: str) -> list[float] | None:
    """The device's own time for each launch of a turn of about so long, at most 30, as ``queued_each`` has it."""
    wall, host = wall_and_host_ms(run, device)
    count = max(1, min(30, int(about_ms / max(wall, 0.01))))
    return queued_each([run] * count, count * host if host else None, device)
