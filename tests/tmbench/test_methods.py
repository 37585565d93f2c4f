"""The table of methods: one pattern per layer, from the right layer on, with every parameter named."""

from __future__ import annotations

import json

import pytest
import torch

import tmbench_kernels
from tmbench.errors import UserError
from tmbench.methods import (
    DEFAULT_METHODS,
    DENSE_BACKENDS,
    METHODS,
    PAPERS,
    STATIC_PATTERNS,
    ModelShape,
    Settings,
    get_method,
)
from tmbench_kernels import Dense, Pattern, Triangle, VerticalSlash

SHAPE = ModelShape("some/model", layers=6, heads=4)


def plan(name, shape=SHAPE, **settings):
    return get_method(name).plan(shape, Settings(**settings))


def test_every_method_plans_every_layer_and_cites_known_papers():
    for method in METHODS.values():
        assert len(method.plan(SHAPE, Settings()).patterns) == 6
        assert set(method.papers) <= set(PAPERS)
    assert set(DEFAULT_METHODS) <= set(METHODS)


def test_compositions():
    triangle = Triangle(8, 512, 128)
    assert plan("dense").patterns == (Dense(),) * 6
    assert plan("tri_mix").patterns == (Dense(),) * 3 + (triangle,) * 3
    assert plan("minference").patterns == (VerticalSlash(),) * 6
    assert plan("tri_mix_minference", starting_layer=2).patterns == (VerticalSlash(),) * 2 + (triangle,) * 4
    assert plan("streaming", n_init=4, n_local=32).patterns == (Triangle(4, 32, 0),) * 6


@pytest.mark.parametrize(
    ("name", "layers", "start", "source"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 32, 16, "published"),
        ("gradientai/Llama-3-8B-Instruct-262k", 32, 16, "published"),
        ("Qwen/Qwen2.5-7B-Instruct", 28, 20, "published"),
        ("/models/unknown", 10, 5, "half the depth"),
    ],
)
def test_where_the_triangle_starts(name, layers, start, source):
    made = plan("tri_mix", ModelShape(name, layers, 4))
    assert (made.parameters["starting_layer"], made.starting_layer_source) == (start, source)
    assert [pattern.name for pattern in made.patterns] == ["dense"] * start + ["triangle"] * (layers - start)


@pytest.mark.parametrize("start", [0, 6])
def test_a_given_start_may_be_either_end(start):
    made = plan("tri_mix", starting_layer=start)
    assert [pattern.name for pattern in made.patterns] == ["dense"] * start + ["triangle"] * (6 - start)
    assert made.starting_layer_source == "given"


@pytest.mark.parametrize("start", [-1, 7])
def test_a_start_outside_the_model_is_refused(start):
    with pytest.raises(UserError, match="--starting-layer must be between 0 and 6"):
        plan("tri_mix", starting_layer=start)


def test_static_patterns_are_those_that_say_so():
    patterns = [value for value in vars(tmbench_kernels).values() if isinstance(value, type) and issubclass(value, Pattern)]
    static = {pattern.name for pattern in patterns if pattern is not Pattern and not pattern.dynamic}
    assert static == set(STATIC_PATTERNS)


def test_dense_attention_can_be_held_to_one_backend():
    assert tuple(backend.name for backend in Dense.backends) == DENSE_BACKENDS
    assert plan("dense", dense_backend="sdpa").patterns == (Dense("sdpa"),) * 6
    assert plan("tri_mix", dense_backend="cudnn").patterns[:3] == (Dense("cudnn"),) * 3
    assert plan("tri_mix", dense_backend="cudnn").parameters["dense_backend"] == "cudnn"
    assert plan("tri_mix_minference", dense_backend="cudnn") == plan("tri_mix_minference")
    with pytest.raises(UserError, match="--dense-backend flash is unknown: choose from flash-attn-4, flash-attn-3, cudnn"):
        Settings(dense_backend="flash")


def test_planned_backends():
    x = torch.zeros(1, 4, 2, 16)
    assert plan("dense").backends(x, x, x) == "dense:sdpa"
    assert plan("tri_mix").backends(x, x, x) == "dense:sdpa+triangle:torch-banded"
    with pytest.raises(ValueError, match="cudnn runs on cuda, not on cpu"):
        plan("dense", dense_backend="cudnn").backends(x, x, x)


def test_parameters_are_those_the_method_reads():
    assert plan("dense").parameters == {}
    assert plan("tri_mix", n_local=64).parameters == {"starting_layer": 3, "n_init": 8, "n_local": 64, "last_n": 128}
    assert plan("streaming").parameters == {"n_init": 8, "n_local": 512}
    assert plan("minference").parameters == {"patterns": "default"}


@pytest.fixture
def budgets(tmp_path):
    def write(layers=6, heads=4, kind="vertical_and_slash"):
        path = tmp_path / "budgets.json"
        content = [{str(head): [kind, 100 + head, 800 + layer, 1.0] for head in range(heads)} for layer in range(layers)]
        path.write_text(json.dumps(content))
        return path

    return write


def test_budgets_come_from_the_file(budgets):
    made = plan("minference", patterns=budgets())
    assert made.patterns[5] == VerticalSlash(((100, 805), (101, 805), (102, 805), (103, 805)))
    assert made.parameters["patterns"].startswith("budgets:")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 5}, "5 layers"),
        ({"heads": 8}, "8 query heads"),
        ({"kind": "block_sparse"}, "layer 0, head 0: .*block_sparse"),
    ],
)
def test_a_file_for_another_model_is_refused(changes, message, budgets):
    with pytest.raises(UserError, match=f"--patterns: .*{message}"):
        plan("minference", patterns=budgets(**changes))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="--patterns: .*No such file"):
        plan("minference", patterns=tmp_path / "none.json")
