"""What all measurements of decoded text share: prompts are read by their methods, and many texts decode together."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from tmbench.engine.batch import GRAPH, SIZES, Batch, Text
from tmbench.engine.compiled_layers import Runners, compiled
from tmbench.engine.decode import Stop
from tmbench.engine.decode_kind import step_kind
from tmbench.engine.density import PairCounter
from tmbench.engine.kv_cache import CacheSlot
from tmbench.engine.prefill import COMPILED
from tmbench.engine.session import KeptOpen, Session, compile_ahead, running
from tmbench.errors import UserError
from tmbench.measure.attempt import attempt
from tmbench.measure.contexts import Context, LastContext
from tmbench.measure.executor import Worker
from tmbench.measure.spec import Item, PlannedSpec, R
from tmbench.methods.plan import backends_name
from tmbench.models.loading import LoadedModel
from tmbench.results.failures import Failure, describe
from tmbench.results.rows import FAILED, OUT_OF_MEMORY, PLAIN_LOOP


@dataclass(frozen=True, kw_only=True)
class AnswerItem(Item):
    """One prompt that one method reads, and that is continued."""

    plan: int
    """Which of the spec's."""
    room: int
    """The most tokens that a text of its kind has, new ones included: texts with as much room decode together."""
    new: int
    """The most new tokens of a text of its kind."""


Given = tuple[Any, Worker]
"""An item, and whom to tell of it."""


@dataclass(frozen=True)
class Asked:
    """What is to be written behind one prompt."""

    ids: Tensor
    """``[1, length]``, on the model's device."""
    most: int
    """New tokens, at most."""
    endless: bool = False
    """Whether end tokens are never chosen, so that there are exactly so many."""
    given: Sequence[int] | None = None
    """So many tokens, read behind the prompt in place of those that are chosen; only for an endless text."""
    count: bool = False
    """Whether the pairs that attention computes in the prefill are counted."""
    context: int = 0
    """How many of the prompt's tokens the method reads, before the others are asked over them; 0 for all."""
    stop: Stop | None = None
    """Where else than at an end token the text ends; not for an endless one."""

    @property
    def before(self) -> Tensor:
        """The context, ``[1, context]``."""
        return self.ids[:, : self.context]


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one sample's prompt, and how."""

    tokens: Sequence[int]
    seconds: float
    """Of its prefill and of its decoding; where several decode together, of its share of that.

    The time in which a context was read is in that of the question that it was read for, and of no other.
    """
    density: float | None
    backends: str
    peak_memory: int | None
    decode: str = PLAIN_LOOP
    batch_size: int = 1
    """How many texts were decoded together, itself among them."""
    skipped_share: float | None = None

    @property
    def cost(self) -> dict[str, Any]:
        """What every sample keeps of how it was made."""
        return {name: getattr(self, name) for name in ("seconds", "backends", "peak_memory", "decode", "batch_size")}


@dataclass(frozen=True, kw_only=True)
class AnswerSpec(PlannedSpec[R]):
    """A measurement whose samples are each made of one decoded text. Its items are ``AnswerItem``."""

    batch_size: int | None = None
    """How many texts decode together at most; None for as many as memory holds on a GPU, and one elsewhere."""

    @abstractmethod
    def asked(self, loaded: LoadedModel, item: Any) -> Asked:
        """What an item's prompt is, and what is to be written behind it."""

    @abstractmethod
    def sample(self, loaded: LoadedModel, item: Any, answer: Answer) -> Any:
        """What is kept of an item's text."""

    def notes(self, loaded: LoadedModel) -> Sequence[str]:
        """That a GPU decodes one text at a time, where it does: it then takes many times as long."""
        if loaded.device.type != "cuda":
            return ()
        kind, obstacle = step_kind(loaded.model, self.prefill)
        return () if kind is not None else (f"{loaded.name} decodes one text at a time, {obstacle}: that takes long",)

    def measure(self, item: Any, worker: Worker) -> None:
        """Have one method continue one prompt, token by token."""
        worker.keep(alone(self, worker.loaded, item, worker.ran, worker.last))

    def measure_all(self, given: Iterable[Given]) -> None:
        """Have texts decoded together where the model and the device allow it, else one by one."""
        for (room, new), alike in groupby(given, key=lambda one: (one[0].room, one[0].new)):
            first = next(alike)
            rest = chain([first], alike)  # noqa: B031 - it is read once
            self._measure_alike(first[1].loaded, room, new, rest)

    def _measure_alike(self, loaded: LoadedModel, room: int, new: int, given: Iterable[Given]) -> None:
        batch = self._batch(loaded, room, new)
        if batch is not None:
            Together(self, loaded, batch).run(given)
            return
        last = LastContext()
        for item, worker in given:
            worker.step(item.title)
            worker.last = last
            failure = attempt(partial(self.measure, item, worker))
            if failure is not None:
                # On a rank too where nothing failed: all that share a model read the same.
                last.drop()
            worker.end(failure)

    def _batch(self, loaded: LoadedModel, room: int, new: int) -> Batch | None:
        """A batch for texts of up to ``room`` tokens, ``new`` of them new; None where they are to be decoded one by one.

        Raises UserError where the user wants several at once and the model cannot do that.
        """
        wish, on_gpu = self.batch_size, loaded.device.type == "cuda"
        if (wish or 1) == 1 and not on_gpu:
            return None
        kind, obstacle = step_kind(loaded.model, self.prefill)
        if kind is None:
            if wish is not None and wish > 1:
                raise UserError(
                    f"--batch-size {wish}: {loaded.name} decodes one text at a time, {obstacle}: leave the option out"
                )
            return None
        runners = compiled(loaded.model) if self.prefill == COMPILED else Runners()
        size = max(SIZES) if wish is None else wish
        return Batch(loaded.model, room, new, size=size, graph=kind == GRAPH, runner=runners.decode_layer)


@torch.inference_mode()
def alone(spec: AnswerSpec[Any], loaded: LoadedModel, item: Any, ran: set[str], last: LastContext) -> Any:
    """One sample, decoded token by token; ``ran`` is given what ran, which is there of a failure too."""
    asked, plan = spec.asked(loaded, item), spec.plans[item.plan]
    kept = last.take(plan, asked.before, asked.count)
    compile_ahead(loaded.model, plan, spec.prefill, asked.ids, chunks=spec.chunks, context=asked.context)
    start = time.perf_counter()
    with running(loaded.model, plan, spec.prefill, spec.chunks) as session:
        try:
            context, counter = _context(session, asked, kept)
            over = None if context is None else context.held
            if asked.endless:
                tokens = session.follow(asked.ids, asked.most, asked.given, asked.context, over)
            else:
                tokens = session.generate(asked.ids, asked.most, asked.context, asked.stop, over)[0].tolist()
        finally:
            ran |= session.applied.backends
        peak = session.peak.bytes
    seconds = time.perf_counter() - start - counter.seconds
    answer = Answer(tokens, seconds, counter.density, backends_name(ran), peak, skipped_share=counter.skipped_share)
    if context is not None:
        last.keep(context)
    return spec.sample(loaded, item, answer)


def _context(
    session: Session, asked: Asked, kept: Context | None, into: CacheSlot | None = None
) -> tuple[Context | None, PairCounter]:
    """What the method reads before a question, now unless it is ``kept``; and what counts on from there, if it counts."""
    applied, counter = session.applied, PairCounter()
    if kept is not None and kept.counter is not None and asked.count:
        counter = kept.counter.copy()
    applied.observer = counter if asked.count else None
    if kept is not None:
        applied.backends |= kept.backends
    elif asked.context:
        kept = Context.read(session, asked.before, asked.ids.shape[1] - asked.context, into)
    return kept, counter


class Together:
    """Samples whose texts decode together, each told to its own worker."""

    def __init__(self, spec: AnswerSpec[Any], loaded: LoadedModel, batch: Batch) -> None:
        self.spec = spec
        self.loaded = loaded
        self.batch = batch
        self._session = KeptOpen(loaded.model, spec.prefill, spec.chunks)
        self._last = LastContext()
        self._at_work: dict[Text, tuple[Given, PairCounter, float]] = {}
        self._again: deque[Given] = deque()
        """Begun once, and given up where memory did not suffice for as many as there were."""

    @torch.inference_mode()
    def run(self, given: Iterable[Given]) -> None:
        """Measure all; the next is taken when there is room for it."""
        following = iter(given)
        try:
            while True:
                while not self.batch.full:
                    one = self._again.popleft() if self._again else next(following, None)
                    if one is None:
                        break
                    self._begin(one)
                if self.batch.texts:
                    self._advance()
                elif not self._again:
                    return
        finally:
            self._session.close()

    def _begin(self, one: Given) -> None:
        item, worker = one
        worker.step(item.title)
        done = attempt(partial(self._read, one))
        if not isinstance(done, Failure):
            if self.batch.ended(done):
                self._end(done)
            return
        self._session.close()
        if done.status == OUT_OF_MEMORY and self.batch.slots > 1:
            self._fewer(one)
        else:
            worker.end(done)

    def _read(self, one: Given) -> Text:
        item, worker = one
        asked, plan, slot = self.spec.asked(self.loaded, item), self.spec.plans[item.plan], self.batch.free_slot
        kept = self._last.take(plan, asked.before, asked.count)
        session = self._session.under(plan, asked.ids, slot, asked.context)
        start = time.perf_counter()
        try:
            context, counter = _context(session, asked, kept, slot)
            over = None if context is None else context.held
            assert over is None or isinstance(over, CacheSlot)
            text = self.batch.read(
                session,
                asked.ids,
                asked.most,
                endless=asked.endless,
                given=asked.given,
                context=asked.context,
                stop=asked.stop,
                over=over,
            )
        finally:
            worker.ran |= session.applied.backends
        if context is not None:
            self._last.keep(context, slot)
        self._at_work[text] = one, counter, time.perf_counter() - start - counter.seconds
        return text

    def _advance(self) -> None:
        if self.batch.runs_model:
            self._session.close()
        if self._last.slot is not None and not self.batch.holds(self._last.slot):
            self._last.drop()
        ended = attempt(self.batch.advance)
        if not isinstance(ended, Failure):
            for text in ended:
                self._end(text)
        elif ended.status == OUT_OF_MEMORY and self.batch.slots > 1:
            self._fewer()
        else:
            for text in self.batch.drop():
                (_, worker), *_ = self._at_work.pop(text)
                worker.end(ended)

    def _fewer(self, *also: Given) -> None:
        """Begin again with room for half as many."""
        self._last.drop()
        dropped = [self._at_work.pop(text)[0] for text in self.batch.drop()]
        self.batch.resize(max(1, len(dropped) // 2))
        self._again.extendleft(reversed([*dropped, *also]))

    def _end(self, text: Text) -> None:
        (item, worker), counter, prefill = self._at_work.pop(text)
        if text.error is not None:
            worker.end(Failure(FAILED, describe(text.error)))
            return
        answer = Answer(
            tokens=text.tokens,
            seconds=prefill + text.seconds,
            density=counter.density,
            skipped_share=counter.skipped_share,
            backends=backends_name(worker.ran),
            peak_memory=text.peak,
            decode=self.batch.kind,
            batch_size=text.beside,
        )
        worker.keep(self.spec.sample(self.loaded, item, answer))
        worker.end(None)
