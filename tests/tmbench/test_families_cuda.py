"""As test_families has it for each family, on a CUDA device: in float32, and compiled by torch for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from served_families import small

from family_checks import LENGTH, SERVED, check_dense, check_generate, check_prefill, check_triangle
from tmbench.engine.prefill import COMPILED, EAGER
from tmbench.engine.prefill_kind import compiles

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.parametrize("family", SERVED),
    pytest.mark.usefixtures("float32"),
]


@pytest.fixture
def float32():
    """Left to itself, torch takes TF32 for convolutions."""
    takers: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [taker.allow_tf32 for taker in takers]
    for taker in takers:
        taker.allow_tf32 = False
    yield
    for taker, was in zip(takers, before, strict=True):
        taker.allow_tf32 = was


@pytest.fixture
def model(family):
    return small(family).to(DEVICE)


@pytest.fixture
def ids(prompt):
    """One prompt."""
    return prompt(LENGTH).to(DEVICE)


def test_dense_is_the_models_own(model, prompt):
    check_dense(model, prompt(LENGTH, 2).to(DEVICE))


def test_deep_full_layers_have_the_triangle_and_no_others(model, prompt):
    check_triangle(model, prompt(LENGTH, 2).to(DEVICE))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_reads_by_the_method_and_decodes_densely(family, cache, model, ids):
    check_generate(family, model, ids, cache)


def test_prompts_are_read_alike_and_decoded_after(family, model, ids, short_chunks):
    check_prefill(family, model, ids, EAGER)


def test_compiled_layers_read_alike(family, model, ids, short_chunks):
    if not compiles(torch.device(DEVICE), None):
        pytest.skip("torch.compile needs a C compiler")
    check_prefill(family, model, ids, COMPILED)
