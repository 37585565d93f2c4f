"""The embedded model's tokenizer: a small byte-level BPE whose pieces never cross a word, a digit or a punctuation mark.

Every digit is one token, so a number costs as many tokens as it has digits. A uuid is cut into pairs of hex digits (one
token each, 20 tokens a uuid), always at the same places. Text is cut before BPE at boundaries that depend only on the
characters beside them, so the tokens of concatenated pieces are the concatenated tokens wherever a piece ends at a word's
end: `data.py` relies on this to write prompts directly in tokens.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ruler_tasks import draws, invented, prose

VOCABULARY = 3072
BOS, EOS = "<s>", "</s>"
HEX = "0123456789abcdef"

_HEX4 = "[0-9a-f]{4}"
_TAIL = f"(?:-{_HEX4}){{3}}-[0-9a-f]{{12}}(?![0-9a-z])"
# A pair is followed by the rest of its uuid, or (in the last group of twelve) preceded by what comes before.
_FIRST = f"(?:[0-9a-f]{{2}}){{0,3}}{_TAIL}"
_MIDDLE = f"(?:[0-9a-f]{{2}})?(?:-{_HEX4}){{0,2}}-[0-9a-f]{{12}}(?![0-9a-z])"
_LAST = "|".join(f"-{_HEX4}-[0-9a-f]{{{2 * done}}}" for done in range(6))
CUTS = "|".join(
    [
        f"[0-9a-f]{{2}}(?={_FIRST})",
        f"[0-9a-f]{{2}}(?={_MIDDLE})",
        f"(?<={_LAST})[0-9a-f]{{2}}",
        f" (?=[0-9]|[0-9a-f]{{8}}{_TAIL})",
        r" ?[^\W\d_]+",
        r"\d",
        r" ?\.\.\.",
        r" ?[^\s\w]|_",
        r"\s",
    ]
)


def train(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary` entries whose merges come from `texts`."""
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = cut
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(HEX) ** 2,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draft.train_from_iterator(texts, trainer)
    vocab, merges = _with_hex_pairs(draft)

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=16384
    )


def _with_hex_pairs(draft: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The draft's vocabulary and merges, and after them a merge for each pair of hex digits that has none."""
    model = json.loads(draft.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    merges = [(left, right) for left, right in model["merges"]]
    known = set(merges)
    for left in HEX:
        for right in HEX:
            if (left, right) not in known:
                merges.append((left, right))
                vocab.setdefault(left + right, len(vocab))
    return vocab, merges


def corpus(wording: str) -> Iterator[str]:
    """What the merges are learned from: the prompts' wording, prose, documents, and all words of keys and lists."""
    draw = draws.seeded("tokenizer")
    yield from [wording] * 50
    yield from ("\nVAR X = VAR Y \n" for _ in range(200))
    yield from (f" {prose.sentence(draw)}" for _ in range(4000))
    _, documents = invented.two_hop()
    yield from documents[:600]
    for _ in range(4):
        for kind in ("adjective", "noun", "verb"):
            yield from (f" {word}" for word in draws.word_list(kind))
        yield from (f"-{word}" for word in draws.word_list("noun"))


def main() -> None:
    """Train the tokenizer and write it where the model lives."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path("tmbench/models/tiny"))
    parser.add_argument("--wording", type=Path, default=Path("ruler_tasks/wording.toml"))
    options = parser.parse_args()
    wording = options.wording.read_text(encoding="utf-8")
    train(corpus(wording)).save_pretrained(options.output)


if __name__ == "__main__":
    main()
