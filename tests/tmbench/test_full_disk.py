"""On a full disk a report and a picture are whole, or what was there before: one sentence says which."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import made_rows
from command_lines import PROGRAM
from tmbench.results.files import write_whole
from tmbench.results.rows import ProbeRow, RulerRow, TtftRow
from tmbench.results.tables import append

LIMIT = 3000
"""Bytes that a file may have in these tests; the writer of more gets an error, as on a full disk."""


def start(folder, *arguments, limit=LIMIT):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + PROGRAM[2]]
    return subprocess.run(
        [*program, *arguments], cwd=folder, env=environ, preexec_fn=limited, capture_output=True, text=True
    )


@pytest.fixture
def measured(tmp_path):
    common = made_rows.COMMON | {"length": 4096}
    times = {"prompt": "kv", "repeats": 3, "warmup": 1, "interleaved": "dense tri_mix", "ttft_median_s": 1.0}
    times |= {"ttft_min_s": 0.9, "ttft_max_s": 1.1}
    for method in ("dense", "tri_mix"):
        append(tmp_path / "results", TtftRow(**(common | times), method=method, samples_s="1.0 1.1 1.2"))
        for task in ("vt", "cwe", "fwe", "qa_1", "qa_2", "niah_single_1", "niah_single_2", "niah_single_3"):
            row = {"task": task, "samples": 20, "score": 50.0, "wording": "own", "wording_hash": "f00d", "source": "noise"}
            append(tmp_path / "results", RulerRow(**(common | row), method=method, chat_template=False))
    about = {"task": "vt", "samples": 1, "wording_hash": "f00d", "source": "noise", "proposal": "p, logits"}
    gradients = {f"{section}_logits": 1.0 for section in ("streaming", "middle", "last")}
    layers = [ProbeRow(**(common | about | gradients), method="dense", layer=layer) for layer in range(4)]
    append(tmp_path / "results", *layers)
    (tmp_path / "heads.json").write_text(json.dumps([{"0": ["vertical_and_slash", 100, 800, 1.0]}] * 2))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("executor", [(), ("--executor", "processes", "--workers", "2")])
def test_a_run_that_has_measured_something_has_failed_in_part(tmp_path, executor):
    asked = ("ruler", "--model", "tiny", "--method", "dense", "--length", "1K", "--task", "niah_single_1", "--samples", "6")
    kept = ("--save-samples", "--offline", *executor)
    part = start(tmp_path, *asked, *kept, limit=12000)
    assert part.returncode == 1
    told = [line for line in part.stderr.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1
    assert "cannot be written" in told[0]
    assert "what was measured before is kept" in told[0]
    (file,) = tmp_path.glob("results/*/ruler/predictions/dense/*.jsonl")
    before = file.read_text().splitlines()
    assert 0 < len(before) < 6
    none = start(tmp_path / "results", *asked, *kept, limit=400)
    assert none.returncode == 2, "nothing was measured"
    whole = start(tmp_path, *asked, *kept, limit=10**9)
    assert whole.returncode == 0
    assert set(before) < set(file.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["md", "csv", "json"])
def test_an_old_report_stays_where_the_new_one_does_not_fit(measured, form):
    old = measured / "out" / "report"
    old.parent.mkdir()
    old.write_text("what was there before")
    done = start(measured, "report", "--format", form, "--output", str(old))
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: --output: {old} cannot be written (File too large)")
    assert len(done.stderr.strip().splitlines()) == 1
    assert old.read_text() == "what was there before"
    assert [path.name for path in old.parent.iterdir()] == ["report"], "no piece is left beside it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("report", "--plots", "plots"), "--plots"),
        (("patterns", "show", "heads.json", "--plot", "plots/heads.png"), "--plot"),
    ],
)
def test_no_empty_picture_is_left(measured, arguments, option):
    done = start(measured, *arguments)
    assert done.returncode == 2, done.stderr
    assert f"{option}: plots" in done.stderr
    assert "cannot be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((measured / "plots").iterdir()) == []


def test_no_empty_picture_of_a_probe_is_left(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from tmbench.report.pictures import save

    old = tmp_path / "probe.png"
    old.write_bytes(b"a picture")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save(Figure(), old)
    assert old.read_bytes() == b"a picture"
    assert [path.name for path in tmp_path.iterdir()] == ["probe.png"]


def test_a_device_stays_a_device_and_a_link_a_link(tmp_path):
    """Whoever may write to /dev may also put a file in the place of what is there."""
    write_whole(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left"):
        write_whole(Path("/dev/full"), "text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("first", "second"):
        write_whole(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "second"
