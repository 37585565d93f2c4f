"""What a method does to a model's negative log-likelihood inside of a prompt, and after it.

TriangleMix (He et al. 2025, arXiv 2507.21526) holds that the middle section of attention serves the tokens inside of a
prompt, and hardly those generated after it. So the prompt is read with the method, as a prefill does, and the answer is
decoded as generation does it: densely over the full cache, one token after the other, with the true tokens given. Both means
are in nats per token; their differences to dense attention are over the same samples.

Logits of the prompt are made for a chunk of tokens at a time, by the model's own head: all at once they would take more
memory than the model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tmbench.engine.chunk_kind import feeds_chunks
from tmbench.engine.chunks import Chunks
from tmbench.engine.decode import Decoding
from tmbench.engine.finite import check_logits
from tmbench.engine.forwards import replace_forward
from tmbench.engine.prefill import Kind as Prefill
from tmbench.engine.session import Session, compile_ahead, running
from tmbench.errors import UnsupportedModelError
from tmbench.measure.executor import Worker
from tmbench.measure.keeping import RowTarget
from tmbench.measure.shard import row_target
from tmbench.measure.spec import Item, Part, PlannedSpec, Step
from tmbench.methods.plan import Plan, backends_name
from tmbench.methods.table import METHODS
from tmbench.models.loading import LoadedModel
from tmbench.results.loss_samples import LossSample, kept_losses
from tmbench.results.rows import LossRow, now
from tmbench.results.sample_files import highest
from tmbench.results.variants import dense_of
from tmbench.results.words import counted
from tmbench.suites.prompts import Kind
from tmbench.suites.questions import Question, check_task, questions, wording_hash

CHUNK_LOGITS = 2**27
"""Logits that are held at a time: half a gigabyte in float32, 1024 tokens of a vocabulary of 128K."""


@dataclass(frozen=True, kw_only=True)
class LossItem(Item):
    """One prompt and its answer, read by one method."""

    plan: int
    """Which of the spec's."""
    question: Question


@dataclass(frozen=True, kw_only=True)
class LossSpec(PlannedSpec[LossRow]):
    """What one ``tmbench probe --loss`` measures."""

    lengths: Sequence[int]
    tasks: Sequence[Kind]
    samples: int
    """Of each task."""

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError before anything is measured where the model or a length does not do."""
        check_model(loaded.model)
        for length in self.lengths:
            for task in self.tasks:
                check_task(task, length, loaded, self.samples, self.ask_later)

    def parts(self, loaded: LoadedModel) -> Iterator[Part[LossRow]]:
        """One part, task by task: dense comes in a first round, as the others' rows are held against its samples."""
        asked = product(self.lengths, map(str, self.tasks))
        total = len(self.plans) * sum(len(self.places(self.samples, *one)) for one in asked)
        yield Part(self, "Loss", "Losses measured", total, self._rounds(loaded))

    def _rounds(self, loaded: LoadedModel) -> Iterator[Step[LossRow] | Sequence[RowTarget[LossRow, LossSample]]]:
        reference = dense_of(self.plans)
        own = [number for number, plan in enumerate(self.plans) if plan is reference]
        others = [number for number, plan in enumerate(self.plans) if plan is not reference]
        for length, task in product(self.lengths, self.tasks):
            places = self.places(self.samples, length, str(task))
            yield Step(f"{task} at {length}: preparing {counted(len(places), 'prompt')}")
            asked = list(questions(task, length, places, loaded, self.seed, self.ask_later))
            known = {**self.common(loaded), **asked_of(task, length), "samples": self.samples}
            if own:
                targets = [self._target(number, known, asked, {}) for number in own]
                yield targets
                dense = {index: sample for (_, index), sample in targets[-1].samples.items()}
            else:
                # Its samples of an earlier run do: a row keeps what it is held against.
                dense = kept_losses(self.root, loss_row(METHODS["dense"].plan(loaded.shape), known)).read()
            yield [self._target(number, known, asked, dense) for number in others]

    def _target(
        self, number: int, known: Mapping[str, Any], asked: Sequence[Question], dense: Mapping[int, LossSample]
    ) -> RowTarget[LossRow, LossSample]:
        row = loss_row(self.plans[number], known)
        title = f"{self.labels[number]} on {row.task} at {row.length}"
        items = [
            LossItem(
                title=f"{title}, sample {question.index + 1} of {self.samples}",
                index=question.index,
                plan=number,
                question=question,
            )
            for question in asked
        ]
        file = kept_losses(self.root, row)
        return row_target(
            self,
            title,
            items,
            {"": file},
            rows=[row],
            make=partial(loss_rows, file.name, dense),
            belongs=belongs,
            more=lambda item: item.question.told,
        )

    def measure(self, item: LossItem, worker: Worker) -> None:
        """Have one method read one prompt and its answer."""
        plan = self.plans[item.plan]
        worker.keep(loss_sample(worker.loaded, plan, self.prefill, item.question, worker.ran, self.chunks))


def asked_of(task: Kind, length: int) -> dict[str, Any]:
    """The columns that say what is asked, before it is known what the prompts are made of."""
    return {"length": length, "task": str(task), "wording_hash": wording_hash(str(task)), "source": ""}


def loss_row(plan: Plan, known: Mapping[str, Any]) -> LossRow:
    """A row before it is measured, by which its samples' file is called."""
    fields: dict[str, Any] = {**known, **plan.row_fields()}
    return LossRow(**fields, time=now())


class Asking(Protocol):
    """An item with a question."""

    @property
    def question(self) -> Question: ...


def belongs(item: Asking, kept: LossSample) -> bool:
    """What was read of another prompt or another answer says nothing of this sample."""
    return (kept.prompt_hash, kept.answer_hash) == (item.question.prompt_hash, item.question.answer_hash)


def loss_rows(
    file: str, dense: Mapping[int, LossSample], rows: Sequence[LossRow], samples: Sequence[LossSample]
) -> list[LossRow]:
    """The means, and how far they are from dense's over the same samples, where it has read them all."""
    (row,) = rows
    figures: dict[str, Any] = {}
    for name in ("nll_prompt", "nll_answer", "nll_first"):
        figures[name] = statistics.mean(getattr(sample, name) for sample in samples)
        if row.method != "dense" and all(sample.index in dense for sample in samples):
            apart = [getattr(sample, name) - getattr(dense[sample.index], name) for sample in samples]
            figures[f"{name}_vs_dense"] = statistics.mean(apart)
    return [
        replace(
            row,
            sample_files=file,
            peak_memory_bytes=highest(sample.peak_memory for sample in samples),
            source="+".join(dict.fromkeys(sample.source for sample in samples)),
            prompt_tokens_mean=statistics.mean(sample.prompt_tokens for sample in samples),
            answer_tokens_mean=statistics.mean(sample.answer_tokens for sample in samples),
            seconds_per_sample=statistics.mean(sample.seconds for sample in samples),
            **figures,
        )
    ]


@torch.inference_mode()
def losses(
    session: Session, ids: Tensor, answer: Sequence[int], context: int = 0, *, at_once: bool = False
) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of every token, in nats.

    Args:
        session: the model, and the method that reads the prompt.
        ids: the prompt, ``[1, length]`` on the model's device, at least two tokens.
        answer: the ids that follow it, at least one.
        context: how many of the prompt's the method reads, before the others see all keys; 0 for all.
        at_once: whether the answer is read in one pass, each of its tokens densely over all before it, as where it is
            decoded; ``chunk_kind.feeds_chunks`` says of which models it can be. Else token by token.

    Returns:
        float32 ``[length - 1]`` of the prompt's tokens from the second on, and ``[len(answer)]``, both on the CPU.

    Raises:
        UnsupportedModelError: as ``tmbench.applied``, and for a model whose logits are not made from its hidden states.
        NotFiniteError: logits that are not finite.
    """
    hidden: list[Any] = []
    hook = _base(session.model).register_forward_hook(lambda module, given, out: hidden.append(out))
    try:
        if at_once:
            session.read_before(ids, answer[:-1], context=context)
        else:
            decoding = session.read(ids, every_position=True, context=context)
    finally:
        hook.remove()
    states = torch.cat([part.last_hidden_state for part in hidden], dim=1)
    following = torch.tensor([answer], device=ids.device, dtype=ids.dtype)
    if at_once:
        whole = _losses(session.model, states, torch.cat([ids, following], dim=1))
        of_prompt, of_answer = whole[: ids.shape[1] - 1], whole[ids.shape[1] - 1 :]
    else:
        logits = [decoding.logits[0], *(decoding.read([token])[0] for token in answer[:-1])]
        of_answer = F.cross_entropy(torch.stack(logits), following[0], reduction="none")
        of_prompt = _losses(session.model, states, ids)
    if not (of_prompt.isfinite().all() and of_answer.isfinite().all()):
        raise RuntimeError("the model masks a token that the text has, so its loss is infinite: use another --task")
    return of_prompt.cpu(), of_answer.cpu()


@torch.inference_mode()
def prompt_losses(session: Session, ids: Tensor) -> Tensor:
    """The negative log-likelihood of a text's tokens from the second on, in nats: float32 ``[length - 1]`` on the CPU.

    The method reads all of ``ids`` ``[1, length]`` but the last, whose logits nobody asks for. Raises as ``losses``.
    """
    hidden: list[Any] = []
    hook = _base(session.model).register_forward_hook(lambda module, given, out: hidden.append(out))
    try:
        session.read(ids[:, :-1], every_position=True)
    finally:
        hook.remove()
    found = _losses(session.model, torch.cat([part.last_hidden_state for part in hidden], dim=1), ids)
    if not found.isfinite().all():
        raise RuntimeError("the model masks a token that the text has, so its loss is infinite: use another text")
    return found.cpu()


@torch.inference_mode()
def following_losses(session: Session, decoding: Decoding, text: Sequence[int], *, at_once: bool) -> tuple[Tensor, bool]:
    """The negative log-likelihood of a text behind what was read, in nats, and whether each of its tokens is the likeliest.

    With ``at_once`` it is read in one pass and ``decoding`` stays where it was, unless ``Decoding.length`` says otherwise;
    ``chunk_kind.feeds_chunks`` says of which models it can be. Else token by token. Each token sees all before it.

    Returns float32 ``[len(text)]`` on the CPU. Raises as ``losses``.
    """
    first = decoding.logits[0]
    if at_once and len(text) > 1:
        hidden: list[Any] = []
        hook = _base(session.model).register_forward_hook(lambda module, given, out: hidden.append(out))
        ids = torch.tensor([text], device=first.device)
        try:
            kept = session.ask(decoding, ids[:, :-1])
        finally:
            hook.remove()
        rest = list(_logits(session.model, hidden[0].last_hidden_state, ids))
        if not kept:
            decoding.length += len(text) - 1
    else:
        ids = torch.tensor([text], device=first.device)
        rest = [decoding.read([token]) for token in text[:-1]]
    logits = torch.cat([first[None], *rest])
    found = F.cross_entropy(logits, ids[0], reduction="none")
    if not found.isfinite().all():
        raise RuntimeError("the model masks a token that the text has, so its loss is infinite: use another text")
    return found.cpu(), bool((logits.argmax(-1) == ids[0]).all())


def _losses(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Of each token but the first, given the base model's output ``[1, length, hidden]`` of all, or of all but the last."""
    found, start = [], 1
    for logits in _logits(model, hidden, ids):
        found.append(F.cross_entropy(logits, ids[0, start : start + len(logits)], reduction="none"))
        start += len(logits)
    return torch.cat(found)


def _logits(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Iterator[Tensor]:
    """The logits of each token of ``ids`` but the first, float32 ``[tokens, vocabulary]``, a chunk of them at a time.

    The model's own ``forward`` makes them, with whatever it scales or caps them by: for the time of a chunk its base model
    hands over that chunk of what it yielded before.
    """
    chunk = max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)
    for start in range(0, ids.shape[1] - 1, chunk):
        end = min(start + chunk, ids.shape[1] - 1)
        part = _Output(last_hidden_state=hidden[:, start:end])
        with ExitStack() as stack:
            replace_forward(stack, _base(model), lambda *args, part=part, **kwargs: part)
            logits = model(input_ids=ids[:, start:end], use_cache=False, return_dict=True).logits[0].float()
        check_logits(logits, model, "of the prompt's tokens")
        yield logits


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a model whose losses cannot be measured."""
    _base(model)


def _base(model: PreTrainedModel) -> Any:
    """The part of the model that yields hidden states; raises UnsupportedModelError where it is not a part."""
    base = model.base_model
    if base is model:
        # Llama 4's text model gives its base model a name that it does not have.
        base = getattr(model, "model", None)
    if not isinstance(base, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} has no base model of its own, which --loss needs")
    return base


def loss_sample(
    loaded: LoadedModel, plan: Plan, prefill: Prefill, question: Question, ran: set[str], chunks: Chunks | None = None
) -> LossSample:
    """The losses of one prompt, read by a plan, and of its answer; what ran is added to ``ran``. Raises as ``losses``."""
    ids = torch.tensor([question.prompt], device=loaded.device)
    at_once = feeds_chunks(loaded.model, prefill)
    later = len(question.answer) - 1 if at_once else 0
    about: dict[str, Any] = {"chunks": chunks, "context": question.context, "later": later}
    compile_ahead(loaded.model, plan, prefill, ids, every_position=True, **about)
    start = time.perf_counter()
    with running(loaded.model, plan, prefill, chunks) as session:
        try:
            of_prompt, of_answer = losses(session, ids, question.answer, question.context, at_once=at_once)
        finally:
            ran |= session.applied.backends
        peak = session.peak.bytes
    return LossSample(
        index=question.index,
        nll_prompt=float(of_prompt.double().mean()),
        nll_answer=float(of_answer.double().mean()),
        nll_first=float(of_answer[0]),
        prompt_tokens=ids.shape[1],
        answer_tokens=len(question.answer),
        source=question.source,
        backends=backends_name(session.applied.backends),
        peak_memory=peak,
        seconds=time.perf_counter() - start,
        prompt_hash=question.prompt_hash,
        answer_hash=question.answer_hash,
    )


@dataclass
class _Output:
    """As much of a base model's output as heads read; what they only hand on, a name for each family, is None."""

    last_hidden_state: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
