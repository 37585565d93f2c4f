"""Tokenizers of three kinds, trained here on generated text, and sources that never reach for the network."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ruler_tasks import Sources
from ruler_tasks.draws import draw_number, draw_uuid, draw_word, word_pool
from ruler_tasks.prose import sentences


def corpus() -> list[str]:
    rng = random.Random(0)
    text = sentences(rng, 20_000)
    text += [" ".join(rng.sample(word_pool(), 12)) for _ in range(400)]
    return text + [f"{draw_word(rng)} {draw_number(rng)} {draw_uuid(rng)}\n" for _ in range(600)]


def wrapped(core: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_level_core() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus(), trainer)
    return core


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, no special tokens added."""
    return wrapped(byte_level_core())


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts a BOS in front and an EOS behind."""
    core = byte_level_core()
    ids = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return wrapped(core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over text with spaces turned into a visible mark that words begin with, as sentencepiece has them."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<unk>", "<s>"],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n"],
        show_progress=False,
    )
    core.train_from_iterator(corpus(), trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return wrapped(core, bos_token="<s>", unk_token="<unk>")


class SlowTokenizer:
    """As much of a slow tokenizer as there is need of: words and pieces of at most four characters, and a BOS."""

    is_fast = False

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        ids = [1] if add_special_tokens else []
        for word in text.replace("\n", " \n ").split(" "):
            ids += [2 + len(word[start : start + 4]) for start in range(0, max(len(word), 1), 4)]
        return {"input_ids": ids}


@pytest.fixture(scope="session")
def slow_tokenizer() -> SlowTokenizer:
    return SlowTokenizer()


@pytest.fixture(params=["plain_tokenizer", "bos_tokenizer", "metaspace_tokenizer", "slow_tokenizer"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def sources() -> Sources:
    return Sources(offline=True)
