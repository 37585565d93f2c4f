"""Outputs that take no letter but ASCII, nothing more, or nobody reads: one sentence or none, and the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_lines import PROGRAM


@pytest.mark.slow
def test_a_terminal_of_ascii_and_a_full_device(tmp_path):
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*PROGRAM, "list"], env=ascii_only, capture_output=True, text=True, check=True)
    assert "tri_mix" in done.stdout
    for command in (("list",), ("env",), ("list", "--help"), ("report", "--results", str(tmp_path))):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run([*PROGRAM, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2, command
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "standard output cannot be written (No space left on device)" in done.stderr or command[0] == "report"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, "ttft", "--method", "x"], stdout=subprocess.PIPE, stderr=full, text=True, check=False
        )
    assert (done.returncode, done.stdout.strip()) == (2, "")
    closed = [sys.executable, "-c", "import os; os.close(1); os.execv(os.sys.executable, os.sys.argv[1:])"]
    done = subprocess.run([*closed, *PROGRAM, "list"], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_the_program_without_a_word(unbuffered):
    """With the exit code of a program that SIGPIPE ended, and not 1, which says that a measurement failed."""
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    for command in (("list",), ("--help",), ("env", "--json")):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([*PROGRAM, *command], stdout=write, stderr=subprocess.PIPE, env=environ, check=False)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, b""), command
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*PROGRAM, "ttft", "--method", "x"], stdout=write, stderr=write, env=environ, check=False)
    os.close(write)
    assert done.returncode == 141
