"""A prefill without the work that its first token does not need, arranged around a model and taken away again.

Nothing of a model class is touched: only ``forward`` attributes of module instances, for the time of a ``with`` block.

- Of the last layer only the last position matters, apart from its keys and values. Its queries, its attention, and every
  module that runs after attention see that position alone, and yield it as a view of the full length: exact, since all of
  them treat each position by itself.
- The MLP runs over chunks of tokens, so that what is between its two products takes a bounded part of the memory.
- Compiled, the norms, rotary embeddings and residuals of all layers but the last share one graph. Attention and MLP are
  operators in it (see ``regions``), and keys and values leave it for the cache: a graph that held a cache or a layer's index
  would be compiled again for every layer.
"""

from __future__ import annotations

import math
import os
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import DynamicCache, PreTrainedModel

from tmbench.engine import operators
from tmbench.engine.attention import IMPLEMENTATION, TRACED, Applied, Running, Slot, applied_plan, attend, fill
from tmbench.engine.calls import cache_name, cache_of, keep_last
from tmbench.errors import UserError
from tmbench.methods.table import METHODS, ModelShape, Settings
from tmbench.models.attention_modules import PLACE, attention_modules, parents
from tmbench.models.geometry import Geometry
from tmbench.results.failures import describe

PLAIN: Final = "plain"
EAGER: Final = "eager"
COMPILED: Final = "compiled"
Kind = Literal["plain", "eager", "compiled"]
"""How a prefill runs: as transformers does it, with the economies above, or with these and compiled layers."""

CHUNK = 16384
"""The fewest tokens of a long prompt that an MLP works on at a time."""
MLP_SHARE = 0.1
"""The part of a GPU's memory that an MLP's intermediate tensors may take: larger chunks spare copies of what they yield."""

BACKEND: str | Callable[..., Any] = "inductor"
"""What torch.compile hands its graphs to."""

PROBE_LENGTH = 48
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative RMS difference up to which the probe's prefills count as equal; 0.1 in 16 bits, where noise alone makes 0.01."""


class Prefill:
    """A model that reads prompts: ``prefill(ids)`` returns the last position's logits and leaves the cache in ``cache``."""

    def __init__(self, model: PreTrainedModel, session: Applied | None = None, kind: Kind = PLAIN) -> None:
        self.model = model
        self.session = session
        self.kind = kind
        self.cache: Any | None = None
        """Keys and values of every layer, ready for decoding once the ``with`` block is left; None before and on failure."""
        self._keep = keep_last(model)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits ``[vocabulary]`` of the last of ``ids`` ``[1, length]``. The cache of the pass before is let go first."""
        self.cache = None
        if self.session is None or self.kind == PLAIN:
            output = self.model(input_ids=ids, use_cache=True, return_dict=True, **self._keep)
            self.cache = cache_of(output)
        else:
            cache = DynamicCache(config=self.model.config.get_text_config())
            self.session.cache = cache
            try:
                output = self.model(input_ids=ids, use_cache=False, return_dict=True, **self._keep)
            finally:
                self.session.cache = None
            self.cache = cache
        logits: Tensor = output.logits[0, -1]
        return logits


@contextmanager
def arranged(model: PreTrainedModel, session: Applied, kind: Kind) -> Iterator[Prefill]:
    """Arrange a model to which ``session`` is applied for prefills of this kind; it is as before afterwards.

    ``kind`` should come from ``kind_for``. Decode after the block: inside of it the model only reads whole prompts.
    Raises RuntimeError where torch.compile cannot compile a layer, or wants to compile it again and again.
    """
    prefill = Prefill(model, session, kind)
    if kind == PLAIN:
        yield prefill
        return
    layers = _layers(model, session.modules)
    assert layers is not None, "kind_for finds no layers in such a model"
    with ExitStack() as stack:
        if kind == COMPILED:
            assert session.implementations is not None
            stack.callback(session.implementations.use, IMPLEMENTATION)
            session.implementations.use(TRACED)
        run = _compiled(model) if kind == COMPILED else _Run()
        for layer, module in zip(layers[:-1], session.modules[:-1], strict=True):
            in_chunks = partial(_mlp_in_chunks, layer.mlp, run.mlp)
            if kind == COMPILED:
                slot = getattr(module, PLACE)
                region = operators.Region(partial(attend, slot), in_chunks)
                # One function for all: a graph is bound to the identity of each function that it calls.
                _replace(stack, layer.mlp, operators.mlp)
                _replace(stack, layer, partial(_run_layer, slot, region, run.layer, layer))
            else:
                _replace(stack, layer.mlp, in_chunks)
        _narrow_last(stack, layers[-1], session.modules[-1], run)
        yield prefill


def kind_for(model: PreTrainedModel, *, compiled: bool) -> Kind:
    """How this model can be prefilled: "plain" unless a short prompt gives the same logits and the same cache both ways.

    Raises UnsupportedModelError for a model that no method can be applied to.
    """
    if _obstacle(model):
        return PLAIN
    return COMPILED if compiled else EAGER


def kind_wanted(model: PreTrainedModel, device: torch.device, compiled: bool | None, *, planned: bool = False) -> Kind:
    """As ``kind_for`` on this device, where the user asked to compile or not to, or None for neither.

    Args:
        planned: whether the model has no weights yet, so that it is not known whether its prefills then differ.

    Raises:
        UserError: compilation is asked for and cannot be had.
    """
    wish = compiles(device, compiled)
    obstacle = _planned_obstacle(model) if planned else _obstacle(model)
    if compiled and obstacle:
        raise UserError(f"--compile: {type(model).__name__} cannot be compiled here, {obstacle}: leave the option out")
    if obstacle:
        return PLAIN
    return COMPILED if wish else EAGER


def _layers_obstacle(model: PreTrainedModel) -> str:
    if _layers(model, attention_modules(model)) is not None:
        return ""
    return "as its layers are not built of an attention and an MLP that can be run apart, or have been wrapped"


def _obstacle(model: PreTrainedModel) -> str:
    """Why a model has to be run as transformers runs it; empty where it need not."""
    modules = attention_modules(model)
    if found := _layers_obstacle(model):
        return found
    plan = METHODS["dense"].plan(ModelShape.of(model), Settings())
    ids = torch.arange(7, 7 + 5 * PROBE_LENGTH, 5, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        with torch.inference_mode(), applied_plan(model, plan) as session:
            both = []
            for kind in (PLAIN, EAGER):
                with arranged(model, session, kind) as prefill:
                    both.append([prefill(ids), *_tensors(prefill.cache)])
            once_each = session.calls == 2 * len(modules)
    except UserError:
        raise
    except Exception as error:
        # A model that fails both ways fails in its measurement, which says how.
        return f"as a short prompt failed ({describe(error)})"
    expected, got = both
    if not once_each or len(got) != len(expected) or not all(map(_agree, got, expected)):
        return "as it answers a short prompt otherwise, or fills its cache otherwise, than transformers has it"
    return ""


def _planned_obstacle(model: PreTrainedModel) -> str:
    """As ``_obstacle``, of a model on the meta device: what shows without weights."""
    own_cache = "" if _keeps_what_attends(model) else "as it caches something else than the keys and values of its attention"
    return _layers_obstacle(model) or own_cache


@torch.no_grad()
def _keeps_what_attends(model: PreTrainedModel) -> bool:
    """Whether a model on the meta device caches the keys and values that its attention is given, by their sizes.

    Under multi-head latent attention some models cache what keys and values are made from.
    """
    cache, shape = DynamicCache(config=model.config.get_text_config()), Geometry.of(model)
    ids = torch.zeros(1, PROBE_LENGTH, dtype=torch.long, device=model.device)
    # Not all that a model does can be done without data, for instance choosing experts: its first layer tells.
    with suppress(Exception):
        model(input_ids=ids, use_cache=True, **{cache_name(model): cache})
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    sizes = {(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in filled}
    return sizes <= {(shape.kv_heads, shape.qk_head_dim, shape.v_head_dim)}


def compiles(device: torch.device, wish: bool | None) -> bool:
    """Whether to compile on this device; None means on a GPU where a C compiler is there, which torch.compile needs.

    Raises UserError where compilation is asked for and no compiler is there.
    """
    names = ("CXX", "g++", "clang++") if device.type == "cpu" else ("CC", "cc", "gcc", "clang")
    compiler = os.environ.get(names[0]) or next(filter(shutil.which, names[1:]), None)
    if wish and compiler is None:
        raise UserError(f"--compile needs a compiler, {' or '.join(names[1:])}: install one, or use --no-compile")
    return compiler is not None and device.type == "cuda" if wish is None else wish


def _layers(model: PreTrainedModel, modules: Any) -> list[Any] | None:
    """The decoder layer around each attention module; None where these cannot be arranged."""
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", None):
        return None
    holder = parents(model)
    layers = [holder.get(module) for module in modules]
    for layer in layers:
        if layer is None or not isinstance(getattr(layer, "mlp", None), nn.Module):
            return None
        # Somebody else's wrapper, for instance accelerate's: there is no telling what it does.
        if any("forward" in vars(module) for module in layer.modules()):
            return None
    return layers if len(set(layers)) == len(layers) else None


def _tensors(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _agree(got: Tensor, expected: Tensor) -> bool:
    masked = expected == -torch.inf
    if got.shape != expected.shape or not torch.equal(got == -torch.inf, masked):
        return False
    got, expected = got[~masked], expected[~masked]
    error = (got.float() - expected.float()).square().mean().sqrt()
    size = expected.float().square().mean().sqrt()
    return bool(error <= AGREEMENT.get(expected.dtype, 0.1) * size)


def _replace(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give one module another ``forward`` until the stack unwinds."""
    stack.callback(delattr, module, "forward")
    module.forward = forward


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's class does, whatever stands in front of it."""
    return type(module).forward(module, *args, **kwargs)


def _mlp_in_chunks(mlp: nn.Module, run: Callable[..., Any], x: Tensor) -> Tensor:
    """The MLP over ``[batch, length, hidden]``, in chunks of tokens where it treats tokens one by one."""
    if not _is_plain(mlp):
        run = _forward
    elif x.shape[1] > (chunk := _chunk(mlp, x)):
        whole = torch.empty_like(x, memory_format=torch.contiguous_format)
        # Of even size: a remainder of a few tokens would read all the weights once more.
        size = math.ceil(x.shape[1] / math.ceil(x.shape[1] / chunk))
        for start in range(0, x.shape[1], size):
            part = slice(start, start + size)
            whole[:, part] = run(mlp, x[:, part])
        return whole
    out: Tensor = run(mlp, x)
    return out.contiguous()


def _chunk(mlp: nn.Module, x: Tensor) -> int:
    """Tokens at a time. A gated MLP holds three tensors of its inner width."""
    if x.device.type != "cuda":
        return CHUNK
    width = max((part.out_features for part in mlp.children() if isinstance(part, nn.Linear)), default=x.shape[-1])
    room = MLP_SHARE * torch.cuda.get_device_properties(x.device).total_memory
    return max(CHUNK, int(room // (3 * width * x.element_size() * x.shape[0])))


def _is_plain(mlp: nn.Module) -> bool:
    """Whether an MLP is made of linear layers and activations alone; experts and their routers are not."""
    if next(mlp.parameters(recurse=False), None) is not None:
        return False
    return all(isinstance(part, nn.Linear) or next(part.parameters(), None) is None for part in mlp.children())


def _forward_last(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """A layer, of which only the last position is wanted."""
    out = _forward(layer, *args, **kwargs)
    if not isinstance(out, Tensor):
        raise TypeError(f"{type(layer).__name__} returns {type(out).__name__}, not hidden states")
    return out[:, -1:]


def _operator_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """As ``_forward``, for tracing: the operator finds its MLP by the region."""
    return operators.mlp(x)


@dataclass(frozen=True)
class _Run:
    """The functions that run a model's modules: these, or compiled ones."""

    layer: Callable[..., Any] = _forward
    mlp: Callable[..., Any] = _forward
    """In chunks of tokens."""
    last_layer: Callable[..., Any] = _forward_last
    last_layer_dynamic: Callable[..., Any] = _forward_last
    """Under a dynamic pattern, which needs more queries: apart, as torch keeps no more than eight graphs of a function."""
    last_mlp: Callable[..., Any] = _forward
    """Inside of the last layer."""
    narrowed: dict[nn.Module, _LastPosition] = field(default_factory=dict)
    """What stands in front of the last layer's modules: made once, as a graph is bound to the identity of each."""


def _narrow_last(stack: ExitStack, layer: Any, attention: Any, run: _Run) -> None:
    """Let the last layer work on the last position only, but for its keys and values."""
    slot = getattr(attention, PLACE)
    region = operators.Region(partial(attend, slot), partial(_forward, layer.mlp))
    run_layer = run.last_layer_dynamic if slot.pattern.dynamic else run.last_layer
    _replace(stack, layer, partial(_run_layer, slot, region, run_layer, layer))
    queries = getattr(attention, "q_proj", None)
    for module in {*attention.children(), *layer.children()} - {attention}:
        if module not in run.narrowed:
            forward = run.last_mlp if module is layer.mlp else _forward
            run.narrowed[module] = _LastPosition(module, forward, attention, queries=module is queries)
        _replace(stack, module, run.narrowed[module])


class _LastPosition:
    """A module that treats positions one by one, on the last one alone once attention is done.

    That which yields queries works on the last one from the start, unless a dynamic pattern chooses by several of them.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], attention: Any, *, queries: bool) -> None:
        self.module = module
        self.forward = forward
        self.attention = attention
        self.queries = queries

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``[batch, length, width]`` to the same length, of which only the last position is right once it is narrow."""
        running: Running = getattr(self.attention, PLACE).session.running
        if not running.attended and not (self.queries and running.narrow_queries):
            return self.forward(self.module, x, *args, **kwargs)
        out = self.forward(self.module, x[:, -1:], *args, **kwargs)
        return out.expand(out.shape[0], x.shape[1], *out.shape[2:])


_COMPILED: WeakKeyDictionary[PreTrainedModel, _Run] = WeakKeyDictionary()


def _compiled(model: PreTrainedModel) -> _Run:
    """What runs this model's layers and MLPs compiled; the same functions for every later prefill."""
    if model not in _COMPILED:
        _COMPILED[model] = _Run(
            layer=_compile_own(_forward),
            mlp=_compile_own(_forward),
            last_layer=_compile_own(_forward_last),
            last_layer_dynamic=_compile_own(_forward_last),
            last_mlp=_operator_mlp,
        )
    return _COMPILED[model]


def _compile_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled copy of a function.

    torch keeps its graphs with the code object, and at most eight for each: with a copy of its own, no model uses up
    another's, and graphs go when their model does.
    ``fullgraph`` makes torch raise where it would otherwise quietly run a layer uncompiled.
    """
    assert isinstance(function, types.FunctionType)
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled: Callable[..., Any] = torch.compile(own, dynamic=True, fullgraph=True, backend=BACKEND)
    return compiled


def _run_layer(
    slot: Slot, region: operators.Region, run: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """One layer; what its graph gave to attention goes into the cache."""
    session, running = slot.session, slot.session.running
    _check_prefill(session)
    running.last_row = slot.layer == len(session.modules) - 1
    running.narrow_queries = running.last_row and not slot.pattern.dynamic
    try:
        with operators.entered(region):
            out = run(layer, *args, **kwargs)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        raise RuntimeError(
            f"torch.compile gave up on {type(layer).__name__}, --no-compile measures without it: {error}"
        ) from error
    finally:
        running.last_row = running.narrow_queries = running.attended = False
        kept, running.kept = running.kept, None
    if kept is not None:
        fill(session.cache, slot.layer, *kept)
    return out


def _check_prefill(session: Applied) -> None:
    if session.cache is None:
        raise RuntimeError("the model is arranged for prefills: decode after the with block")
