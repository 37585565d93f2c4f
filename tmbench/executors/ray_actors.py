"""Workers that are Ray's actors: one for each GPU of a cluster, or of this machine.

An actor tells through a streaming generator, which is one call for as long as it lives, and is given orders by other calls.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from tmbench.errors import UserError, shortened
from tmbench.executors.worker_loop import Lost, Told, serve
from tmbench.measure.spec import ModelSource
from tmbench.results.failures import describe
from tmbench.results.words import counted

ADDRESS = "RAY_ADDRESS"
STORE = 2**27
"""Bytes of the object store of a Ray of this machine alone: what passes through it are prompts and answers."""


QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""What Ray reads when it is imported: it would report to its makers, and write between our lines."""
ANSWERS = 60.0
"""Seconds that a cluster has to answer in. Ray itself tries for many minutes, and writes of each attempt."""
JOIN = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
"""Joins a cluster as this process does, and leaves it."""


class Actor:
    """What an actor runs."""

    def __init__(self) -> None:
        self.orders: SimpleQueue[Any] = SimpleQueue()

    def give(self, order: Any) -> None:
        """Have the worker receive this next."""
        self.orders.put(order)

    def told(self, source: ModelSource, threads: int | None) -> Iterator[Told]:
        """Start the worker; what it tells, until it ends."""
        told: SimpleQueue[Told | None] = SimpleQueue()

        def work() -> None:
            try:
                serve(source, threads, self.orders.get, told.put)
            finally:
                told.put(None)

        Thread(target=work, name="worker", daemon=True).start()
        while (one := told.get()) is not None:
            yield one


class Handle:
    """One worker."""

    def __init__(self, actor: Any, source: ModelSource, threads: int | None) -> None:
        self.actor = actor
        self.stream = actor.told.options(num_returns="streaming").remote(source, threads)

    def send(self, order: Any) -> None:
        """Give it an order; where it has died, what it told last says so."""
        self.actor.give.remote(order)

    def kill(self) -> None:
        """End it at once."""
        import ray

        ray.kill(self.actor, no_restart=True)


class Actors:
    """The transport of ``tmbench.executors.workers`` within a Ray cluster."""

    def __init__(self, device: str | None = None, workers: int | None = None, address: str | None = None) -> None:
        """Join a cluster, or start one of this machine, and find out what it has.

        Args:
            device: as ``--device``; a GPU by its number is refused, as Ray chooses.
            workers: how many; None takes one for each GPU, and one on CPUs.
            address: of a running cluster, as ``ray.init`` takes it; None takes that of the environment, or starts one.

        Raises:
            UserError: Ray is not installed, no cluster answers, or it has not so many GPUs or CPUs.
        """
        kind, _, number = (device or "").partition(":")
        if number:
            raise UserError(f"--device {device} is one device, and Ray gives each worker its own: give --device {kind}")
        said = f"--address {address}" if address else f"{ADDRESS}={os.environ.get(ADDRESS)}"
        address = address or os.environ.get(ADDRESS)
        if address:
            _check_address(address, said)
        self.ray = _ray()
        if address:
            _check_cluster(address, said)
        self._join(address, said, workers or 1)
        has = {name: int(self.ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU")}
        unit = "GPU" if kind in ("", "cuda") and has["GPU"] else "CPU"
        if kind == "cuda" and unit == "CPU":
            raise UserError("--device cuda has no GPU in this Ray cluster: try --device cpu")
        if workers is not None and workers > has[unit]:
            there = counted(has[unit], unit)
            raise UserError(f"--workers {workers} is more than the {there} of this Ray cluster: give {has[unit]} or less")
        self.count = workers or (has["GPU"] if unit == "GPU" else 1)
        self._threads = None if unit == "GPU" else max(1, min(torch.get_num_threads(), has["CPU"]) // self.count)
        self._needs = {"num_gpus": 1} if unit == "GPU" else {"num_cpus": self._threads}
        self._device = "cuda" if unit == "GPU" else "cpu"

    def _join(self, address: str | None, said: str, cpus: int) -> None:
        own = {"num_cpus": max(cpus, os.cpu_count() or 1), "object_store_memory": STORE, "include_dashboard": False}
        try:
            self.ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **({} if address else own),
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = describe(error)
            if address:
                raise _not_joined(said, reason) from error
            raise UserError(f"Ray cannot be started here ({reason}): use --executor processes") from error

    def start(self, number: int, source: ModelSource) -> Handle:
        """Start a worker wherever Ray has room for it."""
        # One call tells as long as the actor lives, so orders need a second thread.
        actor = self.ray.remote(**self._needs, max_concurrency=2, max_restarts=0)(Actor).remote()
        return Handle(actor, replace(source, device=self._device), self._threads)

    def wait(self, handles: Sequence[Handle]) -> Sequence[tuple[Handle, Told]]:
        """What the workers tell that have told something first."""
        by_stream = {handle.stream: handle for handle in handles}
        streams, _ = self.ray.wait(list(by_stream), num_returns=1, fetch_local=False)
        return [(by_stream[stream], self._next(stream)) for stream in streams]

    def _next(self, stream: Any) -> Told:
        errors = self.ray.exceptions
        try:
            told: Told = self.ray.get(next(stream))
        except StopIteration:
            return Lost("without a word")
        except errors.RayError as error:
            # A whole page, of which this says what has happened.
            text = str(error)
            if missing := re.search(r"ModuleNotFoundError: (No module named '\w+')", text):
                raise UserError(
                    f"a Ray worker has not what this process has ({missing[1]}): install the same tmbench with pip in the "
                    "Python of every node, then start Ray there again"
                ) from error
            detail = re.search(r"Worker exit detail: (.+?)\. ", text)
            return Lost(detail[1] if detail else text.strip().splitlines()[-1])
        return told

    def close(self) -> None:
        """Leave the cluster; that of this machine alone ends with it."""
        self.ray.shutdown()


def _check_address(address: str, said: str) -> None:
    """Raise UserError for an address where nothing answers, for which Ray would wait minutes, or of Ray's client.

    ``said`` is how the user gave it: as ``--address``, or in the environment.
    """
    if "://" in address:
        raise UserError(f"{said} is of Ray's client, which no worker can tell through: give auto on a node")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"{said} does not answer ({error}): give that of a running Ray cluster") from error


def _check_cluster(address: str, said: str) -> None:
    """Raise UserError where no Ray cluster answers: ``auto`` is the last one of this machine, which may be long gone."""
    # In a process of its own: Ray's client can neither be interrupted nor told to be silent.
    asked = [sys.executable, "-c", JOIN, address]
    try:
        told = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWERS, check=False)
    except subprocess.TimeoutExpired as error:
        raise _not_joined(said, f"none answers within {ANSWERS:g} s") from error
    if told.returncode:
        lines = told.stderr.strip().splitlines() or [f"its client ended with code {told.returncode}"]
        raise _not_joined(said, shortened(lines[-1]))


def _not_joined(said: str, reason: str) -> UserError:
    return UserError(
        f"{said} has no Ray cluster that can be joined ({reason}): start one with ray start --head, set "
        "RAY_AUTH_MODE=token for one that asks for a token, or use --executor processes"
    )


def _ray() -> Any:
    """The package, told beforehand to print nothing and to report nothing; raises UserError where it is not installed."""
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray needs Ray, which is not installed: pip install 'tmbench[ray]'") from error
    return ray
