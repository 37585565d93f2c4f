"""Answers to many samples: prompts are read one by one by their methods, and what follows is decoded together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from tmbench.engine.batch import GRAPH, SIZES, Batch, Text
from tmbench.engine.compiled_layers import Runners, compiled
from tmbench.engine.decode_kind import step_kind
from tmbench.engine.density import PairCounter
from tmbench.engine.prefill import COMPILED
from tmbench.engine.session import compile_ahead, running
from tmbench.errors import UserError
from tmbench.methods.plan import backends_name
from tmbench.results.failures import Failure, attempt, describe
from tmbench.results.rows import FAILED, OUT_OF_MEMORY, PLAIN_LOOP

if TYPE_CHECKING:
    from tmbench.measure.accuracy import AccuracyItem, AccuracySpec
    from tmbench.measure.executor import Worker
    from tmbench.models.loading import LoadedModel

    Given = tuple[AccuracyItem, Worker]


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one sample's prompt, and how."""

    tokens: Sequence[int]
    seconds: float
    """Of its prefill and of its decoding; where several decode together, of its share of that."""
    density: float | None
    backends: str
    peak: int | None
    decode: str = PLAIN_LOOP
    batch_size: int = 1
    """How many texts were decoded together, itself among them."""


def batch_for(spec: AccuracySpec, loaded: LoadedModel, room: int, new: int) -> Batch | None:
    """A batch for texts of up to ``room`` tokens, ``new`` of them new; None where they are to be decoded one by one.

    Raises UserError where the user wants several at once and the model cannot do that.
    """
    wish, on_gpu = spec.batch_size, loaded.device.type == "cuda"
    if (wish or 1) == 1 and not on_gpu:
        return None
    kind, obstacle = step_kind(loaded.model, spec.prefill, room)
    if kind is None:
        if wish is not None and wish > 1:
            raise UserError(
                f"--batch-size {wish}: {loaded.name} decodes one text at a time, {obstacle}: leave the option out"
            )
        return None
    runners = compiled(loaded.model) if spec.prefill == COMPILED else Runners()
    size = max(SIZES) if wish is None else wish
    return Batch(loaded.model, room, new, size=size, graph=kind == GRAPH, runner=runners.decode_layer)


class Answering:
    """Samples that are answered together, each told to its own worker."""

    def __init__(self, spec: AccuracySpec, loaded: LoadedModel, batch: Batch) -> None:
        self.spec = spec
        self.loaded = loaded
        self.batch = batch
        self._at_work: dict[Text, tuple[Given, PairCounter, float]] = {}
        self._again: deque[Given] = deque()
        """Begun once, and given up where memory did not suffice for as many as there were."""

    @torch.inference_mode()
    def run(self, given: Iterable[Given]) -> None:
        """Answer all; the next is taken when there is room for it."""
        following = iter(given)
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

    def _begin(self, one: Given) -> None:
        item, worker = one
        worker.step(item.title)
        done = attempt(partial(self._read, one))
        if not isinstance(done, Failure):
            if self.batch.ended(done):
                self._end(done)
        elif done.status == OUT_OF_MEMORY and self.batch.slots > 1:
            self._fewer(one)
        else:
            worker.end(done)

    def _read(self, one: Given) -> Text:
        (item, worker), sample = one, one[0].sample
        ids = torch.tensor([sample.ids], device=self.loaded.device)
        model, plan, kind = self.loaded.model, self.spec.plans[item.plan], self.spec.prefill
        compile_ahead(model, plan, kind, ids, into=self.batch.free_slot)
        counter = PairCounter()
        start = time.perf_counter()
        with running(model, plan, kind) as session:
            session.applied.observer = counter if item.count else None
            try:
                text = self.batch.read(session, ids, sample.max_new_tokens)
            finally:
                worker.ran |= session.applied.backends
        self._at_work[text] = one, counter, time.perf_counter() - start - counter.seconds
        return text

    def _advance(self) -> None:
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
            backends=backends_name(worker.ran),
            peak=text.peak,
            decode=self.batch.kind,
            batch_size=text.beside,
        )
        worker.keep(self.spec.prediction(self.loaded, item, answer))
        worker.end(None)
