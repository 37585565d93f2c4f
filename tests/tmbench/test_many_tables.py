"""Tables of several GPUs and of batches: figures are those of rows, and runs are held against the same on one GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from report_rows import add_ttft, tables_of

RUN = {"status": "ok", "model": "a/model", "device": "gpu", "method": "dense", "length": "32768", "samples": "80"}


@pytest.fixture
def made(monkeypatch, pytestconfig, tmp_path):
    """The lines of a table of the rows in a folder, or of these lines of a CSV."""
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import many_tables
    import sources

    def table(name, lines=None):
        given = sources.Sources(many_rows=tmp_path, batch_rows=tmp_path)
        if lines is not None:
            given = SimpleNamespace(lines=lambda path: lines)
        (found,) = tables_of(many_tables.MANY[name](given) + "\n")
        return found

    return table


def figures(lines, *names):
    return [tuple(line[name] for name in names) for line in lines]


def test_models_that_are_split_stand_beside_the_same_on_one_gpu(made, tmp_path):
    for gpus, dense, tri_mix in ((1, 10.0, 8.0), (2, 6.0, 4.0)):
        about = {"length": 65536, "tensor_parallel_size": gpus, "matrix_rate_flops": 1e12, "ttft_over_floor": 1.234}
        add_ttft(tmp_path, "dense", seconds=dense, **about)
        add_ttft(tmp_path, "tri_mix", seconds=tri_mix, **about)
    add_ttft(tmp_path, "dense", 131072, 13.0, tensor_parallel_size=2, matrix_rate_flops=2e12)
    add_ttft(tmp_path, "dense", 65536, 1.0, model="another/model")
    found = made("tensor-parallel")
    assert figures(found, "GPUs", "tokens", "method", "TTFT, s", "over roofline", "times one GPU's speed") == [
        ("1", "64K", "dense", "10.0", "1.23", "-"),
        ("1", "64K", "tri_mix", "8.00", "1.23", "-"),
        ("2", "64K", "dense", "6.00", "1.23", "1.67"),
        ("2", "64K", "tri_mix", "4.00", "1.23", "2.00"),
        ("2", "128K", "dense", "13.0", "-", "-"),
    ]
    assert [line["against dense"].split(" %")[0] for line in found] == ["-", "-20.0", "-", "-33.3", "-"]


def test_prompts_that_are_split_say_how_long_they_wait_for_other_gpus(made, tmp_path):
    add_ttft(tmp_path, "dense", 65536, 8.0)
    add_ttft(tmp_path, "dense", 65536, 5.0, context_parallel_size=2, communication_s=0.25)
    found = made("context-parallel")
    assert figures(found, "GPUs", "TTFT, s", "waits for GPUs", "times one GPU's speed") == [
        ("1", "8.00", "-", "-"),
        ("2", "5.00", "5.0%", "1.60"),
    ]


def test_other_prompts_or_prefills_are_no_measure_of_the_speed_of_one_gpu(made, tmp_path):
    add_ttft(tmp_path, "dense", 65536, 8.0, prefill="eager")
    add_ttft(tmp_path, "dense", 65536, 5.0, context_parallel_size=2, prefill="compiled")
    assert figures(made("context-parallel"), "GPUs", "times one GPU's speed") == [("2", "-")]


def test_batches_stand_in_order_with_their_tokens_and_their_memory(made, tmp_path):
    for size, seconds, peak in ((16, 16.0, 40), (1, 1.0, 20), (4, 3.2, None)):
        about = {"batch_size": size, "peak_memory_bytes": peak and peak * 2**30, "matrix_rate_flops": 1e12}
        add_ttft(tmp_path, "dense", 8192, seconds, **about)
        add_ttft(tmp_path, "tri_mix", 8192, seconds / 2, **about)
    found = made("batches")
    assert figures(found, "method", "prompts", "TTFT, s", "tokens/s", "peak GiB") == [
        ("dense", "1", "1.00", "8,192", "20.0"),
        ("dense", "4", "3.20", "10,240", "-"),
        ("dense", "16", "16.0", "8,192", "40.0"),
        ("tri_mix", "1", "0.500", "16,384", "20.0"),
        ("tri_mix", "4", "1.60", "20,480", "-"),
        ("tri_mix", "16", "8.00", "16,384", "40.0"),
    ]
    assert {line["against dense"].split(" %")[0] for line in found} == {"-", "-50.0"}


def run_of(workers, seconds, begun, **changes):
    about = {"executor": "processes", "round": "1", "workers": str(workers), "seconds": str(seconds), "same_scores": "yes"}
    about |= {"samples_per_minute": str(60 * 80 / seconds), "begun_samples_per_minute": str(begun)}
    return RUN | about | changes


def test_workers_are_held_against_one_of_the_same_round(made):
    lines = [run_of(1, 100, 60), run_of(2, 60, 120), run_of(1, 120, 64, round="2"), run_of(2, 60, 116, round="2")]
    lines += [run_of(2, 64, 114, executor="ray"), run_of(2, 1, 1, status="timed out", same_scores="")]
    found = made("workers", lines)
    names = ("executor", "workers", "command, s", "samples a minute", "once begun")
    assert [tuple(line[name] for name in names) for line in found] == [
        ("processes", "1", "110", "44.0", "62.0"),
        ("processes", "2", "60.0", "80.0", "118"),
        ("ray", "2", "64.0", "75.0", "114"),
    ]
    assert [line["times one worker's"] for line in found] == ["1.00", "1.81 to 2.00", "1.90"]


def test_workers_are_held_against_one_of_their_own_executor_where_there_is_one(made):
    lines = [run_of(1, 100, 60), run_of(2, 64, 120, executor="ray"), run_of(1, 64, 80, executor="ray")]
    assert [line["times one worker's"] for line in made("workers", lines)] == ["1.00", "1.50", "1.00"]
    assert [line["times one worker's"] for line in made("workers", lines[1:2])] == ["-"]


def test_workers_whose_scores_differ_have_no_table(made):
    with pytest.raises(ValueError, match="scores that differ by how many workers"):
        made("workers", [run_of(1, 100, 60), run_of(2, 60, 118, same_scores="no")])
