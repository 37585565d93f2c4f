"""A context that a method has read before a question: the next questions of it are read over what it left.

Text that was written behind a question is let go of, which a cache can do that keeps every token of every layer: one of
transformers' without windows and recurrent states, and every slot of a static cache. Where it cannot, and where another
context, another method or a failure came between, the context is read anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Cache

from tmbench.engine.density import PairCounter
from tmbench.engine.kv_cache import CacheSlot
from tmbench.engine.prefix import let_go
from tmbench.engine.session import Session
from tmbench.methods.plan import Plan


@dataclass(frozen=True, eq=False)
class Context:
    """What was read, and how."""

    plan: Plan
    ids: Tensor
    """``[1, length]``."""
    held: Cache | CacheSlot
    """What holds it."""
    backends: frozenset[str]
    """What ran while it was read."""
    counter: PairCounter | None
    """The pairs that were computed meanwhile, where these were counted."""

    @classmethod
    def read(cls, session: Session, ids: Tensor, later: int, into: CacheSlot | None) -> Context:
        """Read it, ``[1, length]``, for a question of ``later`` tokens; a counter that the session has counts its pairs."""
        held, applied = session.read_context(ids, later, into), session.applied
        counter = applied.observer.copy() if isinstance(applied.observer, PairCounter) else None
        return cls(applied.plan, ids, held, frozenset(applied.backends), counter)

    def serves(self, plan: Plan, ids: Tensor, count: bool) -> bool:
        """Whether a plan has read these tokens, ``[1, length]``, and their pairs were counted where they are to be."""
        return plan == self.plan and torch.equal(ids, self.ids) and (self.counter is not None or not count)


class LastContext:
    """The context that was read last, while more may be asked of it."""

    def __init__(self) -> None:
        self._kept: Context | None = None

    def take(self, plan: Plan, ids: Tensor, count: bool) -> Context | None:
        """It, where it ``serves``. Nothing is kept from here on, and another one is let go of, until ``keep`` is called."""
        kept, self._kept = self._kept, None
        return kept if kept is not None and kept.serves(plan, ids, count) else None

    def keep(self, context: Context, slot: CacheSlot | None = None) -> None:
        """Keep a context behind which a question was read: in a ``slot``, or in a cache that can let go of the rest."""
        if slot is not None:
            self._kept = replace(context, held=slot)
        elif isinstance(context.held, Cache) and let_go(context.held, context.ids.shape[1]):
            self._kept = context

    @property
    def slot(self) -> CacheSlot | None:
        """The slot that holds it, where one does."""
        held = self._kept.held if self._kept is not None else None
        return held if isinstance(held, CacheSlot) else None

    def drop(self) -> None:
        """Let go of it."""
        self._kept = None
