"""Options from a file of a run and from environment variables, and the file that a run leaves behind."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from tmbench import cli

RUN = """
command = "ttft"
length = [256]
method = "tri_mix"
repeats = 1
n-local = 64
compile = false
"""


@pytest.fixture
def planned(tmbench, tmp_path):
    """``planned(text, *arguments)``: what tmbench ttft --plan would measure with this file, and what it said."""

    def run(text, *arguments):
        file = tmp_path / "run.toml"
        file.write_text(text, encoding="utf-8")
        return tmbench("ttft", "--config", str(file), "--plan", *arguments)

    return run


def test_a_file_has_what_the_command_line_has_not(planned, monkeypatch):
    code, out, _ = planned(RUN)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines() if "tri_mix" in line][-1:] == [["256", "tri_mix"]]
    out = planned(RUN, "--length", "300")[1]
    assert "300" in out
    assert "256" not in out
    monkeypatch.setenv("TMBENCH_LENGTH", "300 310")
    out = planned(RUN)[1]
    assert "310" in out, "a variable comes before the file"
    monkeypatch.setenv("TMBENCH_TTFT_LENGTH", "320")
    out = planned(RUN)[1]
    assert "320" in out, "the one of the command comes before the one of all"
    assert "310" not in out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lengths = 3", "lengths is no option of tmbench ttft; did you mean length?"),
        ("plan = true", "plan is no option of tmbench ttft"),
        ("config = 'x'", "config is no option of tmbench ttft"),
        ('command = "ruler"', "is of tmbench ruler, not of tmbench ttft"),
        ("length = [", "is no TOML"),
        ("length = [{a = 1}]", "length must be a text, a number, true, false, or a list of those"),
    ],
)
def test_what_a_file_must_not_hold(planned, text, said):
    code, out, err = planned(text)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_value_that_the_command_line_would_refuse(planned):
    code, _, err = planned("repeats = 0")
    assert code == 2
    assert "--repeats" in err


def test_a_file_that_is_not_there(tmbench):
    code, _, err = tmbench("ttft", "--config", "none.toml")
    assert code == 2
    assert "--config none.toml cannot be read: No such file or directory" in err


@pytest.mark.slow
def test_a_run_leaves_a_file_that_repeats_it(tmbench, tmp_path, monkeypatch):
    monkeypatch.setenv("TMBENCH_WARMUP", "1")
    asked = ("--method", "tri_mix:n_local=64", "--length", "256", "--repeats", "1", "--n-init", "4", "--no-compile")
    assert tmbench("ttft", *asked)[0] == 0
    (file,) = (tmp_path / "results" / "runs").iterdir()
    assert tomllib.loads(file.read_text(encoding="utf-8")) == {
        "command": "ttft",
        "method": ["tri_mix:n_local=64"],
        "length": [256],
        "repeats": 1,
        "warmup": 1,
        "n-init": 4,
        "compile": False,
    }
    code, _, err = tmbench("ttft", "--config", str(file))
    assert code == 0
    assert "nothing was measured: the row is there already" in err
    assert len(list(file.parent.iterdir())) == 1
    assert tmbench("ttft", "--method", "nonsense")[0] == 2
    assert len(list(file.parent.iterdir())) == 1, "what was refused is no run"


def test_every_option_has_its_variables():
    import typer

    program: Any = typer.main.get_command(cli.app)
    commands = {name: command for name, command in program.commands.items() if name != "patterns"}
    below = {f"patterns {name}": command for name, command in program.commands["patterns"].commands.items()}
    for name, command in (commands | below).items():
        for option in command.params:
            if option.param_type_name == "argument" or option.name in ("config", "help"):
                continue
            long = next(text for text in option.opts if text.startswith("--"))[2:].upper().replace("-", "_")
            assert option.envvar == [f"TMBENCH_{name.upper().replace(' ', '_').replace('-', '_')}_{long}", f"TMBENCH_{long}"]
