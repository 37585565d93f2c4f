"""The commands that make committed rows are commands, and are made again only where they fail."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer.main

from tmbench import cli
from tmbench.methods.spec import parse_method
from tmbench.methods.table import METHODS


@pytest.fixture
def accuracy_rows(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import accuracy_rows

    return accuracy_rows


def test_every_command_is_one(accuracy_rows, tmp_path):
    program: Any = typer.main.get_command(cli.app)
    for make in accuracy_rows.FOLDERS.values():
        for command in make():
            for part in command.split(" && "):
                name, *options = shlex.split(part)
                if name.endswith("equal_density.py"):
                    assert parse_method(options[0])[0].name in METHODS
                    assert options[options.index("--data-dir") + 1] == "{texts}", "where the texts are unpacked"
                    continue
                options = [one.replace("{texts}", str(tmp_path)).replace("{output}", str(tmp_path)) for one in options]
                context = program.commands[name].make_context(name, options)
                asked = context.params["method"] or []
                names = [asked] if isinstance(asked, str) else asked
                assert {parse_method(name)[0].name for name in names} <= set(METHODS)


def test_the_steps_of_a_command_end_with_the_first_that_fails(accuracy_rows, tmp_path, capfd):
    right = "ruler --plan --model tiny --length 1K --method dense --task vt"
    assert accuracy_rows.run(3, f"{right} && ruler --method of_no_name && {right}", tmp_path) == 2
    log = (tmp_path / "logs" / "3.log").read_text()
    assert "In all" in log, "the first step ran"
    assert "of_no_name" in log
    assert log.count("In all") == 1, "what follows the failure did not"
    assert capfd.readouterr().out.startswith("3: exit 2, ")
