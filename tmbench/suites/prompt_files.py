"""Prompts of the user's own: a JSONL file of prompts and answers, or plain text that is cut at tokens.

A time or a long answer needs prompts of exactly one length: those of a JSONL file that have as many tokens are taken, and
cut as tmbench's own are. A probe or a loss needs answers: those that fit the length with theirs are taken, and whole. Of
plain text the n-th prompt is the n-th stretch of so many tokens, and its answer the last of them. No seed changes any of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ruler_tasks import encode_prompt
from ruler_tasks.encoding import Encoder
from ruler_tasks.files import check_characters
from tmbench.errors import UserError, shortened
from tmbench.models.loading import LoadedModel
from tmbench.results.files import DECODER, readable
from tmbench.results.files import read_file as read_bytes
from tmbench.results.words import counted
from tmbench.suites.split import shared, split

CONTINUATION = 128
"""How many tokens of plain text are the answer at most, and no more than a quarter of the length."""
FORM = 'give one JSON object a line, such as {"prompt": "...", "question": "...", "answer": "...", "id": "..."}'
Form = Literal["jsonl", "text"]


@dataclass(frozen=True)
class Entry:
    """One line of a JSONL file."""

    line: int
    prompt: str
    question: str = ""
    """What is asked of it, as it is written, and read behind it; "" where that is not said."""
    answer: str = ""
    """What should follow it, as it is written; "" where that is not said."""
    id: str = ""

    @property
    def text(self) -> str:
        """The prompt with its question."""
        return self.prompt + self.question


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts, which pickles: where it is measured its contents are read again, and must be the same."""

    path: Path
    form: Form
    digest: str
    """A hash of its contents."""

    @classmethod
    def of(cls, path: Path, form: Form) -> PromptFile:
        """The file as it is now; raises UserError for one that cannot be read, or that holds no prompts."""
        option = "--prompt-file" if form == "jsonl" else "--prompt text:"
        with readable(path, f"check what {option} names"):
            found = cls(path.absolute(), form, _hashed(read_bytes(path)))
        if form == "jsonl":
            _ = found.entries
        elif not found.text.strip():
            raise UserError(f"{found.option} is empty: give a file with text")
        return found

    def __str__(self) -> str:
        """What rows call it, wherever it lies."""
        return f"{self.form}-{self.digest}"

    @property
    def option(self) -> str:
        """What names it on the command line."""
        return f"--prompt-file {self.path}" if self.form == "jsonl" else f"--prompt text:{self.path}"

    @cached_property
    def text(self) -> str:
        """Its contents; raises UserError where they are others than when the run was started, or no UTF-8."""
        with readable(self.path):
            content = read_bytes(self.path)
        if _hashed(content) != self.digest:
            raise UserError(f"{self.option} has changed since the run was started: start it again")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.option} is no text in UTF-8: give one that is") from error

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The prompts of a JSONL file; raises UserError, naming the line, for what is none."""
        found = []
        ids: dict[str, int] = {}
        for number, line in enumerate(self.text.split("\n"), 1):
            if line.strip():
                entry = _entry(line, number, f"{self.option} line {number}")
                if entry.id and ids.setdefault(entry.id, number) != number:
                    raise UserError(
                        f"{self.option} has the id {shortened(entry.id)!r} in lines {ids[entry.id]} and {number}: "
                        "give each prompt one of its own, or none"
                    )
                found.append(entry)
        if not found:
            raise UserError(f"{self.option} holds no prompts: {FORM}")
        return tuple(found)

    def cut(self, loaded: LoadedModel, length: int, number: int) -> tuple[list[int], str]:
        """The ids of the ``number``-th prompt of this many tokens, more of them in a JSONL file, and what the user calls it.

        Raises UserError where there are not so many.
        """
        if self.form == "text":
            return self._stretch(loaded, length, number), ""
        entry, ids = self._long(loaded, length, number)
        return ids, entry.id

    def answered(self, loaded: LoadedModel, length: int, number: int) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """The ids of the ``number``-th prompt and of its answer, together of at most this many tokens, and its id.

        Raises UserError where there are not so many, or a prompt has no answer.
        """
        if self.form == "text":
            ids = self._stretch(loaded, length, number)
            at = length - continuation(length)
            return tuple(ids[:at]), tuple(ids[at:]), ""
        entry, prompt, answer = self._answered(loaded, length, number)
        return prompt, answer, entry.id

    def context(self, loaded: LoadedModel, length: int, number: int) -> int:
        """How many ids of what ``answered`` has stand before the question; raises UserError where there is none."""
        self._check_questions()
        entry, prompt, _ = self._answered(loaded, length, number)
        return self._before(entry, prompt, loaded)

    def cut_context(self, loaded: LoadedModel, length: int, number: int) -> tuple[list[int], int]:
        """The ids that ``cut`` has, and how many of them stand before the question; raises UserError where there is none."""
        self._check_questions()
        entry, ids = self._long(loaded, length, number)
        return ids, self._before(entry, ids, loaded)

    def _check_questions(self) -> None:
        if self.form == "text":
            raise UserError(f"--ask-later: {self.option} has no questions: give --prompt-file with one in each line")

    def _before(self, entry: Entry, ids: Sequence[int], loaded: LoadedModel) -> int:
        """How many ids of a prompt with its question stand before that."""
        where = f"--ask-later: {self.option} line {entry.line}"
        if not entry.question.strip():
            raise UserError(f"{where} has no question: add one, apart from its prompt")
        before = shared(encode_prompt(self._tokenizer(loaded), entry.prompt), ids)
        if not before:
            raise UserError(f"{where} has no token of its own before its question: give a longer prompt")
        return before

    def count(self, loaded: LoadedModel, length: int) -> int:
        """How many prompts there are that have an answer and fit this many tokens with it."""
        tokenizer = self._tokenizer(loaded)
        if self.form == "text":
            front, body = _text_ids(self, tokenizer)
            return len(body) // max(1, length - len(front))
        return sum(len(prompt) + len(answer) <= length for _, prompt, answer in _answers(self, tokenizer))

    def longest_prompt(self, loaded: LoadedModel, length: int) -> int:
        """How many tokens of ``length`` a prompt has at most, less its answer."""
        if self.form == "text":
            return length - continuation(length)
        parts = ((len(prompt), len(answer)) for _, prompt, answer in _answers(self, self._tokenizer(loaded)))
        return max(prompt for prompt, answer in parts if prompt + answer <= length)

    def shortest(self, loaded: LoadedModel) -> int | None:
        """Tokens of the shortest prompt, which all can be cut to; None for plain text."""
        return min(len(ids) for _, ids in self._whole(loaded)) if self.form == "jsonl" else None

    def longest(self, loaded: LoadedModel) -> int | None:
        """Tokens of the longest prompt with its answer, which all fit; None for plain text."""
        if self.form == "text":
            return None
        return max(len(prompt) + len(answer) for _, prompt, answer in _answers(self, self._tokenizer(loaded)))

    def _long(self, loaded: LoadedModel, length: int, number: int) -> tuple[Entry, list[int]]:
        found = [one for one in self._whole(loaded) if len(one[1]) >= length]
        entry, ids = self._at(found, number, f"of {counted(length, 'token')} or more", "shorter")
        return entry, ids

    def _answered(self, loaded: LoadedModel, length: int, number: int) -> tuple[Entry, tuple[int, ...], tuple[int, ...]]:
        found = [one for one in _answers(self, self._tokenizer(loaded)) if len(one[1]) + len(one[2]) <= length]
        entry, prompt, answer = self._at(found, number, f"of at most {counted(length, 'token')} with the answer", "longer")
        return entry, prompt, answer

    def _at(self, found: Sequence[Any], number: int, which: str, other: str) -> Any:
        if number < len(found):
            return found[number]
        raise UserError(
            f"{self.option} holds {counted(len(found), 'prompt')} {which}, and this run takes {number + 1}: give more, ask "
            f"for fewer, or give a {other} --length"
        )

    def _tokenizer(self, loaded: LoadedModel) -> PreTrainedTokenizerBase:
        return loaded.need_tokenizer(self.option, "use --prompt random, or another --model")

    def _whole(self, loaded: LoadedModel) -> Sequence[tuple[Entry, list[int]]]:
        return _prompts(self, self._tokenizer(loaded))

    def _stretch(self, loaded: LoadedModel, length: int, number: int) -> list[int]:
        """What the tokenizer puts in front, and the ``number``-th stretch of the text that fills the length with it."""
        front, body = _text_ids(self, self._tokenizer(loaded))
        room = length - len(front)
        if room < 1 or len(body) < (number + 1) * room:
            raise UserError(
                f"{self.option} has {counted(len(body), 'token')}, too few for {counted(number + 1, 'prompt')} of --length "
                f"{length}: give a longer text, ask for fewer, or give {'another' if room < 1 else 'a shorter'} --length"
            )
        return [*front, *body[number * room : (number + 1) * room]]

    def __getstate__(self) -> dict[str, Any]:
        # What was read meanwhile is read again where it is asked for.
        return {about.name: getattr(self, about.name) for about in fields(self)}


def continuation(length: int) -> int:
    """How many tokens behind a prompt of plain text are its answer."""
    return max(1, min(CONTINUATION, length // 4))


def _hashed(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _entry(line: str, number: int, where: str) -> Entry:
    try:
        found = DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {FORM}") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str) or not found["prompt"].strip():
        raise UserError(f"{where} has no text as its prompt: {FORM}")
    question, answer, name = (found.get(field, "") for field in ("question", "answer", "id"))
    if not isinstance(question, str):
        raise UserError(f"{where} has a question that is no text: {FORM}")
    if not isinstance(answer, str):
        raise UserError(f"{where} has an answer that is no text: {FORM}")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise UserError(f"{where} has an id that is neither a text nor a whole number: {FORM}")
    entry = Entry(number, found["prompt"], question, answer, str(name))
    try:
        check_characters(entry.text + entry.answer + entry.id)
    except ValueError as error:
        raise UserError(f"{where} has {error}: {FORM}") from error
    return entry


@lru_cache(maxsize=4)
def _text_ids(file: PromptFile, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], list[int]]:
    """What stands in front of a text, and the ids of the whole text without it."""
    encoder = Encoder(tokenizer)
    return encoder.front, encoder.ids(file.text, add_special_tokens=False)


@lru_cache(maxsize=4)
def _prompts(file: PromptFile, tokenizer: PreTrainedTokenizerBase) -> Sequence[tuple[Entry, list[int]]]:
    return [(entry, encode_prompt(tokenizer, entry.text)) for entry in file.entries]


@lru_cache(maxsize=4)
def _answers(
    file: PromptFile, tokenizer: PreTrainedTokenizerBase
) -> Sequence[tuple[Entry, tuple[int, ...], tuple[int, ...]]]:
    """Every prompt's ids and those of its answer; raises UserError where one has none."""
    found = []
    for entry in file.entries:
        if not entry.answer:
            raise UserError(f"{file.option} line {entry.line} has no answer, which a probe or a loss needs: add one")
        try:
            found.append((entry, *split(entry.text, entry.answer, tokenizer)))
        except ValueError as error:
            raise UserError(f"{file.option} line {entry.line}: {error}; give an answer of more text") from error
    return found
