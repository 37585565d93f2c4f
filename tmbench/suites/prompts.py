"""Prompts of an exact number of tokens, for timing: data-dependent methods cost what their prompt makes them cost."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterable
from functools import cache
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ruler_tasks import TASKS, Example, Sources, encode_prompt, examples, load_wording, minimum_length, question_start
from tmbench.errors import UserError
from tmbench.models.loading import LoadedModel
from tmbench.suites.prompt_files import PromptFile
from tmbench.suites.split import shared

Kind = str | PromptFile
"""What prompts are made of: one of ``prompt_kinds``, or a file of the user's."""
KEPT_END = 256
"""How many tokens of a long text's end always stay: the question must survive the cut."""


def prompt_kinds() -> tuple[str, ...]:
    """What ``--prompt`` takes: key-value retrieval, any RULER task, or random token ids."""
    return ("kv", "random", *TASKS)


def check_kind(kind: str, option: str = "--prompt") -> None:
    """Raise UserError for a kind of prompt that there is none of; ``option`` is what it was given as."""
    if kind not in prompt_kinds():
        raise UserError(f"{option} {kind} is unknown: choose from {', '.join(prompt_kinds())}")


def kind_of(text: str, option: str = "--prompt") -> Kind:
    """The kind that an option names; raises UserError for one that there is none of, and for a file that is no text."""
    form, is_file, path = text.partition(":")
    if is_file and form == "text":
        return PromptFile.of(Path(path), "text")
    check_kind(text, option)
    return text


def check_prompt(kind: Kind, loaded: LoadedModel, lengths: Iterable[int] = (), prompts: int = 1) -> None:
    """Raise UserError for a kind of prompt that there is none of or this model cannot be given, or too short a length.

    Also for a file that has not so many prompts of one of the lengths.
    """
    if isinstance(kind, PromptFile):
        for length in lengths:
            kind.cut(loaded, length, prompts - 1)
        return
    check_kind(kind)
    if kind == "random":
        return
    tokenizer = _tokenizer(kind, loaded)
    if kind not in TASKS:
        return
    least = minimum_length(kind, tokenizer, sources=offline_sources())
    for length in lengths:
        if _asked(kind, length) < least:
            enough = next(longer for longer in count(length) if _asked(kind, longer) >= least)
            raise UserError(f"--length {length} is too short for --prompt {kind}, which needs {enough} tokens here")


def check_asked_later(kind: Kind) -> None:
    """Raise UserError for prompts that do not say where their questions begin."""
    if not isinstance(kind, PromptFile) and kind not in TASKS:
        raise UserError(
            f"--ask-later: prompts of {kind} do not say where their questions begin: use a RULER task or --prompt-file"
        )


@cache
def offline_sources() -> Sources:
    """Generated texts stand in for essays and questions that are not on this machine: nothing is downloaded for a prompt."""
    return Sources(offline=True)


def _option(kind: Kind) -> str:
    return kind.option if isinstance(kind, PromptFile) else f"--prompt {kind}"


def _asked(kind: str, length: int) -> int:
    """The length that a RULER example is asked for: it may fill a little less, so what is too much is cut."""
    return length + length // 16 + TASKS[kind].tokens_to_generate + KEPT_END


def _tokenizer(kind: str, loaded: LoadedModel) -> PreTrainedTokenizerBase:
    return loaded.need_tokenizer(f"--prompt {kind}", "use --prompt random, or another --model")


def prompt_ids(kind: Kind, length: int, loaded: LoadedModel, seed: int = 42, number: int = 0) -> Tensor:
    """Token ids ``[1, length]`` on the model's device; the same for the same arguments and tokenizer.

    The ``number``-th prompt of a file is its own, whatever the seed; of any other kind it is the first of ``seed + number``.
    """
    if isinstance(kind, PromptFile):
        return torch.tensor([_cut_to(kind.cut(loaded, length, number)[0], length)], device=loaded.device)
    check_prompt(kind, loaded, [length])
    if kind == "random":
        generator = torch.Generator().manual_seed(seed + number)
        vocabulary = loaded.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (1, length), generator=generator).to(loaded.device)
    tokenizer = _tokenizer(kind, loaded)
    if kind == "kv":
        text = key_value_text(_pairs_for(length, tokenizer), seed + number)
    else:
        text = _example(kind, length, tokenizer, seed + number).prompt
    return torch.tensor([_cut_to(encode_prompt(tokenizer, text), length)], device=loaded.device)


def _example(task: str, length: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> Example:
    """A RULER example of more tokens than ``length``, which it is to be cut to."""
    asked = _asked(task, length)
    return next(iter(examples(task, asked, [0], tokenizer=tokenizer, seed=seed, sources=offline_sources())))


def prompt_context(kind: Kind, length: int, loaded: LoadedModel, seed: int = 42, number: int = 0) -> int:
    """How many ids of what ``prompt_ids`` has stand before the question.

    Raises UserError for prompts that do not say where it begins, and for a question that the cut would reach into.
    """
    check_asked_later(kind)
    if isinstance(kind, PromptFile):
        ids, context = kind.cut_context(loaded, length, number)
    else:
        tokenizer = _tokenizer(kind, loaded)
        example = _example(kind, length, tokenizer, seed + number)
        ids = encode_prompt(tokenizer, example.prompt)
        context = shared(encode_prompt(tokenizer, example.prompt[: question_start(example, load_wording())]), ids)
    question, kept = len(ids) - context, _kept_end(length)
    if len(ids) > length and question > kept:
        remedy = "give a longer --length" if question <= KEPT_END else "give prompts with shorter questions"
        raise UserError(
            f"--ask-later: a question of {_option(kind)} has {question} tokens, and {kept} are kept of the end of a prompt "
            f"that is cut to --length {length}: {remedy}"
        )
    return length - question


def file_of(kind: Kind) -> str:
    """The name of the file that prompts are read from; "" for those that are made."""
    return kind.path.name if isinstance(kind, PromptFile) else ""


def prompt_id(kind: Kind, length: int, loaded: LoadedModel, number: int) -> str:
    """What the user calls a prompt of a file; "" for all others."""
    return kind.cut(loaded, length, number)[1] if isinstance(kind, PromptFile) else ""


def batch_ids(kind: Kind, length: int, loaded: LoadedModel, seed: int, batch_size: int) -> Tensor:
    """Token ids ``[batch_size, length]`` of different prompts on the model's device, numbered from 0.

    Raises UserError where a length is too short for so many that differ.
    """
    ids = torch.cat([prompt_ids(kind, length, loaded, seed, number) for number in range(batch_size)])
    if len({tuple(own) for own in ids.tolist()}) < batch_size:
        raise UserError(
            f"--batch-size {batch_size} takes as many different prompts, and those of {_option(kind)} are alike at "
            f"--length {length}: give a longer one"
        )
    return ids


def key_value_text(pairs: int, seed: int | str) -> str:
    """A JSON object of so many UUID pairs and a question for one of its values."""
    return key_value(pairs, seed)[0]


def key_value(pairs: int, seed: int | str) -> tuple[str, str]:
    """A prompt as ``key_value_text`` makes it, and the value that it asks for."""
    draw = random.Random(seed)
    data = {str(uuid.UUID(int=draw.getrandbits(128))): str(uuid.UUID(int=draw.getrandbits(128))) for _ in range(pairs)}
    asked = draw.choice(list(data))
    text = f'Find a value in this JSON object.\n{json.dumps(data, indent=0)}\nThe value stored under "{asked}" is "'
    return text, data[asked]


def _pairs_for(length: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many pairs surely make so many tokens, with few to spare: what is cut may hold the answer."""
    few, many = 1, 65
    shorter, longer = (len(encode_prompt(tokenizer, key_value_text(pairs, seed=0))) for pairs in (few, many))
    # Pairs differ by a few tokens: a thirty-second more than the mean asks for.
    return length * (many - few) * 33 // ((longer - shorter) * 32) + 2


def _kept_end(length: int) -> int:
    """How many tokens of its end a prompt keeps that is cut to ``length``."""
    return min(KEPT_END, length // 2)


def _cut_to(ids: list[int], length: int) -> list[int]:
    """Exactly ``length`` of the ids: the start, a cut in the middle, and the end with its question."""
    if len(ids) < length:
        raise ValueError(f"the prompt has {len(ids)} tokens, fewer than the {length} it is for")
    end = _kept_end(length)
    return ids[: length - end] + ids[len(ids) - end :]
