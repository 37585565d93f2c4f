"""The functions that run a model's decoder layers and MLPs, compiled or not, and one layer's run with them.

Compiled, the norms, rotary embeddings and residuals of all layers but the last share one graph. Attention is an operator in
it (see ``operators``), as is an MLP that takes a prompt in chunks, and keys and values leave it for the cache: a graph that
held a cache or a layer's index would be compiled again for every layer.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException, Unsupported, UserError
from transformers import PreTrainedModel

from tmbench.engine import operators
from tmbench.engine.attention import NativeSlot, Slot
from tmbench.engine.decoder_layers import DecoderLayer
from tmbench.engine.forwards import forward_of, own_forward
from tmbench.engine.kv_cache import CacheSlot

if TYPE_CHECKING:
    from tmbench.engine.last_position import LastPosition

BACKEND: str | Callable[..., Any] = "inductor"
"""What torch.compile hands its graphs to."""
ONE_ROW: Mapping[str, Any] = {"coordinate_descent_tuning": True, "max_autotune": True}
"""How inductor compiles what multiplies weights with one row: as reductions, which read weights at the memory's speed."""


def _forward_last(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """A layer, of which only the last position is wanted."""
    out = forward_of(layer, *args, **kwargs)
    if not isinstance(out, Tensor):
        raise TypeError(f"{type(layer).__name__} returns {type(out).__name__}, not hidden states")
    return out[:, -1:]


def _operator_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """As ``forward_of``, for tracing: the operator finds its MLP by the region."""
    return operators.mlp(x)


RunnerOf = Callable[[tuple[bool, ...]], Callable[..., Any]]
"""What runs a layer, by whether its MLP is a part of its graph, and which sizes are 1: a batch, a chunk, latents of chunks
before.

torch makes graphs of their own for a size of 1 and for latents of chunks before: together with the kinds of layers that a
model may have they would be more than it keeps of a function.
"""


@dataclass(frozen=True)
class Runners:
    """The functions that run a model's modules: these, or compiled ones."""

    layer: RunnerOf = lambda kind: forward_of
    mlp: Callable[..., Any] = forward_of
    """In chunks of tokens."""
    experts: Callable[..., Any] = forward_of
    """An MLP that chooses among experts."""
    last_layer: RunnerOf = lambda kind: _forward_last
    last_layer_dynamic: RunnerOf = lambda kind: _forward_last
    """Under a dynamic pattern, which needs more queries: apart, as torch keeps no more than eight graphs of a function."""
    last_mlp: Callable[..., Any] = forward_of
    """Inside of the last layer."""
    decode_layer: Callable[[int], Callable[..., Any]] = lambda size: forward_of
    """In a decoding step of so many texts."""
    narrowed: dict[nn.Module, LastPosition] = field(default_factory=dict)
    """What stands in front of the last layer's modules: made once, as a graph is bound to the identity of each."""
    ahead: set[tuple[bool, bool, bool, bool]] = field(default_factory=set)
    """What was compiled before it was timed: see ``session.compile_ahead``."""


_COMPILED: WeakKeyDictionary[PreTrainedModel, Runners] = WeakKeyDictionary()


def compiled(model: PreTrainedModel) -> Runners:
    """What runs this model's layers and MLPs compiled; the same functions for every later prefill."""
    if model not in _COMPILED:
        _COMPILED[model] = Runners(
            layer=cache(lambda kind: _compile_own(forward_of)),
            mlp=_compile_own(forward_of),
            experts=_traced_or_not(_compile_own(forward_of)),
            last_layer=cache(lambda kind: _compile_own(_forward_last)),
            last_layer_dynamic=cache(lambda kind: _compile_own(_forward_last)),
            last_mlp=_operator_mlp,
            # Apart for each size, as torch keeps no more than eight graphs of a function.
            decode_layer=cache(lambda size: _compile_own(forward_of, dynamic=False, options=ONE_ROW if size == 1 else None)),
        )
    return _COMPILED[model]


def _compile_own(
    function: Callable[..., Any], *, dynamic: bool = True, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A compiled copy of a function.

    torch keeps its graphs with the code object, and at most eight for each: with a copy of its own, no model uses up
    another's, and graphs go when their model does.
    ``fullgraph`` makes torch raise where it would otherwise quietly run a layer uncompiled.
    """
    assert isinstance(function, types.FunctionType)
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    own_options = dict(options) if options and BACKEND == "inductor" else None
    compiled: Callable[..., Any] = torch.compile(own, dynamic=dynamic, fullgraph=True, backend=BACKEND, options=own_options)
    return compiled


def _traced_or_not(run: Callable[..., Any]) -> Callable[..., Any]:
    """Runs compiled what torch can trace, and anything else as transformers has it: experts that are looped over, say.

    Compiled, what lies between the experts' products is one pass over memory instead of one for each operation.
    """
    untraced: set[type[nn.Module]] = set()

    def run_either(mlp: nn.Module, x: Tensor) -> Any:
        if type(mlp) not in untraced:
            try:
                return run(mlp, x)
            except (Unsupported, UserError) as error:
                untraced.add(type(mlp))
                reason = str(error).partition("\n")[0]
                told = f"torch.compile cannot trace {type(mlp).__name__}, which runs as transformers has it: {reason}"
                warnings.warn(told, stacklevel=2)
        return forward_of(mlp, x)

    return run_either


def run_layer(
    slot: Slot | NativeSlot,
    region: operators.Region,
    run: RunnerOf,
    layer: DecoderLayer,
    last_row: bool,
    traced_mlp: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """One layer, of which the last row alone may be wanted; what its graph gave to attention goes into the cache.

    Of as many tokens as ``traced_mlp`` its MLP is a part of the layer's graph, and no operator in it, which takes the host
    longer: of short prompts that is what takes the time.
    A layer that makes keys and values from latents has these in transformers' cache, and keys and values in a slot.
    """
    state = slot.session.prefill
    if not state.active:
        raise RuntimeError("the model is prepared for prefills: decode after the with block")
    latents = layer.latents and not isinstance(state.cache, CacheSlot)
    before = state.latents_before(slot.layer) if latents else None
    hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    sizes = (*hidden.shape[:2], *(() if before is None else before[0].shape[2:3]))
    state.layer.begin(last_row=last_row, dynamic=slot.pattern.dynamic, latents=latents, before=before)
    if latents:
        kwargs[layer.cache_name] = state.layer
    mlp = layer.mlp if hidden.shape[0] * hidden.shape[1] <= traced_mlp else None
    try:
        with operators.entered(region), nullcontext() if mlp is None else own_forward(mlp):
            out = run((mlp is not None, *(size == 1 for size in sizes)))(layer.module, *args, **kwargs)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        raise RuntimeError(
            f"torch.compile gave up on {type(layer.module).__name__}, --no-compile or TORCHDYNAMO_DISABLE=1 measures "
            f"without it: {error}"
        ) from error
    finally:
        kept = state.layer.end()
    if kept is not None and latents:
        state.keep_latents(slot.layer, kept)
    elif kept is not None:
        state.keep(slot.layer, *kept)
    return out
