"""The table of methods: one pattern per layer, from the right layer on, with every parameter named."""

from __future__ import annotations

import json
import re

import pytest
import torch

from plans import plan_of
from tmbench.engine.attention import applied
from tmbench.errors import UserError
from tmbench.methods.installed import get_method
from tmbench.methods.plan import ModelShape
from tmbench.methods.spec import parse_method
from tmbench.methods.table import DEFAULT_METHODS, DYNAMIC_METHODS, METHODS, STATIC_PATTERNS
from tmbench_kernels import Dense, FlashPrefill, FlexPrefill, Pattern, Triangle, VerticalSlash, XAttention, exports
from tmbench_kernels.parameters import LARGEST_COUNT
from tmbench_kernels.shared import DENSE_BACKENDS, OPTIONS

SHAPE = ModelShape("some/model", layers=6, heads=4)


def plan(name, shape=SHAPE, **given):
    return plan_of(shape, name, **given)


def test_every_method_plans_every_layer_and_cites_its_papers():
    for method in METHODS.values():
        assert len(method.plan(SHAPE).patterns) == 6
        assert all(re.search(r"arXiv \d{4}\.\d{5}$", paper) for paper in method.papers)
    assert [method.name for method in METHODS.values() if not method.papers] == ["dense"]
    assert set(DEFAULT_METHODS) <= set(METHODS)


def test_compositions():
    triangle = Triangle(8, 512, 128)
    assert plan("dense").patterns == (Dense(),) * 6
    assert plan("tri_mix").patterns == (Dense(),) * 3 + (triangle,) * 3
    assert plan("minference").patterns == (VerticalSlash(),) * 6
    assert plan("tri_mix_minference", starting_layer=2).patterns == (VerticalSlash(),) * 2 + (triangle,) * 4
    assert plan("streaming", n_init=4, n_local=32).patterns == (Triangle(4, 32, 0),) * 6
    assert plan("streaming", n_local=32, delta=64).patterns == (Triangle(8, 32, 0, 64, "carry"),) * 6
    assert (
        plan("tri_mix_xattention", delta=32, mode="recompute").patterns[3:] == (Triangle(8, 512, 128, 32, "recompute"),) * 3
    )
    assert plan("flexprefill").patterns == (FlexPrefill(),) * 6
    assert plan("flexprefill", gamma=0.9, tau=0, min_budget=512).patterns == (FlexPrefill(0.9, 0, 512),) * 6
    assert plan("xattention").patterns == (XAttention(),) * 6
    assert plan("xattention", stride=8, threshold=0.8, first_chunk=2048).patterns == (XAttention(8, 0.8, 2048),) * 6
    assert plan("flashprefill").patterns == (FlashPrefill(),) * 6
    assert plan("flashprefill", alpha=0.18).patterns == (FlashPrefill(0.18),) * 6


@pytest.mark.parametrize("method", DYNAMIC_METHODS, ids=lambda method: method.name)
def test_every_dynamic_method_is_combined_with_the_triangle(method):
    alone, both = plan(method.name), plan(f"tri_mix_{method.name}", starting_layer=2, last_n=64)
    assert all(pattern.dynamic for pattern in alone.patterns)
    assert both.patterns == alone.patterns[:2] + (Triangle(8, 512, 64),) * 4
    assert both.parameters == alone.parameters | {"layers": "2-", "n_init": 8, "n_local": 512, "last_n": 64}
    assert METHODS[both.method].papers == (*METHODS["tri_mix"].papers, *method.papers)
    title = method.summary.partition(":")[0]
    assert METHODS[both.method].summary.startswith(f"both: {title} in the shallow layers")


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
    assert (made.parameters["layers"], made.layers_source) == (f"{start}-", source)
    assert [pattern.name for pattern in made.patterns] == ["dense"] * start + ["triangle"] * (layers - start)


@pytest.mark.parametrize("start", [0, 6])
def test_a_given_start_may_be_either_end(start):
    made = plan("tri_mix", starting_layer=start)
    assert [pattern.name for pattern in made.patterns] == ["dense"] * start + ["triangle"] * (6 - start)
    assert (made.parameters["layers"], made.layers_source) == (f"{start}-", "given")


@pytest.mark.parametrize("start", [-1, 7])
def test_a_start_outside_the_model_is_refused(start):
    with pytest.raises(UserError, match="--starting-layer must be between 0 and 6"):
        plan("tri_mix", starting_layer=start)


def test_static_patterns_are_those_that_say_so():
    patterns = [value for value in vars(exports).values() if isinstance(value, type) and issubclass(value, Pattern)]
    static = {pattern.name for pattern in patterns if pattern is not Pattern and not pattern.dynamic}
    assert static == set(STATIC_PATTERNS)


def test_dense_attention_can_be_held_to_one_backend():
    few, *others = (backend.name for backend in Dense.backends)
    assert (few, tuple(others)) == ("cuda-hopper", DENSE_BACKENDS)
    assert plan("dense", dense_backend="sdpa").patterns == (Dense("sdpa"),) * 6
    assert plan("tri_mix", dense_backend="cudnn").patterns[:3] == (Dense("cudnn"),) * 3
    assert plan("tri_mix", dense_backend="cudnn").parameters["dense_backend"] == "cudnn"
    assert plan("tri_mix_minference", dense_backend="cudnn") == plan("tri_mix_minference")
    with pytest.raises(UserError, match="--dense-backend flash is unknown: choose from flash-attn-4, flash-attn-3, cudnn"):
        plan("dense", dense_backend="flash")


def test_planned_backends():
    x = torch.zeros(1, 4, 2, 16)
    assert plan("dense").backends(x, x, x) == "dense:sdpa"
    assert plan("tri_mix").backends(x, x, x) == "dense:sdpa+triangle:torch-banded"
    with pytest.raises(ValueError, match="cudnn runs on cuda, not on cpu"):
        plan("dense", dense_backend="cudnn").backends(x, x, x)


def test_parameters_are_those_the_method_reads():
    assert plan("dense").parameters == {}
    assert plan("tri_mix", n_local=64).parameters == {"layers": "3-", "n_init": 8, "n_local": 64, "last_n": 128}
    assert plan("streaming").parameters == {"n_init": 8, "n_local": 512}
    assert plan("streaming", delta="64").parameters == {"n_init": 8, "n_local": 512, "delta": 64, "mode": "carry"}
    assert plan("oracle_blocks").parameters == {"p": 0.95}
    assert plan("oracle_blocks", like="flashprefill").parameters == {"like": "flashprefill:alpha=0.1"}
    assert plan("minference").parameters == {"patterns": "default"}
    assert plan("flexprefill", gamma=0.9).parameters == {"gamma": 0.9, "tau": 0.1, "min_budget": 1024}
    assert plan("xattention", stride=8).parameters == {"stride": 8, "threshold": 0.9, "first_chunk": 0}
    assert plan("flashprefill").parameters == {"alpha": 0.1}


def test_every_parameter_is_declared_with_help_and_a_default_of_its_own_range():
    for method in METHODS.values():
        for name, about in method.declared.items():
            assert about.help.endswith("."), name
            assert len(about.help) < 110
            about.check(name, about.default)


def test_options_are_the_declarations_that_patterns_use():
    used = {name: about for method in METHODS.values() for name, about in method.declared.items() if about.option}
    assert used == OPTIONS


OUT_OF_RANGE = [
    ("flexprefill", {"gamma": 0}, "gamma must be above 0 and at most 1, not 0"),
    ("flexprefill", {"gamma": 1.1}, "gamma must be above 0 and at most 1, not 1.1"),
    ("xattention", {"threshold": float("nan")}, "threshold must be above 0 and at most 1, not nan"),
    ("flexprefill", {"tau": -0.5}, "tau must be between 0 and 1, not -0.5"),
    ("flashprefill", {"alpha": 2}, "alpha must be between 0 and 1, not 2"),
    ("flexprefill", {"min_budget": 0}, "min_budget must be 1 or more, not 0"),
    ("xattention", {"stride": 0}, "stride must divide 128"),
    ("tri_mix_xattention", {"stride": 48}, "stride must divide 128, so that blocks hold whole strides, but it is 48"),
    ("xattention", {"first_chunk": 1000}, "first_chunk must be 0 or a multiple of 128, not 1000"),
    ("xattention", {"first_chunk": -128}, "first_chunk must be 0 or a multiple of 128, not -128"),
    ("xattention", {"first_chunk": 2**32}, "first_chunk is more tokens than any prompt has"),
    ("tri_mix", {"n_init": -1}, "--n-init must be 0 or more, not -1"),
    ("streaming", {"n_local": LARGEST_COUNT + 1}, f"--n-local is more tokens than any prompt has: give {LARGEST_COUNT}"),
    ("streaming", {"n_init": 0, "n_local": 0}, "--n-init and --n-local are both 0, so most queries would see no key"),
    ("tri_mix", {"last_n": 2.5}, "--last-n must be a whole number, not 2.5"),
    ("tri_mix", {"last_n": True}, "--last-n must be a whole number, not True"),
    ("tri_mix", {"delta": 0}, "delta must be 1 or more, not 0"),
    ("streaming", {"mode": "carry"}, "mode carry says what delta does, which is not given: add delta=64"),
    ("pbs", {"segment": 0}, "segment must be a multiple of 128, not 0"),
    ("pbs", {"segment": 200}, "segment must be a multiple of 128, not 200"),
    ("oracle_blocks", {"p": 0}, "p must be above 0 and at most 1, not 0"),
    ("oracle_blocks", {"p": 0.5, "like": "xattention"}, "p and like both say how many blocks to take: give one of them"),
    ("flexprefill", {"gamma": None}, "gamma must be a number, not None"),
]


@pytest.mark.parametrize(("name", "values", "message"), OUT_OF_RANGE)
def test_parameters_out_of_range_are_refused_by_name(name, values, message):
    with pytest.raises(UserError, match=message):
        plan(name, **values)


def test_an_unknown_keyword_of_python_is_one_sentence(make_model):
    model = make_model("llama")
    with pytest.raises(
        UserError, match="^tri_mix has no parameter 'gamma': it has n_init, n_local, last_n, delta, mode, dense_backend$"
    ):
        applied(model, "tri_mix", gamma=0.5).__enter__()
    with pytest.raises(UserError, match="^--layers changes nothing in dense: leave it out$"):
        applied(model, "dense", layers="2-").__enter__()
    with pytest.raises(UserError, match="--starting-layer 2 and --layers 1- both say where .*: give one of them$"):
        applied(model, "tri_mix", layers="1-", starting_layer=2).__enter__()
    for given in ({"layers": "2-"}, {"starting_layer": 2}, {"layers": "2,3"}):
        with applied(model, "tri_mix", **given) as session:
            assert session.plan.parameters["layers"] == "2-"


def test_parameters_may_follow_a_name():
    assert parse_method("xattention") == (METHODS["xattention"], {})
    method, values = parse_method("tri-mix-xattention:stride=8, threshold=0.8,first-chunk=2048")
    assert (method.name, values) == ("tri_mix_xattention", {"stride": 8, "threshold": 0.8, "first_chunk": 2048})
    assert parse_method("tri_mix:n-local=4,dense_backend=sdpa")[1] == {"n_local": 4, "dense_backend": "sdpa"}
    for text, message in (
        ("flexprefil:gamma=1", "--method flexprefil is unknown: choose from dense"),
        ("flexprefill:alpha=1", "flexprefill has no parameter 'alpha': it has gamma, tau, min_budget"),
        ("streaming:last_n=4", "--method streaming:last_n=4: streaming has no parameter 'last_n': it has n_init, n_local"),
        ("flexprefill:min_budget=4,min-budget=8", "min-budget=8: min_budget is given twice: leave one of them out"),
        ("tri_mix:layers=4-", "--method tri_mix:layers=4-: tri_mix has no parameter 'layers'"),
        ("flexprefill:gamma", "gamma must be a number, not ''"),
        ("flexprefill:min_budget=0.5", "min_budget must be a whole number, not '0.5'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_method(text)


def test_what_follows_a_name_is_a_number_of_its_kind():
    """1 and 1.0 are the same measurement, and a row keeps one text of it."""
    for given in ("1", "1.0", 1, 1.0):
        made = get_method("flexprefill").plan(SHAPE, {"gamma": given})
        assert made.row_fields()["parameters"] == "gamma=1.0 tau=0.1 min_budget=1024"


def test_what_the_declarations_allow_the_patterns_allow():
    for values in (
        {"gamma": 1, "tau": 1, "min_budget": 1},
        {"stride": 128, "threshold": 1e-9, "first_chunk": 128},
        {"alpha": 0},
    ):
        for method in DYNAMIC_METHODS:
            plan(method.name, **values)


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
    made = plan("tri_mix_minference", patterns=budgets(kind="stream_llm"))
    assert [pattern.name for pattern in made.patterns] == ["minference_heads"] * 3 + ["triangle"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 5}, "5 layers"),
        ({"heads": 8}, "8 query heads"),
        ({"kind": "blocks"}, "layer 0, head 0: unknown type"),
    ],
)
def test_a_file_for_another_model_is_refused(changes, message, budgets):
    with pytest.raises(UserError, match=f"--patterns: .*{message}"):
        plan("minference", patterns=budgets(**changes))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--patterns: .*\.json cannot be read: No such file or directory$"):
        plan("minference", patterns=tmp_path / "none.json")
    with pytest.raises(UserError, match="--patterns: .* not int"):
        plan("minference", patterns=3)
