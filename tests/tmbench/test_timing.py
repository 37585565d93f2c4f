"""The device's time and the host's, told apart by benchmarks/timing.py, on a device that is made up."""

from __future__ import annotations

from functools import partial

import pytest
import torch

GPU = torch.cuda.is_available()


class Device:
    """A clock in milliseconds, a host that takes some of them to launch, and a queue that the device works off."""

    def __init__(self, queue=10**6, ghz=2.0):
        self.queue, self.ghz = queue, ghz
        self.now = self.free = 0.0
        self.ends = []
        self.sleeps = 0

    def launch(self, work, host):
        self.now += host
        left = [end for end in self.ends if end > self.now]
        if len(left) >= self.queue:
            self.now = left[-self.queue]
        self.free = max(self.free, self.now) + work
        self.ends.append(self.free)

    def synchronize(self):
        self.now = max(self.now, self.free)

    def _sleep(self, cycles):
        self.sleeps += 1
        self.launch(cycles / (1e6 * self.ghz), 0.0)

    def Event(self, *, enable_timing):  # noqa: N802
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.free, self.device.now)

    def query(self):
        return self.at <= self.device.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def timing(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import timing

    return timing


@pytest.fixture
def on(monkeypatch, timing):
    """Puts a device in the place of torch's."""

    def put(**about):
        device = Device(**about)
        for name in ("synchronize", "_sleep", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(device, name), raising=False)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: device.now / 1000)
        return device

    return put


def test_a_device_that_waits_for_launches_is_told_from_one_that_works(on, timing):
    device = on()
    runs = [partial(device.launch, work, 3.0) for work in (1.0, 1.0, 10.0)]
    wall, host = timing.wall_and_host_ms(lambda: [run() for run in runs], "cuda")
    assert (wall, host) == pytest.approx((19.0, 9.0))
    assert timing.queued_ms(runs, host, "cuda") == pytest.approx(12.0)
    assert timing.queued_each(runs, host, "cuda") == pytest.approx([1.0, 1.0, 10.0])
    assert device.sleeps == 2


def test_a_sleep_that_was_too_short_is_made_longer(on, timing):
    device = on(ghz=8.0)
    assert timing.queued_ms([partial(device.launch, 1.0, 3.0)] * 5, 15.0, "cuda") == pytest.approx(5.0)
    assert device.sleeps == 2


def test_a_queue_that_is_full_does_not_matter_while_the_device_has_work(on, timing):
    device = on(queue=4)
    assert timing.queued_ms([partial(device.launch, 5.0, 1.0)] * 20, 20.0, "cuda") == pytest.approx(100.0)
    assert device.sleeps == 1


def test_a_run_that_waits_for_the_device_has_no_time_of_its_own(on, timing):
    device = on()

    def run():
        device.launch(1.0, 1.0)
        device.synchronize()

    assert timing.queued_ms([run], 2.0, "cuda") is None
    assert device.sleeps == timing.MOST_SLEEPS


def test_a_processor_takes_the_time_that_its_runs_take(timing):
    wall, host = timing.wall_and_host_ms(partial(timing.time.sleep, 0.01), "cpu")
    assert wall >= 10
    assert host is None
    assert timing.queued_ms([partial(timing.time.sleep, 0.01)] * 2, None, "cpu") >= 20


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_gpu_tells_its_own_time_from_its_hosts(timing):
    # Sleeps are the device's own work, of about half a millisecond each.
    half = partial(torch.cuda._sleep, timing.CYCLES_OF_MS // 2)

    def slow():
        half()
        timing.time.sleep(0.005)

    slow()
    wall, host = timing.wall_and_host_ms(lambda: [slow() for _ in range(8)], "cuda")
    assert wall >= host >= 40
    assert 1 < timing.queued_ms([slow] * 8, host, "cuda") < 20

    def waiting():
        half()
        torch.cuda.synchronize()

    assert timing.queued_ms([waiting] * 2, 2.0, "cuda") is None
