"""Tasks of lm-evaluation-harness under methods: prompts are read by each, and the harness scores what comes of it.

A context is read by the method. What follows it, written or given to be scored, is read densely over all before, as in
generation. A text that is scored whole (``loglikelihood_rolling``) is itself the prompt that the method reads. Answers are
kept one by one, and the harness is not needed where they are measured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tmbench.engine.chunk_kind import feeds_chunks
from tmbench.engine.decode import Decoding
from tmbench.engine.density import PairCounter
from tmbench.engine.session import Session, compile_ahead, running
from tmbench.errors import UserError
from tmbench.measure.answering import Answer, AnswerItem, AnswerSpec, Asked, Given
from tmbench.measure.executor import Worker
from tmbench.measure.keeping import RowTarget
from tmbench.measure.loss import following_losses, prompt_losses
from tmbench.measure.shard import row_target
from tmbench.measure.spec import Item, ItemSpec, Part, Place
from tmbench.methods.plan import backends_name
from tmbench.models.loading import LoadedModel
from tmbench.results.lm_eval_rows import LmEvalRow, Response, kept_responses, write_documents
from tmbench.results.rows import FAILED, now, short_hash
from tmbench.results.sample_files import decoded
from tmbench.suites.harness import ROLLING, WRITTEN, Harness, Request, columns_of, harness_version, measures_of

WHAT = "tmbench lm-eval"


@dataclass(frozen=True, kw_only=True)
class HarnessItem(AnswerItem):
    """Requests that one method answers after reading one context once."""

    requests: tuple[Request, ...]
    count: bool
    """Whether the pairs that attention computes are counted."""

    @property
    def work(self) -> float:
        return float(len(self.requests))

    @property
    def places(self) -> Sequence[Place]:
        return [(self.file, request.index) for request in self.requests]

    def without(self, kept: Container[Place]) -> Item | None:
        left = tuple(request for request in self.requests if (self.file, request.index) not in kept)
        return replace(self, requests=left) if left else None


@dataclass(frozen=True, kw_only=True)
class LmEvalSpec(AnswerSpec[LmEvalRow]):
    """What one ``tmbench lm-eval`` measures."""

    harness: Harness
    tasks: Sequence[str]
    """Names of tasks and of groups."""
    lengths: Sequence[int]
    """The most tokens of a prompt and its answer."""

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError for tasks that there are none of."""
        loaded.need_tokenizer(WHAT)
        self.harness.check(self.tasks)

    def parts(self, loaded: LoadedModel) -> Iterator[Part[LmEvalRow]]:
        """One part for each length and task: how much it is, its requests say."""
        tokenizer = loaded.need_tokenizer(WHAT)
        tasks = self.harness.tasks(self.tasks)
        for length, (name, task) in product(self.lengths, tasks.items()):
            requests = self.harness.ask(name, task, tokenizer, length)
            rounds = [self._targets(loaded, name, task, length, requests)]
            yield Part(self, name, f"{name} answered", float(len(self.plans) * len(requests)), rounds)

    def _targets(
        self, loaded: LoadedModel, name: str, task: Any, length: int, requests: Sequence[Request]
    ) -> list[RowTarget[LmEvalRow, Response]]:
        given = self.harness
        known = {
            **self.common(loaded),
            **columns_of(task),
            "length": length,
            "task": name,
            "limit": given.limit,
            "chat_template": given.apply_chat_template,
            "asked_as": given.asked_as,
            "harness": harness_version(),
            "data_hash": short_hash(*(request.prompt_hash for request in requests)),
            "requests": len(requests),
            "truncated": sum(request.truncated for request in requests),
            "prompt_tokens_mean": statistics.mean(request.prompt_tokens for request in requests),
        }
        return [self._target(loaded, number, task, known, requests) for number in range(len(self.plans))]

    def _target(
        self, loaded: LoadedModel, number: int, task: Any, known: Mapping[str, Any], requests: Sequence[Request]
    ) -> RowTarget[LmEvalRow, Response]:
        fields: dict[str, Any] = {**known, **self.plans[number].row_fields(), "time": now()}
        rows = [
            LmEvalRow(**fields, metric=metric, metric_filter=of, higher_is_better=better)
            for metric, of, better in measures_of(task)
        ]
        # What is kept of a request serves every metric, and a run of more documents.
        file = kept_responses(self.root, replace(rows[0], metric="", metric_filter="", limit="", data_hash=""))
        title = f"{self.labels[number]} on {rows[0].task}"
        tokenizer = loaded.need_tokenizer(WHAT)
        return row_target(
            self,
            title,
            _items(title, number, requests),
            {"": file},
            rows=rows,
            make=partial(_scored, self.root, self.harness, task, tokenizer, file.name),
            belongs=_belongs,
        )

    def measure_all(self, given: Iterable[Given]) -> None:
        """Have what is written decoded together where that can be; texts are scored one context after the other."""
        for written, alike in groupby(given, key=lambda one: one[0].requests[0].kind == WRITTEN):
            if written:
                super().measure_all(alike)
            else:
                ItemSpec.measure_all(self, alike)

    def measure(self, item: HarnessItem, worker: Worker) -> None:
        """Have one method read one context, and write behind it or score what stands there."""
        if item.requests[0].kind == WRITTEN:
            super().measure(item, worker)
        else:
            self._score(item, worker)

    def asked(self, loaded: LoadedModel, item: HarnessItem) -> Asked:
        """The context, to be continued."""
        (request,) = item.requests
        ids = torch.tensor([request.context], device=loaded.device)
        stop = partial(_ends, loaded.need_tokenizer(WHAT), request.until)
        return Asked(ids, request.most, count=item.count, stop=stop)

    def sample(self, loaded: LoadedModel, item: HarnessItem, answer: Answer) -> Response:
        """What is kept of what was written: the text before the first of those at which it ends."""
        (request,) = item.requests
        text = str(loaded.need_tokenizer(WHAT).decode(answer.tokens, skip_special_tokens=True))
        for end in filter(None, request.until):
            text = text.split(end)[0]
        about = {"text": text, "logprob": 0.0, "greedy": False, "new_tokens": len(answer.tokens)}
        return _response(request, coverage=answer.density, **about, **answer.cost)

    @torch.inference_mode()
    def _score(self, item: HarnessItem, worker: Worker) -> None:
        """The log-likelihoods of what follows one context."""
        loaded, plan = worker.loaded, self.plans[item.plan]
        counter = PairCounter()
        rolling = item.requests[0].kind == ROLLING
        first = torch.tensor([item.requests[0].context], device=loaded.device)
        at_once = feeds_chunks(loaded.model, self.prefill)
        longest = 0 if rolling or not at_once else max(len(request.parts[0][1]) for request in item.requests) - 1
        for whole, later in {(rolling, 0), (rolling or at_once, longest)} if first.shape[1] else ():
            compile_ahead(loaded.model, plan, self.prefill, first, every_position=whole, chunks=self.chunks, later=later)
        with running(loaded.model, plan, self.prefill, self.chunks) as session:
            session.applied.observer = counter if item.count else None
            decoding: Decoding | None = None
            for request in item.requests:
                start, looked = time.perf_counter(), counter.seconds
                try:
                    if rolling:
                        logprob, greedy = -math.fsum(_rolled(session, *part) for part in request.parts), False
                    else:
                        # The next text may follow the context that was read for this one, if its cache is as before.
                        if decoding is None or decoding.length != first.shape[1]:
                            decoding = session.read(first)
                            session.applied.observer = None
                        losses, greedy = following_losses(session, decoding, request.parts[0][1], at_once=at_once)
                        logprob = -float(losses.double().sum())
                finally:
                    worker.ran |= session.applied.backends
                session.applied.observer = None
                worker.keep(
                    _response(
                        request,
                        text="",
                        logprob=logprob,
                        greedy=greedy,
                        new_tokens=0,
                        seconds=time.perf_counter() - start - counter.seconds + looked,
                        backends=backends_name(session.applied.backends),
                        coverage=counter.density if request is item.requests[0] else None,
                        peak_memory=session.peak.bytes,
                    )
                )


def _items(title: str, plan: int, requests: Sequence[Request]) -> list[HarnessItem]:
    """Requests in their order, those together that follow each other and have one context to score texts behind."""
    room = max(len(request.context) + request.most for request in requests)
    new = max(request.most for request in requests)
    found = []

    def together(request: Request) -> tuple[Any, ...]:
        alone = request.kind in (WRITTEN, ROLLING)
        return request.kind, request.index if alone else request.context

    for _, alike in groupby(requests, key=together):
        own = tuple(alike)
        number = own[0].index
        shown = f"{title}, request {number + 1} of {len(requests)}"
        found.append(HarnessItem(title=shown, index=number, plan=plan, requests=own, count=number == 0, room=room, new=new))
    return found


def _belongs(item: HarnessItem, kept: Response) -> bool:
    """What was answered to another prompt says nothing of this request."""
    return any((one.index, one.prompt_hash) == (kept.index, kept.prompt_hash) for one in item.requests)


def _response(request: Request, **about: Any) -> Response:
    return Response(
        index=request.index,
        prompt_hash=request.prompt_hash,
        prompt_tokens=request.prompt_tokens,
        truncated=request.truncated,
        **about,
    )


def _ends(tokenizer: PreTrainedTokenizerBase, until: Sequence[str], tokens: Sequence[int]) -> bool:
    """Whether what was written has one of the texts in it at which it ends."""
    text = str(tokenizer.decode(tokens))
    return any(end in text for end in until if end)


def _rolled(session: Session, context: Sequence[int], text: Sequence[int]) -> float:
    """The negative log-likelihood of a text, itself the prompt, with what stands before it."""
    ids: Tensor = torch.tensor([[*context, *text]], device=session.model.device)
    return float(prompt_losses(session, ids)[-len(text) :].double().sum())


def _scored(
    root: Path,
    harness: Harness,
    task: Any,
    tokenizer: PreTrainedTokenizerBase,
    file: str,
    rows: Sequence[LmEvalRow],
    answers: Sequence[Response],
) -> list[LmEvalRow]:
    """The rows with what the harness makes of the answers, ``file`` being the name that they are to give of these."""
    first = rows[0]
    scored = harness.score(first.task, task, tokenizer, first.length, sorted(answers, key=lambda one: one.index))
    declared = {(row.metric, row.metric_filter): row for row in rows}
    about: dict[str, Any] = {
        "sample_files": file,
        "documents": write_documents(root, first, scored.documents),
        "coverage": next((one.coverage for one in answers if one.coverage is not None), None),
        **decoded(answers),
    }
    found = []
    for (metric, of), value in scored.values.items():
        row = declared.get((metric, of)) or replace(first, metric=metric, metric_filter=of, higher_is_better=None)
        if math.isfinite(value):
            found.append(replace(row, value=value, **about))
        else:
            found.append(replace(row, status=FAILED, error=f"lm-eval's {metric} is {value}", **about))
    if not found:
        raise UserError(
            f"--tasks {first.task} has no metric of lm-eval's that is a number: leave it out; its answers are kept"
        )
    return found
