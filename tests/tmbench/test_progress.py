"""Progress where there is no terminal, and of what is often done at once."""

from __future__ import annotations

import io
from itertools import count
from queue import SimpleQueue
from time import sleep
from types import SimpleNamespace

import pytest
from rich.console import Console

from report_rows import add_ttft
from tmbench.cli import progress
from tmbench.cli.progress import EVERY, Lines, waiting
from tmbench.errors import UserError


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    now = 100.0
    bar = Lines(lambda: now)
    bar.start()
    task = bar.add_task("reading", total=4)
    bar.update(task, advance=1)
    now += EVERY
    bar.update(task, description="reading on", advance=1)
    bar.update(task, advance=1)
    assert capsys.readouterr().err == "reading on: 50 %, 10 s so far, 20 s left\n"
    bar.update(task, description="read", advance=1)
    bar.stop()
    bar.stop()
    assert capsys.readouterr().err == "read: 100 %, 10 s\n"


def test_a_task_without_work_says_nothing_unless_it_took_long(capsys):
    now = 100.0
    bar = Lines(lambda: now)
    bar.start()
    bar.add_task("measured before", total=0)
    bar.stop()
    assert capsys.readouterr().err == ""
    bar.add_task("waiting", total=4)
    now += EVERY
    bar.stop()
    assert capsys.readouterr().err == "waiting: 0 %, 10 s so far\n"


def test_what_is_waited_for_says_so_now_and_then_and_not_at_all_where_it_is_done_at_once(monkeypatch, capsys):
    with waiting("loading tiny"):
        pass
    assert capsys.readouterr().err == ""
    said: SimpleQueue[str] = SimpleQueue()
    times, told = count(100, EVERY), []
    monkeypatch.setattr(progress, "say", said.put)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with waiting("loading tiny"):
        told += [said.get(timeout=60), said.get(timeout=60)]
    assert told == ["loading tiny: 10 s so far", "loading tiny: 20 s so far"]
    monkeypatch.undo()
    with pytest.raises(UserError), waiting("loading tiny"):
        raise UserError("there is none")
    assert capsys.readouterr().err == "", "nothing is said of what has ended"


def test_on_a_terminal_what_is_waited_for_leaves_no_trace(monkeypatch):
    screen = io.StringIO()
    shown = Console(file=screen, force_terminal=True, color_system=None, width=60)
    monkeypatch.setattr(progress, "error_console", lambda: shown)
    with waiting("loading tiny"):
        pass
    assert screen.getvalue() == ""
    monkeypatch.setattr(progress, "SOON", 0.0)
    with waiting("loading tiny"):
        sleep(0.3)
    assert "loading tiny 0:00:00" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[1A\x1b[2K"), "the line is taken back"


def test_a_report_says_how_far_it_is_only_when_it_takes_long(tmbench, tmp_path, monkeypatch):
    for method in ("dense", "tri_mix"):
        add_ttft(tmp_path / "rows", method, 4096, 1.0)
    arguments = "report", "--results", str(tmp_path / "rows"), "--html", str(tmp_path / "pages")
    code, _, told = tmbench(*arguments)
    assert (code, [line.partition(":")[0] for line in told.splitlines()]) == (0, [f"wrote {tmp_path}/pages/index.html"])
    monkeypatch.setattr(progress, "SOON", 0.0)
    code, _, told = tmbench(*arguments)
    lines = [line.partition(",")[0] for line in told.splitlines()]
    assert (code, lines[:2]) == (0, ["reading results: 100 %", "writing pages: 100 %"])
