"""Runs over several processes and over Ray's actors: the rows of one process, whoever is killed while they are measured."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from command_lines import PROGRAM
from plans import plan_of
from tmbench.executors.processes import Process, Processes
from tmbench.executors.worker_loop import Lost
from tmbench.executors.workers import Workers
from tmbench.measure.accuracy import AccuracySpec
from tmbench.measure.agree import AgreeSpec
from tmbench.measure.executor import InProcess
from tmbench.measure.loop import run
from tmbench.measure.loss import LossSpec
from tmbench.measure.probe import ProbeSpec
from tmbench.measure.spec import ModelSource, place
from tmbench.measure.sweep import SweepSpec, swept_plans
from tmbench.measure.ttft import TtftSpec
from tmbench.methods.layers import Budget
from tmbench.methods.spec import MethodSpec
from tmbench.results.rows import RulerRow
from tmbench.results.tables import read_all
from tmbench.suites.ruler import Ruler
from tmbench_kernels import Triangle

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
EXECUTORS = ["processes", pytest.param("ray", marks=needs_ray)]
RULER = ("ruler", "--method", "streaming", "--method", "streaming:n_local=64", "--length", "768", "--samples", "6",
         "--offline", "--task", "vt", "--task", "fwe", "--device", "cpu")  # fmt: skip
SAMPLES = 24
TIMES = {"time", "seconds_per_sample", "ttft_median_s", "ttft_min_s", "ttft_max_s", "samples_s", "ttft_over_floor",
         "floor_s", "matrix_rate_flops", "compile_s"}  # fmt: skip
"""The columns in which two measurements of the same differ."""
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    # A cluster of these tests lets in who knows this.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
}


def without_times(rows):
    return sorted(({name: value for name, value in asdict(row).items() if name not in TIMES} for row in rows), key=repr)


def start(*arguments, cwd, **streams):
    cwd.mkdir(exist_ok=True)
    return subprocess.Popen([*PROGRAM, *arguments], cwd=cwd, env=ENVIRONMENT, text=True, **streams)


def wait_for_samples(count, folder, process, seconds=200):
    deadline = time.monotonic() + seconds
    files = "results/*/ruler/predictions/*/*.jsonl"
    while sum(path.read_bytes().count(b"\n") for path in folder.glob(files)) < count:
        assert process.poll() is None, "it should not have ended yet"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(process):
    """The processes that measure for this one."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        name = " ".join(child.cmdline())
        if name.startswith("ray::Actor") or "spawn_main" in name:
            found.append(child)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(*RULER, cwd=folder).wait(200) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
def test_killed_drivers_and_killed_workers_leave_the_rows_of_an_undisturbed_run(executor, undisturbed, tmp_path):
    spread = ("--executor", executor, "--workers", "2")
    driver = start(*RULER, *spread, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_samples(3, tmp_path, driver)
    workers = workers_of(driver)
    assert len(workers) == 2
    driver.kill()
    driver.wait(60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "a worker does not outlive its driver"

    again = start(*RULER, *spread, "--json", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_samples(8, tmp_path, again)
    workers_of(again)[0].kill()
    out, err = again.communicate(timeout=250)
    assert again.returncode == 0, err
    assert "another takes its place" in err
    assert len(json.loads(out)) == 4, "nothing but rows on the standard output"

    def kept(folder):
        return {path.relative_to(folder): path.read_bytes().count(b"\n") for path in folder.rglob("*.jsonl")}

    assert kept(tmp_path) == kept(undisturbed), "nothing is measured twice"
    assert sum(kept(tmp_path).values()) == SAMPLES
    found, expected = (read_all(folder / "results", RulerRow) for folder in (tmp_path, undisturbed))
    assert without_times(found) == without_times(expected)


def test_a_worker_that_is_killed_before_it_writes_anything_is_lost_like_any_other(tmp_path):
    words = tmp_path / "worker-0.txt"
    for _ in range(2):
        worker = Process(ModelSource("tiny", device="cpu"), None, 1, words)
        worker.process.kill()
        assert worker.told() == Lost("killed by SIGKILL")
        worker.kill()
        words.write_text("what the one before has written")


@pytest.mark.slow
def test_every_measurement_makes_the_rows_of_one_process(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here, there = InProcess(), Workers(Processes("cpu", 2))
    source = ModelSource("tiny", device="cpu")
    try:
        assert there.open(source).row_fields() == here.open(source).row_fields()
        assert there.open(source).model.device.type == "meta", "this process holds no weights"
        assert there.ask(place) == here.ask(place)
        for one, other in zip(_specs(here, tmp_path / "here"), _specs(there, tmp_path / "there"), strict=True):
            expected, found = run(one, here), run(other, there)
            assert [_about(row) for row in found] == [_about(row) for row in expected], "in the same order"
            assert without_times(found) == without_times(expected)
    finally:
        there.close()
        torch.set_num_threads(threads)


def _about(row):
    return type(row), row.method, row.length, getattr(row, "task", ""), row.parameters


def _specs(executor, root):
    about = executor.ask(place) | {"root": root}
    shape = executor.open(about["model"]).shape
    window: dict[str, Any] = {"n_init": 3, "n_local": 7, "last_n": 5}
    plans = [plan_of(shape, name, **window) for name in ("dense", "streaming")]
    accuracy = AccuracySpec(
        **about, plans=plans, lengths=(700, 600), suite=Ruler(offline=True), tasks=("niah_single_1", "vt"), samples=2
    )
    yield accuracy
    yield AgreeSpec(**about, plans=plans, lengths=(64,), samples=3, new_tokens=4)
    asked = about | {"lengths": (600,), "tasks": ("vt", "kv"), "samples": 2}
    yield LossSpec(**asked, plans=plans)
    yield ProbeSpec(**asked, budget=Budget(0.3), window=Triangle(**window))
    swept = swept_plans([MethodSpec.of("tri_mix", window | {"last_n": last}) for last in (5, 0)], shape, 600)
    ttft = TtftSpec(**about, plans=(), lengths=(), repeats=1)
    yield SweepSpec(**about, plans={600: swept}, ttft=ttft, accuracy=replace(accuracy, tasks=("vt",), samples=1))


@pytest.mark.slow
def test_ctrl_c_ends_the_workers(tmp_path):
    driver = start(*RULER, "--executor", "processes", "--workers", "2", cwd=tmp_path, stderr=subprocess.PIPE)
    wait_for_samples(1, tmp_path, driver)
    workers = workers_of(driver)
    # As a terminal does, to all of them.
    for one in (*workers, driver):
        one.send_signal(2)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "Traceback" not in err
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.slow
@needs_ray
def test_a_ray_worker_without_the_package_is_one_sentence(tmp_path):
    """A cluster of the bare interpreter, which finds Ray and the other packages, and not tmbench."""
    import ray

    port = "23911"
    interpreter: Any = sys._base_executable  # type: ignore[attr-defined]
    paths = {str(Path(module).parents[1]) for module in (ray.__file__, psutil.__file__)}
    head = subprocess.Popen(
        [interpreter, "-m", "ray.scripts.scripts", "start", "--head", "--port", port, "--num-cpus", "1", "--block",
         "--include-dashboard=false"],
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}, cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert head.stdout is not None
        assert any("Ray runtime started" in line for line in head.stdout)
        run = start(*RULER, "--executor", "ray", "--address", f"127.0.0.1:{port}", cwd=tmp_path, stderr=subprocess.PIPE)
        _, err = run.communicate(timeout=120)
        assert run.returncode == 2
        assert "a Ray worker has not what this process has (No module named 'tmbench'): install the same tmbench" in err
        assert "Traceback" not in err
    finally:
        head.terminate()
        head.wait(60)


def refused(tmbench, *arguments):
    code, out, err = tmbench(*arguments)
    assert (code, out) == (2, "")
    (line,) = (line for line in err.splitlines() if line.startswith("Error: "))
    assert "Traceback" not in err
    return line.removeprefix("Error: ")


def test_ray_that_is_not_installed_is_one_sentence_with_its_remedy(tmbench, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    line = refused(tmbench, "agree", "--executor", "ray")
    assert line == "--executor ray needs Ray, which is not installed: pip install 'tmbench[ray]'"


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("by_environment", [False, True])
def test_an_address_where_no_ray_answers_is_one_sentence(by_environment, tmbench, monkeypatch):
    from tmbench.executors import ray_actors

    monkeypatch.setattr(ray_actors, "ANSWERS", 8)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = there = f"127.0.0.1:{silent.getsockname()[1]}"
        if by_environment:
            # As a cluster that has gone: auto is looked up, and leads to nothing.
            monkeypatch.setenv("RAY_ADDRESS", there)
            address = "auto"
        line = refused(tmbench, "agree", "--executor", "ray", "--address", address)
    assert line.startswith(f"--address {address} has no Ray cluster that can be joined (none answers within 8 s): start one")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "RAY_ADDRESS=127.0.0.1:1 does not answer (["),
        ("ray://there:10001", "RAY_ADDRESS=ray://there:10001 is of Ray's client"),
        pytest.param(
            "there", "RAY_ADDRESS=there has no Ray cluster that can be joined", marks=[needs_ray, pytest.mark.slow]
        ),
    ],
)
def test_an_address_of_the_environment_is_named_as_such(address, sentence, tmbench, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refused(tmbench, "probe", "--executor", "ray").startswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--workers", "2"), "--workers says how many workers --executor has, which is not given: leave it out"),
        (("--executor", "processes", "--address", "auto"), "--address is the cluster of --executor ray: leave it out"),
        (("--executor", "processes", "--device", "cuda:1"), "--device cuda:1 is one device, and --executor gives each"),
        (("--executor", "ray", "--device", "cuda:1"), "--device cuda:1 is one device, and Ray gives each worker its own"),
        (("--executor", "ray", "--address", "127.0.0.1:1"), "--address 127.0.0.1:1 does not answer (["),
        (("--executor", "ray", "--address", "ray://there:10001"), "--address ray://there:10001 is of Ray's client"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(arguments, sentence, tmbench):
    assert refused(tmbench, "probe", *arguments).startswith(sentence)


def test_more_workers_than_gpus_are_refused(monkeypatch):
    from tmbench.errors import UserError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(UserError, match="--workers 3 is more than the 2 GPUs here: give 2 or less"):
        Processes("cuda", 3)
    assert Processes(None).count == 2
    assert Processes("cuda")._gpus == ["4", "7"]
    assert Processes("cpu", 3).count == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Processes(None).count == 1
    with pytest.raises(UserError, match="--device cuda has no GPU here"):
        Processes("cuda")


def test_ttft_is_not_spread(tmbench):
    line = refused(tmbench, "ttft", "--executor", "processes")
    assert "--executor does not go with ttft, whose methods are interleaved on one device" in line
