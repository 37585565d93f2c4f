"""Training reads what it means to read, and trains the model that is saved."""

import random
import re
import uuid
from pathlib import Path

import data
import pytest
import torch
from model import Stream, config
from optimizers import orthogonalised
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

import writing

TINY = Path(__file__).resolve().parents[2] / "tmbench" / "models" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def writer(tokenizer):
    return writing.Writer(tokenizer.backend_tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("length", [128, 256, 512, 1024, 4096])
@pytest.mark.parametrize("kind", data.KINDS)
def test_rows_are_the_tokens_of_their_text(kind, length, tokenizer, writer):
    if length < data.shortest(kind):
        pytest.skip("this kind begins at longer rows")
    draw = random.Random(f"{kind} {length}")
    for _ in range(6):
        row = data.KINDS[kind](draw, writer, length)
        assert tokenizer.encode(tokenizer.decode(row.ids[1:])) == row.ids
        assert row.answers
        assert all(row.ids[stop - 1] == writing.EOS for _, stop in row.answers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", data.KINDS)
def test_rows_fit_and_fill_their_length(kind, writer):
    draw = random.Random(kind)
    sizes = [len(data.KINDS[kind](draw, writer, 4096).ids) for _ in range(5)]
    assert max(sizes) <= 4096
    assert max(sizes) > 0.75 * 4096


@pytest.mark.slow
@pytest.mark.parametrize("kind", data.KINDS)
def test_rows_are_worded_like_the_evaluation(kind, tokenizer, writer):
    from ruler_tasks import Sources, examples

    sample = next(iter(examples(kind, 2048, [0], tokenizer=tokenizer, sources=Sources(offline=True))))
    draw = random.Random(kind)

    def shape(text: str) -> str:
        """The words that no two samples share, struck out."""
        text = re.sub(r"(?<=of )(?:\S+-\S+|[\w-]+ [\w-]+-\S+)(?:,? .*?)?(?= does| in the text)", "KEY", text)
        return (
            re.sub(r"\d+|Question: .*(?= Answer:)|\?.*\?", "#", text) if kind.startswith("qa") else re.sub(r"\d+", "#", text)
        )

    end = sample.prompt[sample.prompt.rindex("\n") :]
    tails = set()
    for _ in range(30):
        row = data.KINDS[kind](draw, writer, 2048)
        text = tokenizer.decode(row.ids[: row.answers[0][0]])
        tails.add(shape(text[text.rindex("\n") :]))
        assert text.removeprefix(tokenizer.bos_token).startswith(sample.prompt[:40]) or "secret" in text[:60]
    assert shape(end) in tails


@pytest.mark.slow
def test_a_batch_marks_answers_and_padding(writer):
    ids, targets, answers, kinds = data.batch(random.Random(1), writer, 512, 8)
    assert ids.shape == targets.shape == answers.shape == (512 * 8,)
    assert kinds.shape == (8,)
    rows, asked = targets.reshape(8, 512), answers.reshape(8, 512)
    assert (rows[asked > 0] >= 0).all()
    assert ((asked > 0).sum(1) > 0).all()
    following = ids.reshape(8, 512)[:, 1:]
    known = rows[:, :-1] != -100
    assert (rows[:, :-1][known] == following[known]).all()


def test_the_stream_is_the_model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(512, 0, 1, num_hidden_layers=2)).float()
    ids, targets = torch.randint(0, 512, (2, 3 * 64))
    with torch.no_grad():
        ours = Stream(model, compiled=False, dtype=torch.float32).token_losses(ids, targets, 64)
        logits = model(ids.view(3, 64)).logits
    torch.testing.assert_close(ours, F.cross_entropy(logits.flatten(0, 1), targets, reduction="none"))


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 32), (2, 32, 96)])
def test_orthogonalised_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape), rounds=8))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_the_tokenizer_keeps_digits_and_uuids_in_place(tokenizer):
    draw = random.Random(0)
    assert tokenizer.encode("It is 1234567.") == [
        tokenizer.bos_token_id,
        *tokenizer.encode("It is 1234567.", add_special_tokens=False),
    ]
    assert tokenizer.tokenize(" 1234567")[1:] == list("1234567")
    for _ in range(200):
        text = str(uuid.UUID(int=draw.getrandbits(128), version=4))
        alone = tokenizer.tokenize(text)
        assert len(alone) == 20
        for around in (" {}", " of {} is", " {}.", "\n{}\n", "{}, {}"):
            coded = tokenizer.tokenize(around.format(text, text))
            assert "".join(alone) in "".join(coded)
            assert any(coded[at : at + 20] == alone for at in range(len(coded)))


def test_the_embedded_model_is_small_and_complete(tokenizer):
    assert sum(file.stat().st_size for file in TINY.iterdir() if file.is_file()) <= 16_000_000
    model = LlamaForCausalLM.from_pretrained(TINY)
    assert 5e6 <= sum(p.numel() for p in model.parameters()) <= 9e6
    assert model.config.num_hidden_layers == 8
    assert model.config.max_position_embeddings == 16384
    assert len(tokenizer) <= model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.bfloat16
