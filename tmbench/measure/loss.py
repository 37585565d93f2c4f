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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tmbench.engine.attention import applied_plan
from tmbench.engine.decode import Decoding
from tmbench.engine.finite import check_logits
from tmbench.errors import UnsupportedModelError
from tmbench.methods.table import METHODS, Plan, Settings, backends_name
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results.environment import Environment
from tmbench.results.failures import describe, release_memory, status_of
from tmbench.results.rows import FAILED, OK, LossRow, Status, now
from tmbench.results.sample_files import Kept
from tmbench.results.tables import append, newest
from tmbench.results.words import counted
from tmbench.suites.questions import Question, check_task, questions, wording_hash

CHUNK_LOGITS = 2**27
"""Logits that are held at a time: half a gigabyte in float32, 1024 tokens of a vocabulary of 128K."""


@dataclass(frozen=True)
class LossSample:
    """One prompt and its answer: a line of the JSONL file. Losses are means over tokens, in nats."""

    index: int
    nll_prompt: float
    nll_answer: float
    nll_first: float
    prompt_tokens: int
    answer_tokens: int
    source: str
    backends: str
    seconds: float
    prompt_hash: str = ""
    """A hash of the prompt's token ids, and of the answer's; "" in files of older versions."""
    answer_hash: str = ""


@dataclass(frozen=True)
class LossJob:
    """What one ``tmbench probe --loss`` measures."""

    loaded: LoadedModel
    plans: Sequence[Plan]
    lengths: Sequence[int]
    tasks: Sequence[str]
    samples: int
    environment: Environment
    root: Path
    seed: int = 42
    overwrite: bool = False

    def row(self, plan: Plan, task: str, length: int) -> LossRow:
        """A row without figures."""
        known: dict[str, Any] = {**self.environment.row_fields(), **self.loaded.row_fields(), **plan.row_fields()}
        return LossRow(
            **known,
            length=length,
            seed=self.seed,
            task=task,
            samples=self.samples,
            wording_hash=wording_hash(task),
            source="",
            time=now(),
        )

    def check(self) -> None:
        """Raise UserError before anything is measured where the model or a length does not do."""
        _base(self.loaded.model)
        for length in self.lengths:
            for task in self.tasks:
                check_task(task, length, self.loaded)


@dataclass(frozen=True)
class Step:
    """One sample done, or about to be: what to show, how many it was, and the row where one was finished."""

    text: str
    samples: int = 0
    row: LossRow | None = None
    measured: int = 0
    """How many samples were read now, and not before."""


def run(job: LossJob) -> Iterator[Step]:
    """Measure task by task; within one dense comes first, and all methods read the same samples.

    Raises UserError for a model, a length or a folder that cannot be used; a method that fails on a task becomes a row.
    """
    job.check()
    plans = sorted(job.plans, key=lambda plan: plan.method != "dense")
    for length in job.lengths:
        for task in job.tasks:
            yield Step(f"{task} at {length}: preparing {counted(job.samples, 'prompt')}")
            asked = list(questions(task, length, job.samples, job.loaded, job.seed))
            # Without dense among the methods its samples of an earlier run do: a row keeps what it is held against.
            dense: Mapping[int, LossSample] = _kept_dense(job, task, length) if plans[0].method != "dense" else {}
            for plan in plans:
                known: dict[int, LossSample] = {}
                yield from _measure(job, plan, task, length, asked, known, dense)
                if plan.method == "dense":
                    dense = known


def _kept_dense(job: LossJob, task: str, length: int) -> dict[int, LossSample]:
    """What dense attention has read of a task before."""
    plan = METHODS["dense"].plan(job.loaded.shape, Settings())
    return Kept(job.root, job.row(plan, task, length), task).read(LossSample)


@torch.inference_mode()
def losses(model: PreTrainedModel, plan: Plan, ids: Tensor, answer: Sequence[int]) -> tuple[Tensor, Tensor, str]:
    """The negative log-likelihood of every token, in nats, and what ran, as "pattern:backend" joined by "+".

    Args:
        model: any model that methods can be applied to.
        plan: the method that reads the prompt.
        ids: the prompt, ``[1, length]`` on the model's device, at least two tokens.
        answer: the ids that follow it, at least one.

    Returns:
        float32 ``[length - 1]`` of the prompt's tokens from the second on, and ``[len(answer)]``, both on the CPU.

    Raises:
        UnsupportedModelError: as ``tmbench.applied``, and for a model whose logits are not made from its hidden states.
        NotFiniteError: logits that are not finite.
    """
    hidden: list[Any] = []
    base = _base(model)
    hook = base.register_forward_hook(lambda module, given, out: hidden.append(out))
    try:
        with applied_plan(model, plan) as session:
            decoding = Decoding(model, ids)
            hook.remove()
            session.check_complete()
            following = [decoding.logits[0], *(decoding.read([token])[0] for token in answer[:-1])]
    finally:
        hook.remove()
    of_answer = F.cross_entropy(torch.stack(following), torch.tensor(answer, device=ids.device), reduction="none")
    of_prompt = _prompt_losses(model, hidden[0].last_hidden_state, ids)
    if not (of_prompt.isfinite().all() and of_answer.isfinite().all()):
        raise RuntimeError("the model masks a token that the text has, so its loss is infinite: use another --task")
    return of_prompt.cpu(), of_answer.cpu(), backends_name(session.backends)


def _prompt_losses(model: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """Of each token but the first, given the base model's output ``[1, length, hidden]``.

    The model's own ``forward`` makes the logits, with whatever it scales or caps them by: for the time of a chunk its base
    model hands over that chunk of what it yielded before.
    """
    base = _base(model)
    before = base.__dict__.get("forward")
    chunk = max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)
    parts = []
    try:
        for start in range(0, ids.shape[1] - 1, chunk):
            end = min(start + chunk, ids.shape[1] - 1)
            part = _Output(last_hidden_state=hidden[:, start:end])
            base.forward = lambda *args, part=part, **kwargs: part
            logits = model(input_ids=ids[:, start:end], use_cache=False, return_dict=True).logits[0].float()
            check_logits(logits, model, "of the prompt's tokens")
            parts.append(F.cross_entropy(logits, ids[0, start + 1 : end + 1], reduction="none"))
    finally:
        if before is None:
            del base.forward
        else:
            base.forward = before
    return torch.cat(parts)


def _base(model: PreTrainedModel) -> Any:
    """The part of the model that yields hidden states; raises UnsupportedModelError where it is not a part."""
    base = model.base_model
    if base is model:
        raise UnsupportedModelError(f"{type(model).__name__} has no base model of its own, which --loss needs")
    return base


def _measure(
    job: LossJob,
    plan: Plan,
    task: str,
    length: int,
    asked: Sequence[Question],
    known: dict[int, LossSample],
    dense: Mapping[int, LossSample],
) -> Iterator[Step]:
    """One method on one task; fills ``known`` with its samples by number."""
    row = job.row(plan, task, length)
    file = Kept(job.root, row, task)
    kept = (file.clear() if job.overwrite else file).read(LossSample)
    hashes = {question.index: (of_ids(question.prompt), of_ids(question.answer)) for question in asked}
    # What was read of another prompt or another answer says nothing of this sample.
    known |= {n: one for n, one in kept.items() if hashes.get(n) == (one.prompt_hash, one.answer_hash)}
    status: Status = OK
    error = ""
    for question in asked:
        fresh = question.index not in known and status == OK
        if fresh:
            yield Step(f"{plan.method} on {task} at {length}, sample {question.index + 1} of {len(asked)}")
            try:
                known[question.index] = _sample(job, plan, question)
            except Exception as problem:
                status, error = status_of(problem), describe(problem)
                release_memory()
            else:
                file.add(known[question.index])
        yield Step("", samples=1, measured=int(fresh))
    figures: dict[str, Any] = {}
    if status == OK:
        samples = [known[question.index] for question in asked]
        figures = {
            "sample_files": file.name,
            "source": "+".join(dict.fromkeys(sample.source for sample in samples)),
            "backends": backends_name(part for sample in samples for part in sample.backends.split("+")),
            "prompt_tokens_mean": statistics.mean(sample.prompt_tokens for sample in samples),
            "answer_tokens_mean": statistics.mean(sample.answer_tokens for sample in samples),
            "seconds_per_sample": statistics.mean(sample.seconds for sample in samples),
        }
        for name in ("nll_prompt", "nll_answer", "nll_first"):
            figures[name] = statistics.mean(getattr(sample, name) for sample in samples)
            if plan.method != "dense" and all(sample.index in dense for sample in samples):
                apart = [getattr(sample, name) - getattr(dense[sample.index], name) for sample in samples]
                figures[f"{name}_vs_dense"] = statistics.mean(apart)
    finished = replace(row, time=now(), status=status, error=error, **figures)
    have = newest(job.root, LossRow, row.device, row.method).get(row.key)
    about: dict[str, Any] = {name: getattr(have, name, None) for name in ("time", "commit", "dirty", "environment")}
    if have is None or have.status == FAILED or replace(finished, **about) != have:
        append(job.root, finished)
    yield Step("", row=finished)


def _sample(job: LossJob, plan: Plan, question: Question) -> LossSample:
    ids = torch.tensor([question.prompt], device=job.loaded.device)
    start = time.perf_counter()
    of_prompt, of_answer, backends = losses(job.loaded.model, plan, ids, question.answer)
    return LossSample(
        index=question.index,
        nll_prompt=float(of_prompt.double().mean()),
        nll_answer=float(of_answer.double().mean()),
        nll_first=float(of_answer[0]),
        prompt_tokens=ids.shape[1],
        answer_tokens=len(question.answer),
        source=question.source,
        backends=backends,
        seconds=time.perf_counter() - start,
        prompt_hash=of_ids(question.prompt),
        answer_hash=of_ids(question.answer),
    )


@dataclass
class _Output:
    """As much of a base model's output as heads read."""

    last_hidden_state: Tensor
    cache: None = None
    past_key_values: None = None
    hidden_states: None = None
    attentions: None = None
    router_logits: None = None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]
