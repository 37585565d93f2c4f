"""Long answers: where a method's greedy decoding leaves dense's, and how often its next token is dense's own.

Dense writes so many tokens by greedy decoding, its end token left out so that every text has that length. A method reads the
same prompt in its own way, then dense's text token by token, and at each place its likeliest next token is its choice. Up to
the first choice that differs this is the method's own greedy decoding, so that place is where the two diverge. After it the
method goes on along dense's text: one different token does not count against all the tokens that come after it.

Choices go to a JSONL file beside the CSV, one line per sample, so that a killed run goes on with the next sample.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tmbench.engine.attention import applied_plan
from tmbench.engine.decode import Decoding, end_tokens
from tmbench.errors import UserError
from tmbench.methods.table import Plan, backends_name
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results.choices import Choices, choices_of, read_choices
from tmbench.results.environment import Environment
from tmbench.results.failures import describe, release_memory, status_of
from tmbench.results.rows import FAILED, OK, AgreeRow, Status, now
from tmbench.results.sample_files import Kept, is_of, measured_before
from tmbench.results.tables import append, newest
from tmbench.suites.prompts import prompt_ids


@dataclass(frozen=True)
class AgreeJob:
    """What one ``tmbench agree`` measures."""

    loaded: LoadedModel
    plans: Sequence[Plan]
    """Dense is the first: the others are held against its text."""
    lengths: Sequence[int]
    environment: Environment
    root: Path
    prompt: str = "kv"
    samples: int = 10
    new_tokens: int = 256
    seed: int = 42
    overwrite: bool = False
    hashes: dict[tuple[str, int, int], str] = field(default_factory=dict)
    """Of the prompts, by kind, length and seed, as they are made."""

    def __post_init__(self) -> None:
        if self.plans[0].method != "dense":
            raise ValueError("the first plan must be dense, whose text the other methods follow")

    def check_lengths(self) -> None:
        """Raise UserError for a prompt that leaves no room for the new tokens."""
        limit = self.loaded.longest
        for length in self.lengths:
            if limit is not None and length + self.new_tokens > limit:
                raise UserError(
                    f"--length {length} and --new-tokens {self.new_tokens} are more than the {limit} positions of "
                    f"{self.loaded.name}: give a length of {max(limit - self.new_tokens, 1)} or less, or fewer new tokens"
                )

    def row(self, plan: Plan, length: int) -> AgreeRow:
        """A row as far as it is known before it is measured."""
        known: dict[str, Any] = {
            **self.environment.row_fields(),
            **self.loaded.row_fields(),
            **plan.row_fields(),
            "length": length,
            "seed": self.seed,
            "prompt": self.prompt,
            "prompt_hash": self.prompt_hash(length, 0),
            "samples": self.samples,
            "new_tokens": self.new_tokens,
        }
        return AgreeRow(time=now(), **known)

    def prompt_hash(self, length: int, number: int) -> str:
        """A hash of the token ids of a sample's prompt."""
        about = self.prompt, length, self.seed + number
        if about not in self.hashes:
            self.hashes[about] = of_ids(self.ids(length, number)[0].tolist())
        return self.hashes[about]

    def ids(self, length: int, number: int) -> Tensor:
        """A sample's prompt, ``[1, length]`` on the model's device."""
        return prompt_ids(self.prompt, length, self.loaded, self.seed + number)


@dataclass(frozen=True)
class Step:
    """One sample done, or one begun: what to show, how many samples it was, and the row where one was finished."""

    text: str
    samples: int = 0
    row: AgreeRow | None = None
    measured: int = 0
    """How many samples were read now, and not before."""


def run(job: AgreeJob) -> Iterator[Step]:
    """Let every plan answer, dense first, and append each row as it is finished.

    Raises UserError for a model or a folder that cannot be used; a method that fails becomes a row.
    """
    for length in job.lengths:
        texts: dict[int, Choices] | None = None
        for plan in job.plans:
            found = yield from _measure(job, plan, length, texts)
            texts = found if texts is None else texts


def kept_choices(root: Path, row: AgreeRow) -> Kept:
    """The file of what was chosen in a row's samples."""
    return Kept(root, row, row.prompt, "choices")


@torch.inference_mode()
def follow(
    model: PreTrainedModel,
    plan: Plan,
    ids: Tensor,
    count: int,
    text: Sequence[int] | None = None,
    ran: set[str] | None = None,
) -> list[int]:
    """The likeliest token, the model's end tokens aside, at each of ``count`` places behind a prompt.

    Args:
        ids: the prompt, ``[1, length]``, on the model's device; it is read with the plan's patterns.
        text: ``count`` tokens that are read one by one behind the prompt, with dense attention over the full cache; None
            reads the choices themselves, which is greedy decoding.
        ran: is given what ran, as "pattern:backend", also where this fails.
    """
    ends = end_tokens(model)
    chosen: list[int] = []
    with applied_plan(model, plan) as session:
        try:
            decoding = Decoding(model, ids)
        finally:
            if ran is not None:
                ran |= session.backends
        session.check_complete()
        while True:
            logits = decoding.logits[0]
            logits[ends] = -torch.inf
            chosen.append(int(logits.argmax()))
            if len(chosen) == count:
                return chosen
            decoding.read(chosen[-1:] if text is None else [text[len(chosen) - 1]])


def _measure(
    job: AgreeJob, plan: Plan, length: int, texts: Mapping[int, Choices] | None
) -> Generator[Step, None, dict[int, Choices]]:
    """One row; ``texts`` are dense's by sample, None for dense itself. Returns what was chosen, by sample."""
    row = job.row(plan, length)
    file = kept_choices(job.root, row)
    have = newest(job.root, AgreeRow, row.device, row.method).get(row.key)
    if job.overwrite:
        file.clear()
    kept = read_choices(file.path)
    known = {n: one for n, one in kept.items() if n < job.samples and one.prompt_hash == job.prompt_hash(length, n)}
    if texts is not None:
        # Made behind another text of dense, for instance by another version of torch: these choices say nothing of this one.
        known = {n: one for n, one in known.items() if n not in texts or one.reference == texts[n].chosen}
    wanted = range(job.samples)
    done_before = isinstance(have, AgreeRow) and not job.overwrite and measured_before(have, known, wanted)
    whole = isinstance(have, AgreeRow) and (have.status != OK or choices_of(job.root, asdict(have)))
    if isinstance(have, AgreeRow) and done_before and whole and is_of(have, [one.seconds for one in kept.values()]):
        yield Step(f"{plan.method} at {length}: measured before", samples=job.samples)
        return known
    status: Status = OK
    error = ""
    ran: set[str] = set()
    for number in wanted:
        if texts is not None and number not in texts:
            status, error = FAILED, "dense wrote no text to follow"
        fresh = number not in known and status == OK
        if fresh:
            yield Step(f"{plan.method} at {length}, sample {number + 1} of {job.samples}")
            try:
                known[number] = _choose(job, plan, length, number, texts, ran)
            except Exception as problem:
                status, error = status_of(problem), describe(problem)
                release_memory()
            else:
                file.add(known[number])
        yield Step("", samples=1, measured=int(fresh))
    measured: dict[str, Any] = {}
    if status == OK:
        found = [known[number] for number in wanted]
        measured = {
            "agreement": statistics.mean(one.agreement for one in found),
            "divergence_median": statistics.median(one.divergence for one in found),
            "identical": sum(one.divergence == job.new_tokens for one in found) / len(found),
            "seconds_per_sample": statistics.mean(one.seconds for one in found),
            "choices": file.name,
        }
    ran.update(*(known[number].backends.split("+") for number in wanted if number in known))
    finished = replace(row, time=now(), status=status, error=error, backends=backends_name(ran), **measured)
    append(job.root, finished)
    yield Step("", row=finished)
    return known


def _choose(
    job: AgreeJob, plan: Plan, length: int, number: int, texts: Mapping[int, Choices] | None, ran: set[str]
) -> Choices:
    """One sample's choices; ``ran`` is given what ran, which is there of a failure too."""
    ids = job.ids(length, number)
    own: set[str] = set()
    text = None if texts is None else texts[number].chosen
    start = time.perf_counter()
    try:
        chosen = follow(job.loaded.model, plan, ids, job.new_tokens, text, ran=own)
    finally:
        ran |= own
    seconds = time.perf_counter() - start
    reference = tuple(chosen) if text is None else text
    return Choices(number, tuple(chosen), reference, seconds, backends_name(own), job.prompt_hash(length, number))
