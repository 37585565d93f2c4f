"""The wheel holds all that a user needs: it is built, installed where nothing of the checkout is seen, and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

import tmbench

ROOT = Path(__file__).resolve().parents[2]


def test_one_source_of_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tmbench.__version__"}
    assert f"version: {tmbench.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[?(Unreleased|{re.escape(tmbench.__version__)})\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says what belongs to the checkout")
def test_the_wheel_runs_outside_of_the_checkout(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source = tmp_path / "source"
    for name in filter(None, listed.split("\0")):
        if name.startswith(("results/", "benchmarks/", "docs/", "tests/")) or not (ROOT / name).is_file():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    building = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "dist"), str(source)]
    subprocess.run([*pip, *building], check=True)
    (wheel,) = (tmp_path / "dist").glob("tmbench-*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    binaries = tmp_path / "venv" / "bin"
    subprocess.run(
        [*pip, "--python", str(binaries / "python"), "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True
    )
    # The libraries of this environment, but not its editable tmbench: the .pth files of a path in a .pth file are not read.
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")

    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments):
        program = [str(binaries / "tmbench"), *arguments]
        return subprocess.run(program, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True).stdout

    where = [str(binaries / "python"), "-c", "import tmbench, tmbench_kernels, ruler_tasks; print(tmbench_kernels.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(site)
    assert "ttft" in run("--help")
    assert run("--version").strip() == f"tmbench {tmbench.__version__}"
    assert "tri_mix" in run("list")
    timed = run("ttft", "--length", "1K", "--method", "dense", "--method", "tri_mix", "--repeats", "1", "--json")
    assert '"status": "ok"' in timed
    assert (tmp_path / "results").is_dir()
    run("report", "--html", "pages")
    assert {"index.html", "times.html", "report.css", "chart.js"} <= {path.name for path in (tmp_path / "pages").iterdir()}
