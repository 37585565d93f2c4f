"""How patterns get into a model: transformers' own attention interface, one pattern per attention module.

No model class is patched, copied or subclassed. ``applied`` sets the patterns and restores the model on exit; the function
registered with transformers reads the pattern from the module that calls it. A prefill (more than one query, the first at
position 0) uses the pattern; decoding (one query) is dense over the full cache, so every layer's cache stays complete.
Whatever a pattern cannot honour is refused with one sentence, never silently computed wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from tmbench.engine import operators
from tmbench.engine.implementations import Implementations
from tmbench.engine.prefill_state import LayerPass, PrefillState
from tmbench.engine.rereading import Rereading
from tmbench.engine.token_split import all_heads, own_heads
from tmbench.errors import UnsupportedModelError
from tmbench.methods.plan import ModelShape, Plan
from tmbench.methods.spec import MethodSpec
from tmbench.models import parallel
from tmbench.models.attention_modules import PLACE, attention_modules
from tmbench.models.geometry import Geometry
from tmbench.results.words import counted
from tmbench_kernels import Pattern

IMPLEMENTATION = "tmbench"
"""The name under which the functions below are registered. Names with "flash" or a slash are intercepted by transformers."""

TRACED = "tmbench-traced"
"""The name of the same attention inside of compiled layers; see ``tmbench.engine.prefill``."""

REASON = "_tmbench_reason"
"""The attribute of a mask that stands for one which no pattern can honour: what it is, in words."""

Observer = Callable[[int, Pattern, Tensor, Tensor, float | None], None]
"""Called before each prefill attention with (layer, pattern, q, k, scale); see ``Applied.observer``."""


@dataclass
class Applied:
    """A method at work on a model, as ``applied`` yields it."""

    plan: Plan
    calls: int = 0
    """How many prefill attentions have gone through the patterns so far: most models make one per layer and prompt."""
    layers: set[int] = field(default_factory=set)
    """The layers whose prefill has gone through their pattern."""
    observer: Observer | None = None
    """Set to look at the tensors of a prefill, for instance to count the pairs that a dynamic pattern keeps."""
    backends: set[str] = field(default_factory=set)
    """The backends that have run, as "pattern:backend"."""
    modules: tuple[Any, ...] = ()
    """The model's attention modules, in layer order."""
    prefill: PrefillState = field(default_factory=PrefillState)
    """Of the prefills that ``tmbench.engine.prefill`` makes ready."""
    implementations: Implementations | None = None
    """What the model's parts run instead of their own attention."""
    splits_prompts: bool = False
    """Whether each rank has a part of a prompt's tokens, and in attention of the heads: see ``token_split``."""

    def forget(self) -> None:
        """Forget what ran, for another prompt."""
        self.calls = 0
        self.layers.clear()
        self.backends.clear()
        self.observer = None

    def check_complete(self) -> None:
        """Raise RuntimeError unless every layer's prefill went through its pattern, for instance under a cached prompt."""
        if len(self.layers) != len(self.plan.patterns):
            raise RuntimeError(
                f"only {len(self.layers)} of {counted(len(self.plan.patterns), 'layer')} went through their patterns"
            )


@dataclass(frozen=True)
class Slot:
    """What an attention module holds while a method is applied."""

    pattern: Pattern
    session: Applied
    layer: int


@contextmanager
def applied(
    model: PreTrainedModel,
    method: str,
    *,
    layers: str | None = None,
    starting_layer: int | None = None,
    **parameters: Any,
) -> Iterator[Applied]:
    """Run ``model``'s prefills with a method inside a ``with`` block; the model is as before afterwards.

    Args:
        model: any decoder-only transformers model that uses the attention interface.
        method: a name that ``tmbench list`` has, as ``--method`` takes it.
        layers: the deep layers, as ``--layers`` takes them: "16-" for all from 16 on, "16" for that one, "5,7,10-15",
            "random:4", a file of probe results, or "auto" for the newest probe in the folder ``results``. None takes the
            published ones, or the second half.
        starting_layer: 16 is the same as "16-" for ``layers``.
        parameters: those that the method declares, by the names that ``tmbench list`` has, such as ``n_local=256``.

    Raises:
        UserError: an unknown method or parameter, a value out of range, or what does not fit the model.
        UnsupportedModelError: a feature of the model or of a later call that the patterns cannot honour.
    """
    shape = ModelShape.of(model)
    spec = MethodSpec.of(method, parameters)
    with applied_plan(model, spec.with_layers(shape, layers, starting_layer).plan(shape)) as session:
        yield session


@contextmanager
def applied_plan(model: PreTrainedModel, plan: Plan) -> Iterator[Applied]:
    """As ``applied``, for a plan already made."""
    modules = attention_modules(model)
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    AttentionInterface.register(TRACED, _traced_attention)
    AttentionMaskInterface.register(TRACED, _mask)
    session = Applied(plan, modules=tuple(modules))
    session.implementations = implementations = Implementations(model, modules)
    _forget_lengths(model)
    # Under dense attention a text that is read once more for every token is slow, but nothing else.
    sparse = any(pattern.name != "dense" for pattern in plan.patterns)
    watch = model.register_forward_pre_hook(Rereading(model, plan.method), with_kwargs=True) if sparse else None
    try:
        for module in modules:
            setattr(module, PLACE, Slot(_own(plan.patterns[module.layer_idx], model), session, module.layer_idx))
        implementations.use(IMPLEMENTATION)
        if any(module.config._attn_implementation != IMPLEMENTATION for module in modules):
            raise UnsupportedModelError(f"{type(model).__name__} did not accept an attention function from outside")
        yield session
    finally:
        implementations.restore()
        if watch is not None:
            watch.remove()
        for module in modules:
            if hasattr(module, PLACE):
                delattr(module, PLACE)


def _own(pattern: Pattern, model: PreTrainedModel) -> Pattern:
    """The pattern of the heads that this rank has, of a model that is split."""
    ranks = parallel.size()
    if ranks == 1:
        return pattern
    heads = Geometry.of(model).heads // ranks
    return pattern.of_heads(range(parallel.rank() * heads, (parallel.rank() + 1) * heads))


def _forget_lengths(model: PreTrainedModel) -> None:
    """Have a dynamic rotary embedding start from its own frequencies: it keeps those of the longest prompt it has read."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", "")
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [("", kinds)]:
            prefix = f"{layer_type}_" if layer_type else ""
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if "dynamic" in str(kind) and isinstance(original, Tensor):
                own = original.to(getattr(module, f"{prefix}inv_freq").device)
                module.register_buffer(f"{prefix}inv_freq", own, persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of one layer: q ``[batch, heads, queries, dim]`` in, ``[batch, queries, heads, dim]`` out."""
    slot: Slot | None = getattr(module, PLACE, None)
    if slot is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} shares its config with a model under tmbench.applied: give each model its own config"
        )
    _refuse_features(module, key, kwargs)
    prefill = slot.session.prefill
    if query.shape[2] == 1 and not prefill.active:
        if slot.session.splits_prompts:
            query = own_heads(query, query.shape[1] // parallel.size())
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return all_heads(out) if slot.session.splits_prompts else out, None
    _refuse_calls(module, query, attention_mask, kwargs)
    prefill.keep(slot.layer, key, value)
    return prefill.layer.yielded(attend(slot, query, key, value, kwargs.get("scaling")), query.shape[2]), None


def _traced_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The prefill of any layer, for tracing: nothing read here may differ between layers that share one graph."""
    _refuse_features(module, key, kwargs)
    _refuse_calls(module, query, attention_mask, kwargs)
    layer: LayerPass = getattr(module, PLACE).session.prefill.layer
    operator = operators.last_row if layer.last_row else operators.attention
    out = operator(query, key, value, kwargs.get("scaling"))
    # What leaves a graph is not overwritten by its next call, and need not be copied. With CUDA graphs it would be.
    layer.kept = key, value
    return layer.yielded(out, query.shape[2]), None


def _refuse_features(module: Any, key: Tensor, kwargs: dict[str, Any]) -> None:
    window = kwargs.get("sliding_window")
    if window and key.shape[2] > window:
        raise UnsupportedModelError(
            f"layer {module.layer_idx} has a sliding window of {window} tokens, which {_pattern_name(module)} attention "
            f"cannot honour for longer prompts: give it {window} or fewer"
        )
    for keyword, feature in (("softcap", "soft-capping"), ("s_aux", "sinks")):
        if kwargs.get(keyword) is not None:
            raise UnsupportedModelError(
                f"layer {module.layer_idx} asks for {feature}, which {_pattern_name(module)} attention cannot honour"
            )


def _refuse_calls(module: Any, query: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None and query.shape[2] > 1:
        reason = getattr(attention_mask, REASON, "a mask of its own")
        raise UnsupportedModelError(
            f"layer {module.layer_idx} was given {reason}; {_pattern_name(module)} attention takes none"
        )
    if module.training and kwargs.get("dropout"):
        raise UnsupportedModelError(f"layer {module.layer_idx} drops attention weights out: call model.eval() first")


def _pattern_name(module: Any) -> str:
    return str(getattr(module, PLACE).pattern.name)


def attend(slot: Slot, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """One layer's prefill through its pattern, ``[batch, queries, heads, dim]``; tells the session what happened.

    Where the session wants the last row, that one alone: ``[batch, 1, heads, dim]``.
    """
    session = slot.session
    query, key, value = session.prefill.exchanged(slot.layer, query, key, value)
    queries = query.shape[2]
    # A StaticCache hands over its whole buffer: the keys past the prompt are empty.
    key, value = key[:, :, :queries], value[:, :, :queries]
    if session.observer is not None:
        session.observer(slot.layer, slot.pattern, query, key, scale)
    session.calls += 1
    session.layers.add(slot.layer)
    session.backends.add(f"{slot.pattern.name}:{slot.pattern.backend(query, key, value).name}")
    attend_by = slot.pattern.last_row if session.prefill.layer.last_row else slot.pattern.attend
    # Backends that write [batch, queries, heads, dim] and return its transpose pay nothing for contiguous().
    return session.prefill.returned(attend_by(query, key, value, scale=scale).transpose(1, 2).contiguous())


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward pass: None for a plain prefill, transformers' own for decoding, an error otherwise."""
    if q_length == 1:
        mask: Tensor | None = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
        )
        return mask
    if int(q_offset) != 0 or kv_offset != 0:
        raise UnsupportedModelError(
            f"{q_length} tokens continue a cache of {int(q_offset)}: a chunked prefill is not supported, "
            "pass the whole prompt in one call"
        )
    if attention_mask is not None and not torch.all(attention_mask):
        raise UnsupportedModelError("the batch is padded: the methods take prompts of one length, without padding")
    if mask_function is causal_mask_function or _is_wide_window(mask_function, kwargs.get("local_size"), kv_length):
        return None
    # Some models make the masks of kinds of layer that they have none of. The layer that is given this one refuses it.
    refused = torch.zeros(1, 1, 1, 1)
    setattr(refused, REASON, "a mask in addition to causal attention (packed sequences, images, windows)")
    return refused


def _is_wide_window(mask_function: Callable[..., Any], window: int | None, length: int) -> bool:
    """Whether a mask is causal but for a window, or for chunks, that no query of so many keys reaches."""
    if window is None or window < length:
        return False
    joined = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    return len(joined) == 2 and joined[1] is causal_mask_function
