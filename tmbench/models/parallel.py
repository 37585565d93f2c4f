"""The ranks of a run that ``torchrun`` started, one process a GPU, and what they tell each other beside the model's sums.

This is the only place that reads torchrun's environment. Without torchrun there is one rank, and all this costs nothing.
What passes between ranks goes through the CPU, in a group of its own: a rank that waits for the next order disturbs no GPU.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tmbench.errors import UserError

if TYPE_CHECKING:
    import torch

PATIENCE = 30.0
"""Seconds that the others are given to come to where a rank has failed: out of memory they all are within moments."""
LEAVING = 5.0
"""Seconds that a rank whose run has failed, or was stopped, is given to take leave of the others."""
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""The exit codes of a program that Ctrl-C or SIGTERM has ended."""
_FOR_EVER = timedelta(days=365)
"""Samples may be prepared for hours; a process that dies is torchrun's to see."""


class OtherRankError(RuntimeError):
    """Another rank has failed in what this one is still at."""


class GoneError(RuntimeError):
    """Another rank can no longer be told anything."""


@dataclass
class _Ranks:
    rank: int
    size: int
    control: Any
    """The group of what is told, which goes through the CPU."""
    store: Any
    watched: Any
    """A connection of its own to the store, for the thread that watches."""
    asked: int = 0
    """How many exchanges have begun."""
    done: int = 0
    """How many have ended."""
    stopped: threading.Event = field(default_factory=threading.Event)
    watch: threading.Thread | None = None
    """Of rank 0: sees to it that no rank waits for one that has failed."""


_HERE: _Ranks | None = None
_LAST_WORD = threading.Lock()
"""Held by the thread that ends the run, so that it ends with one sentence."""


def launched() -> bool:
    """Whether torchrun started this process beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Which of the ranks this process is, from 0."""
    return 0 if _HERE is None else _HERE.rank


def size() -> int:
    """How many ranks share the model."""
    return 1 if _HERE is None else _HERE.size


def device(place: torch.device) -> torch.device:
    """The device of this rank, of that type; raises UserError for a numbered GPU, and where there are fewer than ranks."""
    import torch

    if size() == 1 or place.type != "cuda":
        return place
    if place.index is not None:
        raise UserError(f"--device {place} is one GPU, and torchrun gives every process its own: leave the number out")
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    if here > there:
        raise UserError(f"--nproc-per-node {here} needs as many GPUs, and there are {there}: give {there} or fewer")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def start() -> None:
    """Meet the other ranks."""
    global _HERE
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available() and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_FOR_EVER)
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    connect: Any = dist.TCPStore  # type: ignore[attr-defined]
    store, watched = (connect(*where, is_master=False, timeout=_FOR_EVER) for _ in range(2))
    control = dist.new_group(backend="gloo", timeout=_FOR_EVER)
    _HERE = _Ranks(dist.get_rank(), dist.get_world_size(), control, store, watched)
    _heed_signals()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if _HERE.rank == 0:
        _HERE.watch = threading.Thread(target=_watch, args=(_HERE,), daemon=True)
        _HERE.watch.start()


def leaving(code: int, reason: str) -> None:
    """Say that this rank ends with this exit code, and why: torchrun's report has the reason, which "" leaves to it.

    From here on SIGTERM is not heeded, by which torchrun ends those ranks that have not yet ended like the first. Where it
    is a failure, others may still be within a layer: this rank does not wait for them for ever.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _LAST_WORD.acquire()
    if reason:
        _report(reason)
    if code:
        last = threading.Timer(LEAVING, _exit, (code,))
        last.daemon = True
        last.start()


def stop() -> None:
    """Leave the others."""
    global _HERE
    import torch.distributed as dist

    if _HERE is not None:
        _HERE.stopped.set()
        if _HERE.watch is not None:
            # A thread that is still in torch's code when the interpreter ends makes it abort.
            _HERE.watch.join(LEAVING)
        _HERE = None
        dist.destroy_process_group()


def send(order: Any) -> None:
    """Rank 0 gives all others an order, which pickles."""
    _broadcast([order])


def receive() -> Any:
    """The next order of rank 0."""
    return _broadcast([None])[0]


def _broadcast(orders: list[Any]) -> list[Any]:
    import torch.distributed as dist

    assert _HERE is not None, "there is one rank"
    with _reaching():
        dist.broadcast_object_list(orders, src=0, group=_HERE.control)
    return orders


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # gloo begins with a line of its own source, and goes on with advice.
        why = re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split())).partition(". ")[0]
        raise GoneError(f"another of {size()} processes cannot be reached ({why})") from error


def exchanged(value: Any, trouble: str = "", *, ended: bool = False) -> list[Any]:
    """What each rank has to say, by rank: all of them call this at the same point of their work.

    ``ended`` where a piece of work has ended, with ``trouble``, the reason, where it failed. A rank that is still within the
    work then raises OtherRankError, and comes to its end too. One that waits inside of a layer cannot: rank 0 then ends the
    run with one sentence. What was kept until then stays.
    """
    if _HERE is None:
        return [value]
    import torch.distributed as dist

    while True:
        _HERE.asked += 1
        said: list[Any] = [None] * _HERE.size
        with _reaching():
            if trouble:
                _HERE.store.set(_key(_HERE.asked), f"rank {_HERE.rank} of {_HERE.size} failed, {trouble}")
            dist.all_gather_object(said, (ended, value, trouble), group=_HERE.control)
        _HERE.done += 1
        if all(one[0] == ended for one in said):
            return [one[1] for one in said]
        if not ended:
            where = next(rank for rank, one in enumerate(said) if one[0])
            why = said[where][2] or "it is no longer at the same place"
            raise OtherRankError(f"rank {where} of {_HERE.size} failed, {why}")


def summed(value: Any) -> Any:
    """The sum of a number over all ranks."""
    return value if _HERE is None else sum(exchanged(value))


def end(reason: str, code: int = 1) -> NoReturn:
    """End the run in the middle, with one sentence, where the ranks cannot go on together; torchrun ends the others."""
    _LAST_WORD.acquire()
    try:
        if rank() == 0:
            # A progress bar has hidden it.
            cursor = "\033[?25h" if sys.stderr.isatty() else ""
            print(f"{cursor}Error: {reason}; what was measured before is kept", file=sys.stderr, flush=True)
            _report(reason)
        else:
            # Rank 0 is to say it first.
            time.sleep(PATIENCE)
    finally:
        _exit(code)


def _exit(code: int) -> NoReturn:
    """Leave, also where nobody reads any more what is written."""
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def _report(reason: str) -> None:
    """Tell torchrun why this rank ends: it shows that in its report, in which a sentence before it is soon out of sight."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}
        # It was said before: a full disk is no reason to stay.
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": about}), encoding="utf-8")


def _heed_signals() -> None:
    """Have Ctrl-C and torchrun's SIGTERM end every rank, whatever it waits for, and rank 0 say so."""
    if rank() > 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        return
    # A handler runs when the main thread is back from torch, which may wait for another rank that has ended.
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    os.register_at_fork(after_in_child=_as_before)
    threading.Thread(target=_end_on_signal, args=(heard,), daemon=True).start()


def _as_before() -> None:
    """Have SIGTERM end a process that this rank has forked, and tell this rank nothing."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with(parent: int) -> None:
    """End this rank when torchrun has died, which then ends none, so that no GPU stays taken: the thread that sees to it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    if rank() == 0:
        end("torchrun has died, and its processes end with it")
    # Rank 0 is to say it, and not that this one has gone.
    time.sleep(LEAVING)
    _exit(1)


def _interrupt(number: int, frame: Any) -> None:
    # torchrun passes on what the terminal has sent already.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_on_signal(heard: int) -> None:
    """End this rank when a signal wants it to: the thread of rank 0 that sees to it."""
    while True:
        (number,) = os.read(heard, 1)
        if number == signal.SIGTERM:
            end("torchrun has ended this run, as another process has gone or it was told to", TERMINATED)
        if number == signal.SIGINT:
            # The main thread is given time to end as one process does.
            time.sleep(LEAVING)
            end("the run was interrupted", INTERRUPTED)


def _key(number: int) -> str:
    return f"tmbench/trouble/{number}"


def _watch(ranks: _Ranks) -> None:
    """Let no rank wait for one that has failed: the thread of rank 0 that sees to it."""
    since: float | None = None
    while not ranks.stopped.wait(1.0):
        done = ranks.done
        try:
            failed = ranks.watched.check([_key(done + 1)])
        except RuntimeError:
            # The store goes with torchrun.
            return
        if not failed:
            since = None
        elif since is None:
            since = time.monotonic()
        elif time.monotonic() - since > PATIENCE and ranks.done == done:
            end(f"{ranks.watched.get(_key(done + 1)).decode()}, and the others wait for it")
