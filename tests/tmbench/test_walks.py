"""The walks of CONTRIBUTING: each diff applies to this tree, and the tests that it brings pass there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WALKS = sorted((ROOT / "docs" / "walks").glob("*.diff"))


@pytest.fixture
def tree(tmp_path):
    """A copy of what a walk may change."""
    for name in ("tmbench", "kernels", "ruler_tasks", "tests", "docs", "benchmarks/published"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "figures", "screenshots"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.stem)
def test_a_walk_leads_there(walk, tree):
    text = walk.read_text(encoding="utf-8")
    files = [line.split()[-1].removeprefix("b/") for line in text.splitlines() if line.startswith("diff --git ")]
    assert len(files) <= 6
    done = subprocess.run(["git", "apply", str(walk)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, f"make {walk.name} anew, as the files that it changes have changed: {done.stderr}"
    tests = [file for file in files if file.startswith("tests/")]
    assert tests
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
    # The packages of the copy come before an installed one's.
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(program, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_there_is_a_walk_for_what_contributing_names():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert WALKS
    assert all(f"docs/walks/{walk.name}" in text for walk in WALKS)
