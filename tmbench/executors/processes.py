"""Workers that are processes of this machine: one for each GPU, or so many on the CPU, each at the end of a pipe."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from tmbench.errors import UserError
from tmbench.executors.worker_loop import Lost, Told, serve
from tmbench.measure.spec import ModelSource
from tmbench.results.words import counted

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Process:
    """One worker."""

    def __init__(self, source: ModelSource, gpu: str | None, threads: int | None, words: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, other = spawn.Pipe()
        # Made here: a worker may die before it has opened it, and another may have written at this place before.
        words.write_bytes(b"")
        self.words = words
        # A daemon does not outlive this process.
        self.process = spawn.Process(target=_main, args=(other, source, gpu, threads, words), daemon=True)
        # Ctrl-C is for this process alone, which ends the workers. They inherit that they ignore it.
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
        try:
            self.process.start()
        finally:
            if main:
                signal.signal(signal.SIGINT, before)
        other.close()

    def send(self, order: Any) -> None:
        """Give it an order; where it has died, what it told last says so."""
        with suppress(OSError):
            self.pipe.send(order)

    def told(self) -> Told:
        """What it tells next, or how it ended."""
        try:
            told: Told = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return Lost(self._ended())
        return told

    def _ended(self) -> str:
        code = self.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        lines = [line for line in self.words.read_text(errors="replace").splitlines() if line.strip()]
        return how + (f" after it wrote {lines[-1].strip()!r}" if lines else "")

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Processes:
    """The transport of ``tmbench.executors.workers`` within one machine."""

    def __init__(self, device: str | None = None, workers: int | None = None) -> None:
        """Find out where workers can be.

        Args:
            device: as ``--device``; a GPU by its number is refused, as each worker has another.
            workers: how many; None takes one for each GPU, and one on the CPU.

        Raises:
            UserError: there are not so many GPUs, or none, or the device is one of them.
        """
        kind, _, number = (device or "").partition(":")
        if number:
            raise UserError(
                f"--device {device} is one device, and --executor gives each worker its own: give --device {kind}, and say "
                f"with {VISIBLE} which ones"
            )
        self._gpus = _visible() if kind in ("", "cuda") else []
        if kind == "cuda" and not self._gpus:
            raise UserError("--device cuda has no GPU here: try --device cpu")
        if self._gpus and (workers or 0) > len(self._gpus):
            many = counted(len(self._gpus), "GPU")
            raise UserError(f"--workers {workers} is more than the {many} here: give {len(self._gpus)} or less")
        self.count = workers or len(self._gpus) or 1
        self._threads = None if self._gpus else max(1, torch.get_num_threads() // self.count)
        self._folder = tempfile.TemporaryDirectory(prefix="tmbench-")

    def start(self, number: int, source: ModelSource) -> Process:
        """Start a worker on the GPU of this number."""
        gpu = self._gpus[number] if self._gpus else None
        return Process(source, gpu, self._threads, Path(self._folder.name) / f"worker-{number}.txt")

    def wait(self, handles: Sequence[Process]) -> Sequence[tuple[Process, Told]]:
        """What the workers tell that have told something first."""
        pipes: dict[Any, Process] = {handle.pipe: handle for handle in handles}
        return [(pipes[pipe], pipes[pipe].told()) for pipe in wait(list(pipes))]

    def close(self) -> None:
        """Forget what the workers wrote."""
        self._folder.cleanup()


def _visible() -> list[str]:
    """The GPUs that this process may use, as the variable names them; they are counted without being used."""
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    many = torch.cuda.device_count()
    return named[:many] if named else [str(number) for number in range(many)]


def _main(pipe: Connection, source: ModelSource, gpu: str | None, threads: int | None, words: Path) -> None:
    """What a worker's process does."""
    if gpu is not None:
        os.environ[VISIBLE] = gpu
    # What libraries print here would go through the driver's progress bar.
    sink = os.open(words, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(sink, stream.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    serve(source, threads, lambda: _or_exit(pipe.recv), lambda told: _or_exit(pipe.send, told))


def _end_with_parent() -> None:
    """A driver that was killed leaves no worker behind on its GPU, even in the midst of an item."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _or_exit(call: Any, *args: Any) -> Any:
    """What the call returns; where the driver has gone, this process has nothing left to do."""
    try:
        return call(*args)
    except (EOFError, OSError):
        raise SystemExit(1) from None
