"""How a model's prompts can be read: as transformers does it, without needless work, or with compiled layers too."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tmbench.engine.attention import applied_plan
from tmbench.engine.decoder_layers import beside, decoder_layers
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN, Kind, prepared, tensors_of
from tmbench.errors import UserError
from tmbench.methods.plan import ModelShape
from tmbench.methods.table import METHODS
from tmbench.models import parallel
from tmbench.models.attention_modules import attention_modules, limiting_windows, parents
from tmbench.models.context import splits_prompts
from tmbench.models.geometry import shares_keys
from tmbench.results.failures import describe

PROBE_LENGTH = 48
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative RMS difference up to which the probe's prefills count as equal; 0.1 in 16 bits, where noise alone makes 0.01."""


def kind_wanted(model: PreTrainedModel, device: torch.device, compiled: bool | None, *, planned: bool = False) -> Kind:
    """How this model is prefilled: "plain" unless a short prompt gives the same logits and the same cache both ways.

    Args:
        compiled: whether the user asked to compile or not to; None for neither.
        planned: whether the model has no weights yet, so that it is not known whether its prefills then differ.

    Raises:
        UserError: compilation is asked for and cannot be had.
        UnsupportedModelError: a model that no method can be applied to.
    """
    wish = compiles(device, compiled)
    obstacle = _layers_obstacle(model) if planned else obstacle_of(model)
    if compiled and obstacle:
        raise UserError(f"--compile: {type(model).__name__} cannot be compiled here, {obstacle}: leave the option out")
    if obstacle and splits_prompts(model):
        raise UserError(f"--context-parallel: prompts of {type(model).__name__} cannot be split, {obstacle}: leave it out")
    if obstacle:
        return PLAIN
    return COMPILED if wish else EAGER


def _layers_obstacle(model: PreTrainedModel) -> str:
    """As ``obstacle_of``, as far as it shows without weights."""
    modules = attention_modules(model)
    if min(limiting_windows(model).values(), default=PROBE_LENGTH) < PROBE_LENGTH:
        return f"as its sliding windows are shorter than the {PROBE_LENGTH} tokens that it is tried with"
    if decoder_layers(model, modules) is not None:
        return ""
    if shares_keys(model.config):
        return "as its last layers share the keys and values of layers before them"
    holder = parents(model)
    if any(module in holder and beside(holder[module], module) for module in modules):
        several = len({holder[module] for module in modules if module in holder}) < len(modules)
        return f"as its layers have {'several attentions' if several else 'a recurrence beside their attention'}"
    return "as its layers are not built of an attention and an MLP that can be run apart, or have been wrapped"


def obstacle_of(model: PreTrainedModel) -> str:
    """Why a model has to be run as transformers runs it, in words that follow a comma; empty where it need not.

    Raises UnsupportedModelError for a model that no method can be applied to.
    """
    modules = attention_modules(model)
    if found := _layers_obstacle(model):
        return found
    plan = METHODS["dense"].plan(ModelShape.of(model))
    ids = short_prompt(model)
    try:
        with torch.inference_mode(), applied_plan(model, plan) as session:
            both = []
            for kind in (PLAIN, EAGER):
                with prepared(model, session, kind) as prefill:
                    both.append([prefill(ids), *tensors_of(prefill.cache)])
            once_each = session.calls == 2 * len(modules)
    except UserError:
        raise
    except Exception as error:
        # A model that fails both ways fails in its measurement, which says how.
        return failed_trial(error)
    if not once_each or not all_agree(*both):
        return "as it answers a short prompt otherwise, or fills its cache otherwise, than transformers has it"
    return ""


def short_prompt(model: PreTrainedModel, length: int = PROBE_LENGTH) -> Tensor:
    """Token ids ``[1, length]`` by which a model is tried."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.arange(7, 7 + 5 * length, 5, device=model.device)[None] % vocabulary


def failed_trial(error: Exception) -> str:
    """Why a trial failed, in words that follow a comma; of several ranks the error is raised."""
    if parallel.size() > 1:
        # It may have failed on this rank alone, and then the ranks are no longer at the same place.
        raise error
    return f"as a short prompt failed ({describe(error)})"


def all_agree(expected: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    """Whether two readings left as many tensors, all alike."""
    return len(got) == len(expected) and all(map(agree, got, expected))


def compiles(device: torch.device, wish: bool | None) -> bool:
    """Whether to compile on this device; None means on a GPU where a C compiler is there, which torch.compile needs.

    Raises UserError where compilation is asked for and no compiler is there, or torch.compile is switched off.
    """
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        if wish:
            raise UserError("--compile does not go with TORCHDYNAMO_DISABLE=1, which switches it off: leave one of them out")
        return False
    names = ("CXX", "g++", "clang++") if device.type == "cpu" else ("CC", "cc", "gcc", "clang")
    compiler = os.environ.get(names[0]) or next(filter(shutil.which, names[1:]), None)
    if wish and compiler is None:
        raise UserError(f"--compile needs a compiler, {' or '.join(names[1:])}: install one, or use --no-compile")
    return compiler is not None and device.type == "cuda" if wish is None else wish


def agree(got: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors are alike, up to rounding in ``dtype``, which is ``expected``'s own unless given."""
    dtype = dtype or expected.dtype
    masked = expected == -torch.inf
    if got.shape != expected.shape or not torch.equal(got == -torch.inf, masked):
        return False
    got, expected = got[~masked], expected[~masked]
    error = (got.float() - expected.float()).square().mean().sqrt()
    size = expected.float().square().mean().sqrt()
    return bool(error <= AGREEMENT.get(dtype, 0.1) * size)
