"""Workers that come and go: what is measured again, what fails, and what ends the run. They are threads here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Barrier, Event, Lock, Thread, current_thread
from time import sleep
from typing import Any, ClassVar

import pytest

from tmbench.errors import UserError
from tmbench.executors.worker_loop import Answer, Lost, Ready, serve
from tmbench.executors.workers import Workers, _Jobs, _Worker
from tmbench.measure.executor import Message, work
from tmbench.measure.spec import Item, ItemSpec, ModelSource
from tmbench.models import loading
from tmbench.models.loading import LoadedModel

TINY = ModelSource("tiny", device="cpu")


@pytest.fixture(autouse=True)
def loads(monkeypatch):
    """Transformers loads one model at a time, and threads of one process may share it."""
    real, lock, there = loading.load, Lock(), {}

    def load(name, **how):
        with lock:
            key = name, how["plan_only"]
            if key not in there:
                there[key] = real(name, **how)
            return there[key]

    monkeypatch.setattr(loading, "load", load)


class Handle:
    def __init__(self, number):
        self.number = number
        self.orders: SimpleQueue[Any] = SimpleQueue()

    def send(self, order):
        self.orders.put(order)

    def kill(self):
        # It is heard no more, and waits for ever.
        pass


class Threads:
    """A transport whose workers are threads of this process; one dies of a SystemExit."""

    def __init__(self, count=2, change=lambda number, told: told):
        self.count = count
        self.change = change
        self.heard: SimpleQueue[Any] = SimpleQueue()
        self.started: list[int] = []

    def start(self, number, source):
        handle = Handle(number)
        self.started.append(number)

        def tell(told):
            self.heard.put((handle, self.change(number, told)))

        def work():
            with suppress(SystemExit):
                serve(source, None, handle.orders.get, tell)
            tell(Lost("killed by SIGTEST"))

        Thread(target=work, daemon=True).start()
        return handle

    def wait(self, handles):
        while True:
            handle, told = self.heard.get(timeout=60)
            if handle in handles:
                return [(handle, told)]

    def close(self):
        pass


@dataclass(frozen=True)
class Sample:
    index: int
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ToySpec(ItemSpec):
    """Items that are measured as ``deadly`` and ``held`` say."""

    log: list = field(default_factory=list)
    """What was begun: how many items its worker held then, itself included, and its index."""
    deadly: dict = field(default_factory=dict)
    """How many workers an item kills before one lives, by its index."""
    calls: list[list[int]] = field(default_factory=list)
    """What was begun in each call of ``measure_all``."""
    held: int = 1
    """How many items a worker holds at a time."""
    keeps_first: bool = False
    """Whether a worker keeps the sample before it dies."""
    lock: Lock = field(default_factory=Lock)

    def check(self, loaded):
        pass

    def parts(self, loaded):
        return iter(())

    def measure(self, item, worker):
        if self.keeps_first:
            worker.keep(Sample(item.index))
        with self.lock:
            if self.deadly.get(item.index, 0) > 0:
                self.deadly[item.index] -= 1
                raise SystemExit
        if not self.keeps_first:
            worker.keep(Sample(item.index))

    def measure_all(self, given):
        holding: list[Any] = []
        more = iter(given)
        begun: list[int] = []
        self.calls.append(begun)
        while True:
            while len(holding) < self.held and (one := next(more, None)):
                holding.append(one)
                self.log.append((len(holding), one[0].index))
                begun.append(one[0].index)
            if not holding:
                return
            for item, worker in holding:
                self.measure(item, worker)
                worker.end(None)
            holding.clear()


def run(transport, spec, items, say=lambda text: None, hear=lambda message: None):
    """The samples by index, and the failures by the item's number."""
    samples, failures, ended = [], {}, []

    def tell(message: Message):
        if message.sample is not None:
            samples.append(message.sample.index)
        if message.ended:
            ended.append(message.number)
            if message.failure:
                failures[message.number] = message.failure.error
        hear(message)

    executor = Workers(transport, say)
    executor.open(TINY)
    executor.run(spec, ((number, Item(title=f"item {number}", index=number)) for number in range(items)), tell)
    executor.close()
    assert sorted(ended) == list(range(items)), "each ends, and once"
    return sorted(samples), failures


def test_every_item_is_measured_once():
    spec = ToySpec(model=TINY, held=3)
    assert run(Threads(3), spec, 20) == (list(range(20)), {})
    assert sorted(index for _, index in spec.log) == list(range(20))


def test_what_a_lost_worker_held_is_measured_again_each_item_alone():
    spec = ToySpec(model=TINY, held=4, deadly={1: 1})
    said: list[str] = []
    assert run(Threads(1), spec, 6, said.append) == (list(range(6)), {})
    again = [(held, index) for held, index in spec.log[4:] if index in (1, 2, 3)]
    assert again == [(1, 1), (1, 2), (1, 3)]
    assert said == ["worker 0 ended, killed by SIGTEST: another takes its place, and 3 items will be measured again"]


def test_an_item_that_ends_two_workers_fails_and_those_beside_it_do_not():
    spec = ToySpec(model=TINY, held=4, deadly={2: 9})
    samples, failures = run(Threads(2), spec, 8)
    assert samples == [0, 1, 3, 4, 5, 6, 7]
    assert failures == {2: "2 workers ended while measuring it, the last one killed by SIGTEST"}
    assert spec.deadly == {2: 7}


def turns_of(spec, workers, jobs):
    """Measures them; the indices that each call of ``measure_all`` began, by turn."""
    ended = []
    executor = Workers(Threads(workers))
    executor.open(TINY)
    executor.run(spec, iter(jobs), lambda message: ended.append(message.number) if message.ended else None)
    executor.close()
    assert sorted(ended) == [job[0] for job in jobs], "each ends, and once"
    return [call for call in spec.calls if call]


@pytest.mark.parametrize("held", [1, 2, 5])
def test_the_items_of_one_turn_go_to_one_worker(held):
    jobs = [(number, Item(title="", index=number, turn=(number // 3,))) for number in range(48)]
    calls = turns_of(ToySpec(model=TINY, held=held), 3, jobs)
    for first in range(0, 48, 3):
        (own,) = [call for call in calls if first in call]
        assert [index for index in own if index // 3 == first // 3] == [first, first + 1, first + 2]


def test_what_a_lost_worker_was_to_be_given_next_is_measured_by_others():
    given = _Jobs(iter([(number, Item(title="", index=number, turn=(number // 3,))) for number in range(4)]))
    lost, other, *others = (_Worker(number, Handle(number)) for number in range(4))
    numbers = [job and job[0] for job in map(given.next_for, (lost, other))]
    assert numbers == [0, 3], "the two between are the first one's"
    given.left(lost)
    assert given.more
    assert [job and job[0] for job in map(given.next_for, others)] == [1, 2]


def test_a_worker_measures_all_that_it_is_given_in_one_go():
    """What it holds, such as texts that decode together, it need not end before there is no more."""
    spec = ToySpec(model=TINY, held=4)
    run(Threads(2), spec, 40)
    assert len([call for call in spec.calls if call]) <= 2
    spec = ToySpec(model=TINY, held=4, deadly={3: 1, 16: 1})
    run(Threads(2), spec, 40)
    assert [3] in spec.calls
    assert [16] in spec.calls, "but for what is measured again"


def test_a_sample_that_was_kept_is_not_measured_again():
    spec = ToySpec(model=TINY, keeps_first=True, deadly={0: 1})
    assert run(Threads(1), spec, 3) == ([0, 1, 2], {})
    assert [index for _, index in spec.log] == [0, 1, 2]


def test_a_place_at_which_no_worker_loads_is_given_up_and_the_others_go_on():
    ready, said, given_up = [], [], Event()

    def change(number, told):
        if number == 1 and isinstance(told, Ready):
            ready.append(told)
            return told if len(ready) == 1 else Lost("its GPU has gone")
        return told

    def say(text):
        said.append(text)
        if len(said) == 2:
            given_up.set()

    class Gated(ToySpec):
        def measure(self, item, worker):
            assert item.index < 5 or given_up.wait(60)
            super().measure(item, worker)

    transport = Threads(2, change)
    executor = Workers(transport, say)
    executor.open(TINY)
    while not ready:
        executor._listen()
    (gone,) = (worker.handle for worker in executor._workers if worker.number == 1)
    transport.heard.put((gone, Lost("killed by SIGTEST")))
    ended = []
    jobs = ((number, Item(title="", index=number)) for number in range(20))
    executor.run(Gated(model=TINY), jobs, lambda message: ended.append(message.number) if message.ended else None)
    assert sorted(ended) == list(range(20))
    assert transport.started == [0, 1, 1]
    assert said[0].startswith("worker 1 ended, killed by SIGTEST: another takes its place")
    assert said[1] == "worker 1 ended, its GPU has gone, as the one before: the others go on"


def test_a_worker_that_is_lost_before_any_has_loaded_is_replaced():
    lost: list[int] = []

    def change(number, told):
        if isinstance(told, Ready) and not lost:
            lost.append(number)
            return Lost("killed by SIGTEST")
        return told

    transport = Threads(1, change)
    said: list[str] = []
    assert run(transport, ToySpec(model=TINY), 5, said.append) == ([0, 1, 2, 3, 4], {})
    assert transport.started == [0, 0]
    assert said == ["worker 0 ended, killed by SIGTEST: another takes its place"]


def test_a_model_that_ends_every_worker_is_given_up():
    transport = Threads(2, lambda number, told: Lost("killed by SIGTEST"))
    with pytest.raises(UserError, match="^no worker can load tiny: the last one ended, killed by SIGTEST$"):
        Workers(transport).open(TINY)
    assert len(transport.started) == 4, "each place is tried twice"


def test_no_worker_that_is_left_ends_the_run_and_keeps_what_was_measured():
    loads = []

    def change(number, told):
        if isinstance(told, Ready):
            loads.append(number)
        return told if len(loads) == 1 else Lost("its GPU has gone")

    samples = []
    with pytest.raises(
        UserError, match="no worker is left, the last one ended, its GPU has gone: what was measured is kept"
    ):
        run(Threads(1, change), ToySpec(model=TINY, deadly={3: 1}), 5, hear=lambda message: samples.append(message.sample))
    assert [sample.index for sample in samples if sample] == [0, 1, 2]


def test_workers_that_would_make_other_rows_are_refused():
    def change(number, told):
        return Ready(told.source, told.facts | {"torch": f"2.{number}"}) if isinstance(told, Ready) else told

    with pytest.raises(UserError, match=r"the workers differ in torch, which is 2\.[01] for worker [01] and 2\.[01] for"):
        run(Threads(2, change), ToySpec(model=TINY), 200)


def test_a_sentence_of_a_worker_ends_the_run():
    class Refusing(ToySpec):
        def measure(self, item, worker):
            raise UserError("leave it out")

    with pytest.raises(UserError, match="^leave it out$"):
        run(Threads(2), Refusing(model=TINY), 4)


def test_what_was_given_out_before_a_job_that_cannot_be_made_is_measured():
    def jobs():
        yield from ((number, Item(title=f"item {number}", index=number)) for number in range(3))
        raise UserError("move the file away")

    told: list[Message] = []
    executor = Workers(Threads(1))
    executor.open(TINY)
    with pytest.raises(UserError, match="^move the file away$"):
        executor.run(ToySpec(model=TINY, held=4, deadly={1: 1}), jobs(), told.append)
    executor.close()
    assert [message.number for message in told if message.ended] == [0, 1, 2]
    told.clear()
    with pytest.raises(UserError, match="^move the file away$"):
        work(ToySpec(model=TINY, held=4), jobs(), loading.load("tiny", device="cpu", plan_only=True), told.append)
    assert [message.number for message in told if message.ended] == [0, 1, 2], "in one process too"


def test_a_model_that_cannot_be_loaded_is_said_once():
    with pytest.raises(UserError, match=r"^--model ./nothing-here cannot be loaded"):
        Workers(Threads(2)).open(ModelSource("./nothing-here", device="cpu"))


@pytest.mark.parametrize("lost", [1, 2])
def test_another_worker_is_asked_about_the_model_where_one_is_lost(lost):
    left = [lost]

    def change(number, told):
        if isinstance(told, Answer) and left[0]:
            left[0] -= 1
            return Lost("killed by SIGTEST")
        return told

    executor = Workers(Threads(1, change))
    loaded = executor.open(TINY)
    if lost == 1:
        assert executor.ask(_rows_of) == loaded.row_fields()
    else:
        with pytest.raises(UserError, match="^no worker is left, the last one ended, killed by SIGTEST: .+ run again$"):
            executor.ask(_rows_of)


def test_all_workers_are_asked_at_once_and_before_they_measure():
    both = Barrier(2, timeout=60)
    answered: list[Thread] = []  # by whom
    before: list[int] = []  # how many of them a worker had answered when it measured

    def waits(loaded):
        if not answered:
            both.wait()
        answered.append(current_thread())

    class Logging(ToySpec):
        def measure(self, item, worker):
            before.append(answered.count(current_thread()))
            super().measure(item, worker)

    executor = Workers(Threads(2))
    executor.open(TINY)
    for _ in range(3):
        executor.ask(waits)
    ended = []
    jobs = ((number, Item(title="", index=number)) for number in range(20))
    spec = Logging(model=TINY, deadly={7: 1})
    executor.run(spec, jobs, lambda message: ended.append(message.number) if message.ended else None)
    executor.close()
    assert sorted(ended) == list(range(20))
    assert set(before) == {3}, "one that takes another's place too"


def test_times_are_taken_once_every_worker_is_ready():
    first, answered, seen = Lock(), [], []

    def slowly(loaded):
        if not first.acquire(blocking=False):
            sleep(1)
        answered.append(current_thread())

    class Timing(ToySpec):
        undisturbed: ClassVar[bool] = True

        def measure(self, item, worker):
            seen.append(len(answered))
            super().measure(item, worker)

    executor = Workers(Threads(2))
    executor.open(TINY)
    executor.ask(slowly)
    executor.run(Timing(model=TINY), ((number, Item(title="", index=number)) for number in range(3)), lambda message: None)
    executor.close()
    assert seen == [2, 2, 2]


def test_the_driver_has_no_weights_and_another_model_is_refused():
    executor = Workers(Threads(1))
    loaded = executor.open(TINY)
    assert loaded.model.device.type == "meta"
    assert isinstance(executor.ask(_rows_of), dict)
    assert executor.ask(_rows_of) == loaded.row_fields()
    assert executor.open(ModelSource("tiny", "checkpoint", "cpu", "float32")) is loaded
    with pytest.raises(ValueError, match="this executor holds"):
        executor.open(ModelSource("other"))


def _rows_of(loaded: LoadedModel):
    return loaded.row_fields()
