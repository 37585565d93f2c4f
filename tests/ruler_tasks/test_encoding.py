"""The ids of a prompt: what a tokenizer puts in front, once, then the text, then nothing that it would append."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ruler_tasks import TASKS, Sources, encode_prompt, encode_prompts, examples
from ruler_tasks.tokens import TokenCounter

SPECIAL = ("<s>", "</s>", "[gMASK]", "<sop>", "<|im_start|>")
TEXT = "The old lamp was lit. What was lit? The"


Family = Callable[[str], PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def family(plain_tokenizer: PreTrainedTokenizerFast) -> Family:
    """Byte-level BPE with special tokens around a text, as the families' post-processors have them."""

    def make(name: str) -> PreTrainedTokenizerFast:
        single, roles, _ = FAMILIES[name]
        core = Tokenizer.from_str(plain_tokenizer.backend_tokenizer.to_str())
        core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
        ids: dict[str, Any] = {token: core.token_to_id(token) for token in SPECIAL}
        if single == "roberta":
            core.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
        elif single == "bert":
            core.post_processor = processors.BertProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
        elif single is not None:
            used = [(token, number) for token, number in ids.items() if token in single.split()]
            template = processors.TemplateProcessing(single=single, special_tokens=used)
            core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        return PreTrainedTokenizerFast(tokenizer_object=core, **roles)

    return make


BOS, EOS = {"bos_token": "<s>"}, {"eos_token": "</s>"}
FAMILIES: dict[str, tuple[str | None, dict[str, str], tuple[str, ...]]] = {  # and what stands in front
    "qwen": (None, {}, ()),
    "qwen, with a BOS that it does not add": (None, BOS | EOS, ()),
    "llama": ("<s> $A", BOS | EOS, ("<s>",)),
    "an end token": ("$A </s>", EOS, ()),
    "both": ("<s> $A </s>", BOS | EOS, ("<s>",)),
    "both, without roles": ("<s> $A </s>", {}, ("<s>",)),
    "one token for both": ("<s> $A <s>", {"bos_token": "<s>", "eos_token": "<s>"}, ("<s>",)),
    "glm": ("[gMASK] <sop> $A", EOS, ("[gMASK]", "<sop>")),
    "roberta": ("roberta", {"cls_token": "<s>", "sep_token": "</s>"}, ("<s>",)),
    "bert": ("bert", {"cls_token": "<s>", "sep_token": "</s>"}, ("<s>",)),
}


@pytest.fixture(params=list(FAMILIES))
def one(request: pytest.FixtureRequest, family: Family) -> tuple[PreTrainedTokenizerFast, tuple[str, ...]]:
    return family(request.param), FAMILIES[request.param][2]


def test_a_prompt_is_its_front_once_and_its_text(one: tuple[PreTrainedTokenizerFast, tuple[str, ...]]) -> None:
    tokenizer, front = one
    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    own = tokenizer.convert_tokens_to_ids(list(front))
    assert encode_prompt(tokenizer, TEXT) == [*own, *text]
    assert encode_prompt(tokenizer, TEXT, add_special_tokens=False) == text
    # Spelt out in whole or in part, as data that was prepared with a chat template has it.
    for part in range(len(front)):
        assert encode_prompt(tokenizer, "".join(front[part:]) + TEXT) == [*own, *text]
    # Another special token at the beginning is the text's own, and so is an end token in it.
    for own_text in ("<|im_start|>" + TEXT, TEXT + "</s>", TEXT + "</s><|im_start|>"):
        body = tokenizer(own_text, add_special_tokens=False)["input_ids"]
        assert encode_prompt(tokenizer, own_text) == [*own, *body]


def test_a_bos_stands_once_however_often_it_is_spelt(family: Family) -> None:
    tokenizer = family("llama")
    wanted = encode_prompt(tokenizer, TEXT)
    for spelt in ("<s>", "<s><s>", "<s><s><s>"):
        assert encode_prompt(tokenizer, spelt + TEXT) == wanted
        assert encode_prompt(tokenizer, spelt + TEXT, add_special_tokens=False) == wanted
    assert encode_prompt(tokenizer, TEXT + "<s>").count(wanted[0]) == 2, "one in the middle is the text's own"


def test_slow_tokenizers_append_nothing_either() -> None:
    tokenizer = ByT5Tokenizer()
    assert tokenizer(TEXT)["input_ids"][-1] == tokenizer.eos_token_id
    assert encode_prompt(tokenizer, TEXT) == [byte + 3 for byte in TEXT.encode()]


class Stubborn:
    """A tokenizer that puts its special tokens around any text, wanted or not."""

    all_special_ids = (1, 2)
    bos_token_id = 1
    is_fast = False

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": [1, *(ord(letter) for letter in text.replace("<s>", "\1").replace("</s>", "\2")), 2]}


def test_an_end_token_that_cannot_be_refused_is_taken_off() -> None:
    letters = [ord(letter) for letter in TEXT]
    for special in (True, False):
        assert encode_prompt(Stubborn(), TEXT, add_special_tokens=special) == [1, *letters]
        assert encode_prompt(Stubborn(), "<s>" + TEXT, add_special_tokens=special) == [1, *letters]
        assert encode_prompt(Stubborn(), TEXT + "</s>", add_special_tokens=special) == [1, *letters, 2]
    assert TokenCounter(Stubborn()).count([TEXT, "<s>" + TEXT]) == [len(letters) + 1] * 2


def test_what_is_counted_is_what_is_read(one: tuple[PreTrainedTokenizerFast, tuple[str, ...]]) -> None:
    tokenizer, front = one
    texts = [TEXT, "".join(front) + TEXT, "<s><s>" + TEXT, "<s>", "", "  <s>" + TEXT, TEXT + "</s>"]
    for special in (True, False):
        read = [encode_prompt(tokenizer, text, add_special_tokens=special) for text in texts]
        assert TokenCounter(tokenizer).count(texts, add_special_tokens=special) == list(map(len, read))
        assert list(encode_prompts(tokenizer, texts, add_special_tokens=special)) == read


@pytest.mark.parametrize("characters", [1, 60, 1000])
def test_several_prompts_are_encoded_some_at_a_time_and_in_order(
    one: tuple[PreTrainedTokenizerFast, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    tokenizer, _ = one
    monkeypatch.setattr("ruler_tasks.encoding._BATCH", characters)
    texts = [f"{number} {TEXT}" * number for number in range(7)]
    assert list(encode_prompts(tokenizer, texts)) == [encode_prompt(tokenizer, text) for text in texts]
    assert list(encode_prompts(tokenizer, [])) == []


@pytest.mark.slow
@pytest.mark.parametrize("task", ["niah_single_1", "vt", "cwe", "qa_1"])
def test_samples_fill_their_length_with_what_is_read(task: str, sources: Sources, family: Family) -> None:
    """An end token that is not read takes no room, so the samples are those of the tokenizer without one."""
    plain, ending = family("llama"), family("both")
    made = [list(examples(task, 4096, range(3), tokenizer=each, sources=sources)) for each in (plain, ending)]
    assert [example.prompt for example in made[0]] == [example.prompt for example in made[1]]
    for example in made[1]:
        read = len(encode_prompt(ending, example.prompt))
        assert example.length == read + TASKS[task].tokens_to_generate <= 4096
