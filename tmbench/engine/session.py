"""A model under a plan: the one way in which measurements read prompts and decode answers.

A prompt is read by the plan's patterns, in the same kind of prefill whose time ``tmbench ttft`` quotes. What follows is
decoded from that prefill's own cache, densely, by the model as transformers has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from tmbench.engine.attention import Applied, applied_plan
from tmbench.engine.chunks import Chunks
from tmbench.engine.compiled_layers import compiled
from tmbench.engine.decode import Decoding, Stop, follow, greedy
from tmbench.engine.decoder_layers import decoder_layers
from tmbench.engine.kv_cache import CacheSlot
from tmbench.engine.memory import PeakMemory
from tmbench.engine.prefill import COMPILED, Kind, Prefill, prepared, traced_mlp_tokens
from tmbench.engine.prefix import Prefix, let_go
from tmbench.methods.plan import Plan
from tmbench.models import parallel
from tmbench.models.attention_modules import attention_modules
from tmbench.models.context import splits_prompts


@dataclass(frozen=True)
class Session:
    """What ``running`` yields, for one prompt. Use it inside of ``torch.inference_mode``."""

    model: PreTrainedModel
    applied: Applied
    """What ran: the backends, and whether every layer went through its pattern."""
    kind: Kind
    peak: PeakMemory
    """Of the device, since the session began."""
    ready: Prefill | None = None
    """What the model is prepared for, of the last position alone; None where it is to be prepared for each prompt."""

    def prefill(self, *, every_position: bool = False) -> AbstractContextManager[Prefill]:
        """Inside, the model reads prompts and nothing else: see ``tmbench.engine.prefill.prepared``."""
        if self.ready is not None and not every_position:
            return nullcontext(self.ready)
        return prepared(self.model, self.applied, self.kind, every_position=every_position)

    def read_into(
        self,
        ids: Tensor,
        slot: CacheSlot,
        context: int = 0,
        prefix: Prefix | None = None,
        over: CacheSlot | None = None,
    ) -> Tensor:
        """Read a prompt ``[1, length]``, its keys and values into a slot of a cache; logits ``[1, vocabulary]``.

        With a ``context`` the method reads the first so many tokens, and those behind it see all keys; ``over`` is a slot of
        the same cache that holds it already, this one or another. With a ``prefix`` the slot gets that, and the prompt is
        what follows it.
        Not in a plain prefill, which fills a cache of transformers'. Raises RuntimeError where a layer was not read by its
        pattern.
        """
        with self.prefill() as prefill:
            if prefix is not None:
                logits = prefill.after(prefix, ids, into=slot)
            elif over is not None:
                slot.begin_as(over, context)
                logits = prefill(ids, context=context, over=slot)
            else:
                logits = prefill(ids, slot, context=context)
        self.applied.check_complete()
        return logits

    def read_context(self, ids: Tensor, later: int, into: CacheSlot | None = None) -> Cache | CacheSlot:
        """Read what stands before a question of ``later`` tokens, ``[1, length]``; what holds it, for ``read`` over it.

        Where no slot is given to read ``into``, that is a cache of transformers'. Raises RuntimeError as ``read``.
        """
        with self.prefill() as prefill:
            prefill.read(ids, into, later)
        self.applied.check_complete()
        assert prefill.cache is not None
        found: Cache | CacheSlot = prefill.cache
        return found

    def read(
        self, ids: Tensor, *, every_position: bool = False, context: int = 0, over: Cache | CacheSlot | None = None
    ) -> Decoding:
        """Read a prompt ``[batch, length]``, to decode after it; ``context`` as ``read_into`` has it.

        ``over`` is a cache that holds the context already, and nothing else. Raises NotFiniteError for logits that are not
        finite, and RuntimeError where a layer was not read by its pattern.
        """
        with self.prefill(every_position=every_position) as prefill:
            logits = prefill(ids, context=context, over=over)
        self.applied.check_complete()
        cache, prefill.cache = prefill.cache, None
        return Decoding(self.model, ids, logits, cache)

    def keep(self, ids: Tensor) -> Prefix:
        """Read what several prompts begin with, ``[1, length]``: see ``tmbench.engine.prefix``; as ``Prefill.keep``."""
        with self.prefill() as prefill:
            kept = prefill.keep(ids)
        self.applied.check_complete()
        return kept

    def read_before(self, ids: Tensor, following: Sequence[int], context: int = 0) -> None:
        """Read a prompt ``[1, length]``, and what follows it densely over all before, every position to the end.

        ``context`` and what is raised are those of ``read``. What ran is said of the prompt alone, as of one that is decoded
        after.
        """
        with self.prefill(every_position=True) as prefill:
            prefill(ids, context=context, later=len(following))
            self.applied.check_complete()
            ran = set(self.applied.backends)
            if following:
                prefill.ask(torch.tensor([following], device=ids.device, dtype=ids.dtype))
        self.applied.backends.intersection_update(ran)

    def ask(self, decoding: Decoding, ids: Tensor) -> bool:
        """Read ``ids`` ``[1, length]`` densely behind what was read, every position to the end; ``decoding`` is not told.

        Of models that can be fed in chunks: see ``chunk_kind.feeds_chunks``. Returns whether the cache is as before, so that
        something else may be asked; where a layer cannot let go of tokens it is not, and nothing can follow.
        """
        ran = set(self.applied.backends)
        with self.prefill(every_position=True) as prefill:
            prefill.resume(decoding.cache, decoding.length)
            prefill.ask(ids)
        self.applied.backends.intersection_update(ran)
        return let_go(decoding.cache, decoding.length)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        context: int = 0,
        stop: Stop | None = None,
        over: Cache | CacheSlot | None = None,
    ) -> Tensor:
        """Greedy decoding after a prompt ``[batch, length]``: the new tokens alone, ``[batch, new]``; a ``stop`` for one.

        ``context`` and ``over`` are those of ``read``. What is ``over`` then holds the whole text.
        """
        return greedy(self.read(ids, context=context, over=over), max_new_tokens, stop)

    def follow(
        self,
        ids: Tensor,
        count: int,
        given: Sequence[int] | None = None,
        context: int = 0,
        over: Cache | CacheSlot | None = None,
    ) -> list[int]:
        """The likeliest tokens at each of ``count`` places behind a prompt ``[1, length]``, end tokens left out.

        ``given`` are ``count`` tokens that are read one by one behind the prompt; None reads the choices themselves.
        ``context`` and ``over`` are those of ``read``. What is ``over`` then holds the whole text.
        """
        return follow(self.read(ids, context=context, over=over), count, given)


@contextmanager
def running(model: PreTrainedModel, plan: Plan, kind: Kind, chunks: Chunks | None = None) -> Iterator[Session]:
    """Run a model under a plan, its prompts read in this kind of prefill; the model is as before afterwards.

    With ``chunks`` they are fed so: see ``chunk_kind.check_chunks`` for which models can be.

    Raises UnsupportedModelError as ``tmbench.applied``.
    """
    with applied_plan(model, plan) as applied:
        applied.splits_prompts, applied.chunks = splits_prompts(model), chunks
        yield Session(model, applied, kind, PeakMemory(model.device))


class KeptOpen:
    """A model's session, kept open while the prompts of one plan follow each other, and the model prepared to read them.

    Opening and preparing look at every module. Close it before the model is used in any other way.
    """

    def __init__(self, model: PreTrainedModel, kind: Kind, chunks: Chunks | None = None) -> None:
        self._model = model
        self._kind = kind
        self._chunks = chunks
        self._plan: Plan | None = None
        self._session: Session | None = None
        self._stack = ExitStack()

    def under(self, plan: Plan, ids: Tensor, slot: CacheSlot, context: int = 0) -> Session:
        """A session for one more prompt, ``ids`` ``[1, length]``, which is to go into ``slot``; compiles ahead for it.

        With a ``context``, as ``Session.read`` has it, the slot may hold that already, and does so afterwards.
        """
        if self._session is None or self._plan is not plan:
            self.close()
            compile_ahead(self._model, plan, self._kind, ids, into=slot, chunks=self._chunks, context=context)
            opened = self._stack.enter_context(running(self._model, plan, self._kind, self._chunks))
            ready = self._stack.enter_context(opened.prefill())
            self._session, self._plan = replace(opened, ready=ready), plan
        self._session.applied.forget()
        return replace(self._session, peak=PeakMemory(self._model.device))

    def close(self) -> None:
        """Leave the model as it was."""
        self._session = None
        self._stack.close()


_TRACED: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
"""``traced_mlp_tokens`` of models: every sample asks for it, and finding a model's layers takes milliseconds."""


@torch.inference_mode()
def compile_ahead(
    model: PreTrainedModel,
    plan: Plan,
    kind: Kind,
    ids: Tensor,
    *,
    every_position: bool = False,
    into: CacheSlot | None = None,
    chunks: Chunks | None = None,
    context: int = 0,
    later: int = 0,
) -> None:
    """Let torch compile what such prefills need, once, so that no sample's time has it; a failure shows in the sample.

    ``ids`` is the first prompt to be measured: what torch compiles, it tunes for the length that it meets first. ``context``
    is as ``Session.read`` has it, and so many tokens are read ``later``, every position of them, as ``Session.ask`` does.
    With ``into`` a prompt is read into that slot, which is to be filled anew behind its context. A failure that may leave
    it with a part of that is raised.
    """
    if kind != COMPILED:
        return
    last = plan.patterns[-1]
    dynamic = last is not None and last.dynamic
    if model not in _TRACED:
        _TRACED[model] = traced_mlp_tokens(model, decoder_layers(model, attention_modules(model)) or ())
    traced, ranks = _TRACED[model], parallel.size() if splits_prompts(model) else 1
    # What torch makes a graph of its own for, see ``run_layer``.
    about = {
        (dynamic, every_position, math.ceil(ids.shape[0] * part / ranks) <= traced, part == 1)
        for part in _parts(ids.shape[1], context, later, chunks)
    }
    runners = compiled(model)
    if not about <= runners.ahead:
        runners.ahead.update(about)
        # Ranks that share a model fail together, or are no longer at the same place.
        failing = nullcontext() if parallel.size() > 1 or (into is not None and context) else suppress(RuntimeError)
        with failing, running(model, plan, kind, chunks) as session:
            if into is not None:
                session.read_into(ids, into, context)
            elif later:
                session.read_before(ids, ids[0, :1].tolist() * later, context)
            else:
                session.read(ids, every_position=every_position, context=context)


def _parts(length: int, context: int, later: int, chunks: Chunks | None) -> set[int]:
    """How many tokens are read at a time, of a prompt, its context and what follows it."""
    before = context or length
    read = [before] if chunks is None else [chunk.end - chunk.start for chunk in chunks.of(before)]
    return {part for part in (*read, length - before, later) if part}
