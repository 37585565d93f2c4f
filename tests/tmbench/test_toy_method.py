"""A method from outside of tmbench: one dataclass and one call, and every command knows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from command_lines import FAST_TTFT
from tmbench.engine.attention import applied
from tmbench.errors import UserError
from tmbench.methods import installed
from tmbench.methods.installed import get_method, method_names
from tmbench.methods.table import METHODS, Method, Part, above_triangle, register
from tmbench.results.rows import RulerRow, TtftRow
from tmbench.results.tables import read_all
from tmbench_kernels import Backend, Pattern, parameter


def _attend(pattern, q, k, v, scale):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    logits = (q @ k.transpose(2, 3) * scale).masked_fill(~pattern.mask(q, k), -torch.inf)
    return logits.softmax(3) @ v


@dataclass(frozen=True)
class EveryOther(Pattern):
    """A query sees the keys whose distance is a multiple of ``every``, and the first key."""

    every: int = parameter(2, help="A query sees every n-th key before it.", at_least=1, tokens=True)
    share: float = parameter(1.0, help="Decides nothing.", above=0, at_most=1)
    note: str = parameter("", help="Decides nothing either.")

    name: ClassVar[str] = "every_other"
    backends: ClassVar[tuple[Backend, ...]] = (Backend("torch", ("cpu", "cuda"), _attend),)

    def mask(self, q, k, *, scale=None):
        positions = torch.arange(q.shape[2], device=q.device)
        apart = positions[:, None] - positions
        return ((apart >= 0) & ((apart % self.every == 0) | (positions == 0)))[None, None]

    def pairs(self, q, k, *, scale=None):
        positions = torch.arange(q.shape[2])
        apart = positions[:, None] - positions
        kept = (apart >= 0) & ((apart % self.every == 0) | (positions == 0))
        return q.shape[0] * q.shape[1] * int(kept.sum())


TOY = Method("every_other", "toy: every n-th key", ("Nobody 2026, arXiv 0000.00000",), Part(EveryOther))


@pytest.fixture
def toy(monkeypatch):
    """The method, alone and above the triangle, for one test."""
    before = dict(METHODS)
    for method in (TOY, above_triangle(TOY)):
        register(method)
    yield TOY
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.slow
def test_it_is_timed_asked_and_reported(tmbench, toy):
    methods = ("--method", "dense", "--method", "every_other:every=3,note=a b", "--method", "tri-mix-every-other:every=4")
    window = ("--layers", "5,7", "--n-local", "32")
    code, out, err = tmbench(*FAST_TTFT, *methods, *window, "--json")
    assert code == 0, err
    expected = {
        "dense": {},
        "every_other": {"every": 3, "share": 1.0, "note": "a b"},
        "tri_mix_every_other": {"layers": "5,7", "n_init": 8, "n_local": 32, "last_n": 128, "every": 4, "share": 1.0},
    }
    assert [row["parameters"] for row in json.loads(out)][1] == 'every=3 share=1.0 note="a b"'
    asked = ("ruler", "--task", "niah_single_1", "--length", "1K", "--samples", "2", "--offline", "--device", "cpu")
    assert tmbench(*asked, *methods, *window)[0] == 0
    for kind in (TtftRow, RulerRow):
        rows = read_all(Path("results"), kind)
        assert {row.method: dict(row.settings) for row in rows} == expected
        assert {row.method: row.backends for row in rows}["every_other"] == "every_other:torch"
        assert {row.status for row in rows} == {"ok"}
    assert (read_all(Path("results"), TtftRow)[1].coverage or 1) < 0.4
    code, out, err = tmbench("report", "--plots", "plots")
    assert code == 0, err
    for words in ("every_other", "every 3, share 1.0, note a b", "layers 5,7 (given), n_init 8", "tri_mix_every_other"):
        assert words in out
    code, _, err = tmbench(*FAST_TTFT, *methods, *window)
    assert "nothing" in err, "what was measured before is found again"
    _, out, _ = tmbench("list")
    assert "every=2" in out
    assert "Nobody 2026, arXiv 0000.00000" in out


def test_its_range_is_checked_by_the_command_line_and_in_python(tmbench, toy, make_model):
    for text, words in (
        ("every_other:every=0", "--method every_other:every=0: every must be 1 or more, not 0"),
        ("every_other:share=x", "share must be a number, not 'x'"),
        ("every_other:stride=2", "every_other has no parameter 'stride': it has every, share, note"),
    ):
        code, _, err = tmbench(*FAST_TTFT, "--method", text)
        assert code == 2
        assert words in " ".join(err.split())
    model = make_model("llama")
    with pytest.raises(UserError, match="^every must be 1 or more, not 0$"), applied(model, "every_other", every=0):
        pass
    with applied(model, "every_other", every=5) as session:
        assert set(session.plan.patterns) == {EveryOther(5)}


class Distribution:
    """What an entry point knows of its package."""

    def __init__(self, name):
        self.name = name


def entry(name, value="toy_package:METHOD", package="toy-package", loads=TOY):
    """An entry point that stands for an object, or for the failure to load one."""

    class Point(EntryPoint):
        def load(self):
            if isinstance(loads, Exception):
                raise loads
            return loads

    point = Point(name, value, installed.GROUP)
    vars(point)["dist"] = Distribution(package)
    return point


@pytest.fixture
def brought(monkeypatch):
    """``brought(*points)``: as though packages that have these entry points were installed."""
    before = dict(METHODS)

    def bring(*points):
        monkeypatch.setattr(installed, "entry_points", lambda group: list(points) if group == installed.GROUP else [])

    yield bring
    METHODS.clear()
    METHODS.update(before)


def test_an_entry_point_brings_a_method_when_it_is_asked_for(brought):
    brought(entry("every_other"), entry("broken", loads=ImportError("no such module")))
    assert method_names()[-2:] == ["every_other", "broken"]
    assert "every_other" not in METHODS, "nothing is loaded for its name"
    assert get_method("every-other") is TOY
    with pytest.raises(UserError, match="choose from dense, .*streaming, every_other, broken$"):
        get_method("every")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("points", "words"),
    [
        ((entry("broken", loads=ImportError("no such module")),), "ImportError: no such module"),
        ((entry("broken", loads=AttributeError("METHOD")),), "AttributeError: METHOD"),
        ((entry("broken", loads=42),), "ValueError: a method is a tmbench.methods.table.Method, not 42"),
        ((entry("broken", loads=TOY),), "ValueError: its name is every_other"),
        ((entry("broken", loads=Method("broken", "", (), Part("NoSuchPattern"))),), "AttributeError: "),
    ],
)
def test_a_broken_one_is_one_sentence_that_names_its_package(brought, tmbench, points, words):
    brought(*points)
    with pytest.raises(UserError, match="^--method broken of the package toy-package cannot be loaded ") as caught:
        get_method("broken")
    assert words in str(caught.value)
    assert str(caught.value).endswith("update or uninstall it")
    code, _, err = tmbench(*FAST_TTFT, "--method", "broken")
    assert (code, "Traceback" in err) == (2, False)
    code, out, err = tmbench("list")
    assert code == 0, "the other methods are listed"
    assert "tri_mix_flashprefill" in out
    assert "toy-package" in " ".join(err.split())
    assert tmbench(*FAST_TTFT, "--method", "dense")[0] == 0


def test_two_packages_with_one_name_are_both_named(brought):
    brought(entry("twice", value="a:A", package="one"), entry("twice", value="b:B", package="two"))
    with pytest.raises(UserError, match="--method twice is registered by several packages, one, two: uninstall all but one"):
        get_method("twice")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Method("dense", "", (), Part(EveryOther)), "there is a method dense already"),
        (Method("Every/Other", "", (), Part(EveryOther)), "the name of a method has small letters"),
        ("every_other", "a method is a tmbench.methods.table.Method, not 'every_other'"),
    ],
)
def test_what_cannot_be_registered_is_refused(method, words):
    with pytest.raises(ValueError, match=words):
        register(method)
    assert METHODS["dense"].shallow == Part("Dense")


def test_a_method_that_is_registered_twice_is_the_same(toy):
    register(TOY)
    assert METHODS["every_other"] is TOY
