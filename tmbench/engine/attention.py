"""How patterns get into a model: transformers' own attention interface, one pattern per attention module.

No model class is patched, copied or subclassed. ``applied`` sets the patterns and restores the model on exit; the function
registered with transformers reads the pattern from the module that calls it. A prefill (the first query at position 0) uses
the pattern; decoding (one query behind other tokens) is dense over the full cache, so every layer's cache stays complete.
Whatever a pattern cannot honour is refused with one sentence, never silently computed wrong. Layers of other kinds than full
attention stay the model's own: see ``own_attention``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from tmbench.engine import operators
from tmbench.engine.calls import keep_by_place, rotation
from tmbench.engine.chunks import Chunks
from tmbench.engine.implementations import Implementations
from tmbench.engine.left_padding import OFFSETS, by_text, no_padding, offsets
from tmbench.engine.local_attention import Local, attend_locally
from tmbench.engine.own_attention import AsLoaded, later_mask, own_attention
from tmbench.engine.prefill_state import LayerPass, PrefillState
from tmbench.engine.rereading import Rereading
from tmbench.engine.token_split import all_heads, own_heads
from tmbench.errors import UnsupportedModelError
from tmbench.methods.attn_native import AttnNative
from tmbench.methods.layer_kinds import layer_kinds
from tmbench.methods.plan import ModelShape, Plan
from tmbench.methods.spec import MethodSpec
from tmbench.methods.table import STATIC_PATTERNS
from tmbench.models import parallel
from tmbench.models.attention_modules import PLACE, attention_modules, limiting_windows, native_attentions, span
from tmbench.models.geometry import Geometry, shares_keys
from tmbench.results.words import counted
from tmbench_kernels import Dense, Pattern

IMPLEMENTATION = "tmbench"
"""The name under which the functions below are registered. Names with "flash" or a slash are intercepted by transformers."""

TRACED = "tmbench-traced"
"""The name of the same attention inside of compiled layers; see ``tmbench.engine.prefill``."""

REASON = "_tmbench_reason"
"""The attribute of a mask that stands for one which no pattern can honour: what it is, in words."""

WINDOW = "_tmbench_window"
"""The attribute of such a mask that says how wide the window is, where that is all there is to it."""

DENSE = (Dense, AttnNative)
"""Patterns of all pairs that nothing but the output is asked of; the probe's, which is dense too, is none of them."""

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
    """The attention modules of the layers that have a pattern, in layer order."""
    prefill: PrefillState = field(default_factory=PrefillState)
    """Of the prefills that ``tmbench.engine.prefill`` makes ready."""
    implementations: Implementations | None = None
    """What the model's parts run instead of their own attention."""
    rotation: Callable[[int], int] = lambda length: 0
    """As ``calls.rotation`` has it of the model. It looks at every module, so it is asked for padded batches alone."""
    chunks: Chunks | None = None
    """How prompts are fed; None in one piece."""
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
        expected = len(self.plan.by_layer)
        if len(self.layers) != expected:
            raise RuntimeError(f"only {len(self.layers)} of {counted(expected, 'layer')} went through their patterns")


@dataclass(frozen=True)
class Slot:
    """What an attention module holds while a method is applied."""

    pattern: Pattern
    session: Applied
    layer: int
    as_loaded: AsLoaded | None = None
    """What computes its pairs in the place of a backend of the pattern's, under ``--attn-native``."""


@dataclass(frozen=True)
class NativeSlot:
    """What the attention module of a layer without a pattern holds meanwhile."""

    session: Applied
    layer: int
    local: Local

    @property
    def pattern(self) -> Pattern:
        """What computes its window or its chunks."""
        return self.local.pattern


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
    modules, native = attention_modules(model), native_attentions(model)
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    AttentionInterface.register(TRACED, _traced_attention)
    AttentionMaskInterface.register(TRACED, _mask)
    session = Applied(plan, modules=tuple(modules), rotation=cache(partial(rotation, model)))
    session.implementations = implementations = Implementations(model, [*modules, *native])
    _forget_lengths(model)
    # Under dense attention a text that is read once more for every token is slow, but nothing else.
    sparse = any(type(pattern) not in DENSE for pattern in plan.by_layer.values())
    hooks: list[Callable[..., Any]] = [Rereading(model, plan.method, session.prefill)] if sparse else []
    hooks += [keep_by_place] if shares_keys(model.config) else []
    handles = [model.register_forward_pre_hook(hook, with_kwargs=True) for hook in hooks]
    try:
        for module in modules:
            pattern = _own(plan.by_layer[module.layer_idx], model)
            as_loaded = AsLoaded.of(module) if isinstance(pattern, AttnNative) else None
            setattr(module, PLACE, Slot(pattern, session, module.layer_idx, as_loaded))
        kinds = layer_kinds(model.config)
        for module in native:
            setattr(
                module,
                PLACE,
                NativeSlot(session, module.layer_idx, Local(kinds[module.layer_idx], span(module, model.config))),
            )
        implementations.use(IMPLEMENTATION)
        if any(module.config._attn_implementation != IMPLEMENTATION for module in modules):
            raise UnsupportedModelError(f"{type(model).__name__} did not accept an attention function from outside")
        yield session
    finally:
        implementations.restore()
        for handle in handles:
            handle.remove()
        for module in [*modules, *native]:
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
    slot: Slot | NativeSlot | None = getattr(module, PLACE, None)
    if slot is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} shares its config with a model under tmbench.applied: give each model its own config"
        )
    if isinstance(slot, NativeSlot):
        return _native_attention(slot, module, query, key, value, attention_mask, **kwargs), None
    prefill = slot.session.prefill
    # A prompt may be one token, with no key before it.
    if query.shape[2] == 1 and key.shape[2] > 1 and not prefill.active:
        if slot.session.splits_prompts:
            query = own_heads(query, query.shape[1] // parallel.size())
        out = own_attention(module, query, key, value, attention_mask, **kwargs)
        return all_heads(out) if slot.session.splits_prompts else out, None
    if type(slot.pattern) in DENSE and _beyond_window(key, kwargs) and not prefill.active:
        # Dense attention of such a layer is the layer's own.
        slot.session.calls += 1
        slot.session.layers.add(slot.layer)
        return own_attention(module, query, key, value, attention_mask, **kwargs), None
    _refuse_features(module, key, kwargs)
    _refuse_calls(module, query, attention_mask, kwargs)
    prefill.keep(slot.layer, key, value)
    out = attend(slot, query, key, value, *_of_logits(kwargs), padding=getattr(attention_mask, OFFSETS, ()))
    return prefill.layer.yielded(out, query.shape[2]), None


def _native_attention(
    slot: NativeSlot,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """Attention of a layer that stays the model's own: over a whole prompt by a kernel, where its window is all there is."""
    windowed = getattr(attention_mask, WINDOW, None) == slot.local.span
    # Kernels over windows are not differentiated.
    whole = windowed and query.shape[2] == key.shape[2] and not torch.is_grad_enabled()
    # The model's mask is of a chunk alone, which may be shorter than the window: there is then none.
    chunk = slot.session.prefill.chunk is not None and (windowed or attention_mask is None or query.shape[2] == 1)
    if not (whole or chunk):
        return own_attention(module, query, key, value, attention_mask, **kwargs)
    return attend_locally(slot, query, key, value, *_of_logits(kwargs), padding=getattr(attention_mask, OFFSETS, ()))


def _traced_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The prefill of any layer, for tracing: nothing read here may differ between layers that share one graph."""
    slot: Slot | NativeSlot = getattr(module, PLACE)
    layer: LayerPass = slot.session.prefill.layer
    if isinstance(slot, NativeSlot):
        if not layer.begun:
            return _native_attention(slot, module, query, key, value, attention_mask, **kwargs), None
    else:
        _refuse_features(module, key, kwargs)
        # An operator takes no padding.
        _refuse_calls(module, query, attention_mask, kwargs, padded=())
    operator = operators.last_row if layer.last_row else operators.attention
    out = operator(query, key, value, *_of_logits(kwargs))
    # What leaves a graph is not overwritten by its next call, and need not be copied. With CUDA graphs it would be.
    if layer.kept is None:
        layer.kept = key, value
    return layer.yielded(out, query.shape[2]), None


def _of_logits(kwargs: dict[str, Any]) -> tuple[float | None, float, Tensor | None]:
    """What a model asks of the logits: their scale, their cap (0 for none) and learned sinks ``[heads]``."""
    return kwargs.get("scaling"), kwargs.get("softcap") or 0.0, kwargs.get("s_aux")


def _beyond_window(key: Tensor, kwargs: dict[str, Any]) -> bool:
    window: int | None = kwargs.get("sliding_window")
    return window is not None and 0 < window < key.shape[2]


def _refuse_features(module: Any, key: Tensor, kwargs: dict[str, Any]) -> None:
    if _beyond_window(key, kwargs):
        raise _no_window(module.layer_idx, kwargs["sliding_window"], _pattern_name(module))


def _no_window(layer: int, window: int, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {layer} has a sliding window of {window} tokens, which {name} attention cannot honour for longer prompts: "
        f"give it {window} or fewer"
    )


def check_window(model: PreTrainedModel, length: int, name: str) -> None:
    """Raise UnsupportedModelError for a prompt longer than a window that no pattern honours, which a chunk does not show."""
    for layer, window in limiting_windows(model).items():
        if 0 < window < length:
            raise _no_window(layer, window, name)


def _refuse_calls(
    module: Any,
    query: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
    padded: Sequence[str] = STATIC_PATTERNS,
) -> None:
    """Raise UnsupportedModelError for what no pattern honours; ``padded`` are those that serve left-padded batches."""
    if attention_mask is not None and query.shape[2] > 1:
        padding = getattr(attention_mask, OFFSETS, ())
        reason = getattr(attention_mask, REASON, "" if padding else "a mask of its own")
        name, session = _pattern_name(module), getattr(module, PLACE).session
        if reason:
            raise UnsupportedModelError(f"layer {module.layer_idx} was given {reason}; {name} attention takes none")
        if name not in padded:
            raise no_padding(session.plan, name)
        if len({session.rotation(query.shape[2] - offset) for offset in padding}) > 1:
            raise UnsupportedModelError(
                "the batch is padded, and its texts are so long that rotary embeddings depend on the length of each: give "
                "them one by one"
            )
    if module.training and kwargs.get("dropout"):
        raise UnsupportedModelError(f"layer {module.layer_idx} drops attention weights out: call model.eval() first")


def _pattern_name(module: Any) -> str:
    return str(getattr(module, PLACE).pattern.name)


def attend(
    slot: Slot,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    *,
    padding: Sequence[int] = (),
) -> Tensor:
    """One layer's prefill through its pattern, ``[batch, queries, heads, dim]``; tells the session what happened.

    Where the session wants the last row, that one alone: ``[batch, 1, heads, dim]``. ``padding`` is how many of each row's
    tokens stand in front of its text: the pattern gets the text alone, and what comes out for padding is zero.
    """
    session = slot.session
    query, key, value = session.prefill.exchanged(slot.layer, query, key, value)
    chunk, pattern, before = session.prefill.chunk, slot.pattern, 0
    if chunk is None:
        # A StaticCache hands over its whole buffer: the keys past the prompt are empty.
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))
    else:
        pattern, padding, before = chunk.pattern(pattern), chunk.padding, chunk.start
    session.calls += 1
    session.layers.add(slot.layer)
    attend_by = pattern.last_row if session.prefill.layer.last_row else pattern.attend
    # Only what is asked for: patterns of other packages need not know of it.
    about: dict[str, Any] = ({"softcap": softcap} if softcap else {}) | ({} if sinks is None else {"sinks": sinks})

    def attend_texts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if session.observer is not None:
            session.observer(slot.layer, pattern, q, k, scale)
        if slot.as_loaded is not None:
            session.backends.add(f"{slot.pattern.name}:{slot.as_loaded.name}")
            queries = q[:, :, -1:] if session.prefill.layer.last_row else q
            return slot.as_loaded.attend(queries, k, v, scale, **about).contiguous()
        backend = pattern.backend(q, k, v, softcap=softcap, lse=sinks is not None)
        session.backends.add(f"{pattern.name}:{backend.name}")
        # Backends that write [batch, queries, heads, dim] and return its transpose pay nothing for contiguous().
        return attend_by(q, k, v, scale=scale, **about).transpose(1, 2).contiguous()

    last_row = session.prefill.layer.last_row
    return session.prefill.returned(by_text(attend_texts, query, key, value, padding, before=before, last_row=last_row))


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
    """The mask of one forward pass: None for a plain prefill, transformers' own for decoding.

    A stand-in for left padding and for masks that only a model's own layers honour; an error for what nothing does.
    """
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
    padding = [] if attention_mask is None or torch.all(attention_mask) else offsets(attention_mask, q_length)
    window = _window_of(mask_function, kwargs.get("local_size"))
    plain = mask_function is causal_mask_function or (window is not None and window >= kv_length)
    if plain and not padding:
        return None
    about = {"mask_function": mask_function, "attention_mask": attention_mask, **kwargs}
    later = later_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **about)
    setattr(later, OFFSETS, padding)
    if not plain:
        # Layers that stay the model's own take it. One with a pattern refuses it, unless no query reaches beyond its window.
        setattr(later, WINDOW, window)
        setattr(later, REASON, "a mask in addition to causal attention (packed sequences, images, windows)")
    return later


def _window_of(mask_function: Callable[..., Any], size: int | None) -> int | None:
    """The tokens of a window, or of chunks, where these and causality are all that a mask is made of; else None."""
    joined = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    return size if len(joined) == 2 and joined[1] is causal_mask_function else None
