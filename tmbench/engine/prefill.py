"""A prefill without the work that its first token does not need, prepared in a model and taken away again.

Nothing of a model class is touched: only ``forward`` attributes of module instances, for the time of a ``with`` block. The
last layer works on the last position (``last_position``), MLPs run over chunks of tokens (``chunked_mlp``), and layers may
be compiled (``compiled_layers``). Whether a model can be read so is in ``prefill_kind``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, Literal
from weakref import ref

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from tmbench.engine import operators
from tmbench.engine.attention import IMPLEMENTATION, TRACED, Applied, attend, check_window
from tmbench.engine.calls import cache_of, empty_cache, keep_last, padded_call
from tmbench.engine.chunked_mlp import common_chunk, in_chunks, is_plain, with_router
from tmbench.engine.chunks import WHOLE, Chunk, with_room
from tmbench.engine.compiled_layers import Runners, compiled, run_layer
from tmbench.engine.decoder_layers import DecoderLayer, decoder_layers
from tmbench.engine.forwards import replace_forward
from tmbench.engine.kv_cache import CacheSlot
from tmbench.engine.last_position import narrow
from tmbench.engine.left_padding import check_padding, offsets
from tmbench.engine.local_attention import attend_locally_cached
from tmbench.engine.native_layers import run_native
from tmbench.engine.prefix import Prefix, check_prefixes
from tmbench.engine.token_split import TokenSplit, cache_of_own_heads
from tmbench.models.attention_modules import PLACE

PLAIN: Final = "plain"
EAGER: Final = "eager"
COMPILED: Final = "compiled"
Kind = Literal["plain", "eager", "compiled"]
"""How a prefill runs: as transformers does it, with the economies above, or with these and compiled layers."""
HELD = ("keys", "values", "conv_states", "recurrent_states")
"""What a layer of transformers' caches holds, by name."""


class Prefill:
    """A model that reads prompts: ``prefill(ids)`` returns the last position's logits and leaves the cache in ``cache``."""

    def __init__(self, model: PreTrainedModel, session: Applied | None = None, kind: Kind = PLAIN) -> None:
        self.model = model
        self.session = session
        self.kind = kind
        self.cache: Any | None = None
        """Keys and values of every layer, ready for decoding once the ``with`` block is left; None before and on failure."""
        self.split: TokenSplit | None = None
        """How the last prompt was split over ranks; None where this process read all of it."""
        self._keep = keep_last(model)
        self._read = 0
        """Tokens that were read in chunks, or before a question."""

    def __call__(
        self,
        ids: Tensor,
        into: CacheSlot | None = None,
        mask: Tensor | None = None,
        context: int = 0,
        later: int = 0,
        over: Cache | CacheSlot | None = None,
    ) -> Tensor:
        """Logits ``[batch, vocabulary]`` of the last of ``ids`` ``[batch, length]``; lets the cache before go.

        Keys and values go ``into`` a slot where one is given, which a plain prefill refuses by ValueError. A ``mask`` of
        ``ids``, 0 for padding in front of a text, is for a plain prefill, and any other refuses it so. Where the session
        feeds prompts in chunks, which a plain prefill refuses so too, it returns when the last one is read. So does it a
        ``context``: the first so many tokens, which alone the method reads, while those behind it see all keys.
        ``ask`` is to read so many tokens ``later``. What ``over`` holds is the context, which is then not read.
        """
        if over is not None:
            assert self.session is not None, "a method has read the context"
            check_window(self.model, ids.shape[1], self.session.plan.method)
            self.resume(over, context)
            return self.ask(ids[:, context:])
        if context:
            self.read(ids[:, :context], into, ids.shape[1] - context + later)
            return self.ask(ids[:, context:])
        return self.read(ids, into, later, mask)

    def read(self, ids: Tensor, into: CacheSlot | None = None, later: int = 0, mask: Tensor | None = None) -> Tensor:
        """As ``__call__``, of a whole prompt, over which ``ask`` is to read so many tokens ``later``."""
        self.cache = self.split = None
        # Explicit, since a config may say otherwise.
        call: dict[str, Any] = {"input_ids": ids, "return_dict": True, **self._keep}
        if self.session is None or self.kind == PLAIN:
            if later or (self.session is not None and self.session.chunks is not None):
                raise ValueError("a plain prefill reads a prompt in one piece")
            if into is not None:
                raise ValueError("a plain prefill fills no slot of a static cache")
            if mask is not None:
                call |= padded_call(self.model, mask, ids.shape[1])
            output = self.model(**call, use_cache=True)
            self.cache = cache_of(output)
            logits: Tensor = output.logits[:, -1]
            return logits
        if mask is not None:
            raise ValueError("padding takes a plain prefill")
        if into is not None:
            into.begin()
        chunks = WHOLE if later and self.session.chunks is None else self.session.chunks
        if chunks is not None:
            check_window(self.model, ids.shape[1] + later, self.session.plan.method)
            cache = with_room(empty_cache(self.model), ids.shape[1] + later) if into is None else into
            for chunk in chunks.of(ids.shape[1]):
                logits = self._read_chunk(cache, chunk, ids[:, chunk.start : chunk.end])
            return logits
        cache = self._empty_cache() if into is None else into
        if self.session.splits_prompts:
            self.split = TokenSplit(ids.shape[1])
            call |= self.split.call(ids)
        with self.session.prefill.filling(cache, self.split):
            output = self.model(**call, use_cache=False)
        self.cache = cache
        logits = output.logits[:, -1]
        return logits if self.split is None else self.split.from_last(logits)

    def resume(self, cache: Cache | CacheSlot, length: int) -> None:
        """Go on from a cache that another prefill has filled with so many tokens: ``ask`` then reads over it."""
        self.cache, self._read = cache, length

    def ask(self, ids: Tensor) -> Tensor:
        """Logits ``[batch, vocabulary]`` of the last of ``ids``, which are read densely over all that was read before.

        Room for them was asked of ``read``.
        """
        assert self.cache is not None, "nothing was read before"
        return self._read_chunk(self.cache, Chunk(self._read, self._read + ids.shape[1], dense=True), ids)

    def keep(self, ids: Tensor) -> Prefix:
        """Read what several prompts begin with, ``[1, length]``, for ``after``.

        Any kind of prefill does so, under a method. Raises UnsupportedModelError as ``check_prefixes``.
        """
        assert self.session is not None, "a method reads prefixes"
        check_prefixes(self.model)
        check_window(self.model, ids.shape[1], self.session.plan.method)
        cache = empty_cache(self.model)
        for chunk in (self.session.chunks or WHOLE).of(ids.shape[1]):
            self._read_chunk(cache, chunk, ids[:, chunk.start : chunk.end])
        self.cache = None
        kept = tuple((layer.keys, layer.values) for layer in cache.layers)
        return Prefix(ids, ref(self.model), self.session.plan, kept)

    def after(self, prefix: Prefix, ids: Tensor, mask: Tensor | None = None, into: CacheSlot | None = None) -> Tensor:
        """Logits ``[batch, vocabulary]`` of the last of ``ids`` ``[batch, length]``, each row of which follows the prefix.

        A ``mask`` of ``ids`` is 0 for padding in front of a text. The prefix and what follows it go ``into`` a slot where
        one is given, which takes one row without padding.

        Raises UnsupportedModelError for padding elsewhere and for a method that takes none, and UserError for a prefix that
        another model or another method has read.
        """
        assert self.session is not None, "a method reads prefixes"
        prefix.check(self.model, self.session.plan)
        padding = () if mask is None else tuple(offsets(mask, ids.shape[1]))
        if any(padding):
            check_padding(self.session.plan)
            if into is not None:
                raise ValueError("a slot takes one text without padding")
        whole = prefix.length + ids.shape[1]
        check_window(self.model, whole, self.session.plan.method)
        if into is not None:
            into.begin()
        cache = with_room(empty_cache(self.model), whole) if into is None else into
        prefix.fill(cache, ids.shape[0])
        return self._read_chunk(cache, Chunk(prefix.length, whole, padding=padding if any(padding) else ()), ids)

    def _read_chunk(self, cache: Cache | CacheSlot, chunk: Chunk, ids: Tensor) -> Tensor:
        assert self.session is not None
        self.cache = None
        with self.session.prefill.filling(cache, chunk=chunk):
            output = self.model(**chunk.call(ids), return_dict=True, use_cache=False, **self._keep)
        self.cache, self._read = cache, chunk.end
        logits: Tensor = output.logits[:, -1]
        return logits

    def _empty_cache(self) -> Cache:
        if self.session is not None and self.session.splits_prompts:
            return cache_of_own_heads(self.model)
        return empty_cache(self.model)


@contextmanager
def prepared(model: PreTrainedModel, session: Applied, kind: Kind, *, every_position: bool = False) -> Iterator[Prefill]:
    """Prepare a model to which ``session`` is applied for prefills of this kind; it is as before afterwards.

    ``kind`` should come from ``prefill_kind.kind_wanted``. Decode after the block: inside of it the model only reads whole
    prompts. With ``every_position`` the last layer yields all positions and not the last alone.
    Raises RuntimeError where torch.compile cannot compile a layer, or wants to compile it again and again.
    """
    prefill = Prefill(model, session, kind)
    if kind == PLAIN:
        yield prefill
        return
    layers = decoder_layers(model, session.modules)
    assert layers, "kind_wanted finds no layers in such a model"
    with ExitStack() as stack:
        if kind == COMPILED:
            assert session.implementations is not None
            stack.callback(session.implementations.use, IMPLEMENTATION)
            session.implementations.use(TRACED)
        run = compiled(model) if kind == COMPILED else Runners()
        traced_mlp = traced_mlp_tokens(model, layers) if kind == COMPILED else 0
        for layer in layers if every_position else layers[:-1]:
            module = layer.attention or layer.native
            traced = kind == COMPILED and module is not None
            mlp = None
            if layer.mlp is not None:
                mlp = partial(in_chunks, layer.mlp, run.mlp if is_plain(layer.mlp) else run.experts)
                # One function for all: a graph is bound to the identity of each function that it calls.
                operator = operators.mlp_and_router if layer.with_router else operators.mlp
                replace_forward(
                    stack, layer.mlp, operator if traced else partial(with_router, mlp) if layer.with_router else mlp
                )
            if module is not None and (traced or layer.latents):
                slot = getattr(module, PLACE)
                region = operators.Region(partial(attend if layer.attention else attend_locally_cached, slot), mlp)
                whole = traced_mlp if layer.mlp is not None and is_plain(layer.mlp) else 0
                replace_forward(stack, layer.module, partial(run_layer, slot, region, run.layer, layer, False, whole))
            elif layer.attention is None:
                replace_forward(stack, layer.module, partial(run_native, session.prefill, layer))
        if not every_position:
            narrow(stack, layers[-1], session, run)
        yield prefill


def traced_mlp_tokens(model: PreTrainedModel, layers: Sequence[DecoderLayer]) -> int:
    """Of how many tokens, at most, MLPs of linear layers are a part of their layers' graphs, in a compiled prefill."""
    return common_chunk((layer.mlp for layer in layers), torch.empty(0, device=model.device, dtype=model.dtype))


def tensors_of(cache: Any) -> list[Tensor]:
    """What a cache holds, layer by layer: keys and values, and the states of layers that are not attention."""
    found: list[Tensor] = []
    for layer in cache.layers:
        for name in HELD:
            held = getattr(layer, name, None)
            several = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else [held]
            found += [tensor for tensor in several if isinstance(tensor, Tensor)]
    # MiniMax's recurrent states lie beside its layers.
    return found + [state for state in getattr(cache, "linear_cache", ()) if isinstance(state, Tensor)]
