"""Prompts whose answer is known, as token ids: what a probe differentiates, and what a loss is taken over.

A RULER task asks what its generator knows; where several answers are right in any order, the first of the references counts
as the next one. Prompt and answer are tokenised as one text, so the first answer token is the one that follows this prompt
there. Tokens of white space before the answer, which some tokenizers split off, belong to the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from ruler_tasks import TASKS, encode_prompt, examples, load_wording, minimum_length, question_start
from tmbench.errors import UserError
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.suites.prompt_files import PromptFile
from tmbench.suites.prompts import Kind, check_asked_later, check_kind, key_value, key_value_text, offline_sources
from tmbench.suites.split import shared, split


@dataclass(frozen=True)
class Question:
    """One prompt and its answer."""

    task: str
    index: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """The ids that should follow, at least one."""
    source: str
    """What the prompt is made of."""
    id: str = ""
    """What the user calls it, of a file of prompts."""
    context: int = 0
    """How many of the prompt's ids stand before its question, where that was asked for."""

    @property
    def told(self) -> dict[str, str]:
        """What a kept sample says of it beside its own figures."""
        return {"id": self.id} if self.id else {}

    @cached_property
    def prompt_hash(self) -> str:
        """A hash of the prompt's ids."""
        return of_ids(self.prompt)

    @cached_property
    def answer_hash(self) -> str:
        """A hash of the answer's ids."""
        return of_ids(self.answer)


def check_task(task: Kind, length: int, loaded: LoadedModel, count: int = 1, ask_later: bool = False) -> None:
    """Raise UserError for a task that this model cannot be asked or that there is none of, or a length too short for it.

    Also for a file that has not ``count`` prompts that fit this length, and for prompts that are to be asked later and do
    not say where their questions begin.
    """
    if isinstance(task, PromptFile):
        task.answered(loaded, length, count - 1)
        for number in range(count * ask_later):
            task.context(loaded, length, number)
        return
    if ask_later:
        check_asked_later(task)
    check_kind(task, "--task")
    if task == "random":
        if length < 2:
            raise UserError(f"--length {length} is too short for {task}, which needs 2 tokens")
        return
    tokenizer = loaded.need_tokenizer(f"--task {task}", "use --task random, or another --model")
    if task == "kv":
        _key_value_ids(length, tokenizer, "0/0")
    else:
        least = minimum_length(task, tokenizer, sources=offline_sources())
        if length < least:
            raise UserError(f"--length {length} is too short for {task}, which needs {least} tokens here")


def longest_prompt(task: Kind, length: int, loaded: LoadedModel) -> int:
    """How many tokens of ``length`` a prompt of the task has at most, less its answer or the room for it."""
    if isinstance(task, PromptFile):
        return task.longest_prompt(loaded, length)
    return length - (TASKS[task].tokens_to_generate if task in TASKS else 1)


def wording_hash(task: str) -> str:
    """What the wording of a task's prompts is known by; "" for those that are not RULER's."""
    return load_wording().hash if task in TASKS else ""


def questions(
    task: Kind, length: int, numbers: Iterable[int], loaded: LoadedModel, seed: int, ask_later: bool = False
) -> Iterator[Question]:
    """Questions of a task by number: prompt and answer, or the room that RULER leaves it, take at most ``length`` tokens.

    Question 17 is the same whether 20 or 500 are asked for. To be asked later, each says how long its context is. Raises as
    ``check_task`` does.
    """
    if isinstance(task, PromptFile):
        for index in numbers:
            prompt, answer, name = task.answered(loaded, length, index)
            context = task.context(loaded, length, index) if ask_later else 0
            yield Question(str(task), index, prompt, answer, task.path.name, name, context)
        return
    check_task(task, length, loaded, ask_later=ask_later)
    if task == "random":
        vocabulary = loaded.model.config.get_text_config().vocab_size
        for index in numbers:
            ids = random.Random(f"{seed}/{index}").choices(range(vocabulary), k=length)
            yield Question(task, index, tuple(ids[:-1]), (ids[-1],), "random")
        return
    tokenizer = loaded.need_tokenizer(f"--task {task}")
    if task == "kv":
        for index in numbers:
            prompt, answer = _key_value_ids(length, tokenizer, f"{seed}/{index}")
            yield Question(task, index, prompt, answer, "uuids")
        return
    for example in examples(task, length, numbers, tokenizer=tokenizer, seed=seed, sources=offline_sources()):
        wanted = example.outputs if TASKS[task].metric == "all" else example.outputs[:1]
        prompt, answer = split(example.prompt, " " + " ".join(wanted), tokenizer)
        before = example.prompt[: question_start(example, load_wording())] if ask_later else ""
        context = shared(encode_prompt(tokenizer, before), prompt) if before else 0
        yield Question(task, example.index, prompt, answer, example.source, context=context)


def _key_value_ids(length: int, tokenizer: PreTrainedTokenizerBase, seed: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A key-value prompt with as many pairs as fit; raises UserError where not one does."""
    few, many = 1, 65
    shorter, longer = (len(encode_prompt(tokenizer, key_value_text(pairs, 0))) for pairs in (few, many))
    pairs = max(1, (length - shorter) * (many - few) // (longer - shorter) + 2)
    while pairs:
        prompt, answer = split(*key_value(pairs, seed), tokenizer)
        excess = len(prompt) + len(answer) - length
        if excess <= 0:
            return prompt, answer
        pairs -= max(1, excess * (many - few) // (longer - shorter))
        pairs = max(pairs, 0)
    raise UserError(f"--length {length} is too short for kv: give at least {len(prompt) + len(answer)}")
