"""A prefix that is kept, and batches that follow it: each prompt is read as alone under the method's mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from served_families import small

import masked
import plans
import tmbench
from tmbench import applied
from tmbench.engine.batch import Batch
from tmbench.engine.chunks import Chunks
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN
from tmbench.engine.session import running
from tmbench.errors import UnsupportedModelError, UserError
from tmbench.methods.table import METHODS

PREFIX, OWN = 40, 30
OFFSETS = (0, 23, 7, OWN - 1)
"""Padding behind the prefix: none, more than the window, less than it, and all but one token."""
WINDOW: dict[str, Any] = {"n_init": 3, "n_local": 9, "last_n": 5}
STATIC = ("dense", "tri_mix", "streaming")
NEW = 5

pytestmark = pytest.mark.usefixtures("graphs", "short_chunks")


@pytest.fixture
def following(prompt):
    """What follows the prefix, ``[4, 30]``, with its mask; padding is noise, so that reading it shows."""
    ids, mask = prompt(OWN, len(OFFSETS)), torch.ones(len(OFFSETS), OWN, dtype=torch.long)
    for row, offset in enumerate(OFFSETS):
        mask[row, :offset] = 0
    return {"input_ids": ids, "attention_mask": mask}


def wholes(prefix, following):
    """Each prompt alone, ``[1, length]``."""
    return [
        torch.cat([prefix, own[None, skipped:]], 1) for own, skipped in zip(following["input_ids"], OFFSETS, strict=True)
    ]


def read_after(session, prefix, ids, mask=None):
    """Of the last token of what follows a prefix in each row, ``[batch, vocabulary]``."""
    with session.prefill() as prefill:
        logits = prefill.after(prefix, ids, mask)
    session.applied.check_complete()
    return logits


def expected_logits(model, plan, ids, start=PREFIX):
    """Of a whole prompt's last token, under the method's masks of the prefix and of what follows it."""
    return masked.logits_under(model, ids, masked.masks_of(plan, ids.shape[1], [(0, start), (start, ids.shape[1])]))[-1]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", PLAIN),
        ("llama", EAGER),
        pytest.param("llama", COMPILED, marks=pytest.mark.slow),
        pytest.param("qwen3", PLAIN, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", STATIC)
@torch.inference_mode()
def test_each_prompt_of_a_padded_batch_is_read_as_alone(family, method, kind, make_model, prompt, following):
    model, prefix = make_model(family).double(), prompt(PREFIX)
    plan = plans.plan_of(model, method, **WINDOW)
    alone = wholes(prefix, following)
    every = [expected_logits(model, plan, ids) for ids in alone]
    with running(model, plan, kind) as session:
        kept = session.keep(prefix)
        for _ in range(2):
            got = read_after(session, kept, following["input_ids"], following["attention_mask"])
            for row, expected in enumerate(every):
                torch.testing.assert_close(got[row].float(), expected.float(), rtol=1e-6, atol=1e-6)
    ids, expected = alone[0], every[0]
    whole = masked.logits_under(model, ids, masked.masks_of(plan, ids.shape[1]))[-1]
    alike = torch.allclose(whole, expected, rtol=1e-3, atol=1e-3)
    assert alike == (method != "tri_mix"), "the prefix has last rows of its own"


@pytest.mark.parametrize("method", STATIC)
@torch.inference_mode()
def test_answers_are_those_of_each_prompt_alone(method, make_model, prompt, following):
    model, prefix = make_model("llama").double(), prompt(PREFIX)
    model.generation_config.eos_token_id = None
    plan = plans.plan_of(model, method, **WINDOW)
    expected = []
    for ids in wholes(prefix, following):
        text, first = ids, expected_logits(model, plan, ids)
        text = torch.cat([text, first.argmax()[None, None]], dim=1)
        for _ in range(NEW - 1):
            masks = masked.masks_of(plan, ids.shape[1], [(0, PREFIX), (PREFIX, ids.shape[1])])
            later = [torch.ones(text.shape[1], text.shape[1], dtype=torch.bool).tril() for _ in masks]
            for own, mask in zip(later, masks, strict=True):
                own[: ids.shape[1], : ids.shape[1]] = mask
            text = torch.cat([text, masked.logits_under(model, text, later)[-1].argmax()[None, None]], dim=1)
        expected.append(text[0, ids.shape[1] :].tolist())
    read = {name: value for name, value in WINDOW.items() if name in METHODS[method].declared}
    with applied(model, method, starting_layer=2 if METHODS[method].deep else None, **read):
        kept = tmbench.read_prefix(model, prefix)
        assert kept.length == PREFIX
        assert tmbench.generate(model, following, NEW, prefix=kept).tolist() == expected
        alone = {"input_ids": following["input_ids"][:1]}
        assert tmbench.generate(model, alone, NEW, prefix=kept).tolist() == expected[:1]
    # The static cache: each text in a slot of its own, without padding.
    with running(model, plan, EAGER) as session:
        kept = session.keep(prefix)
        batch = Batch(model, PREFIX + OWN + NEW, NEW, size=4, graph=False)
        texts = [batch.read(session, ids[:, PREFIX:], NEW, prefix=kept) for ids in wholes(prefix, following)]
    while batch.texts:
        batch.advance()
    assert [text.tokens for text in texts] == expected


@pytest.mark.parametrize("method", [name for name in METHODS if name not in STATIC and "oracle" not in name])
@torch.inference_mode()
def test_other_methods_read_batches_of_one_length_and_refuse_padding(method, make_model, prompt, following):
    """Without padding every method reads what follows as the last chunk of each prompt."""
    model, prefix, ids = make_model("llama").double(), prompt(64), prompt(OWN, 3)
    plan = plans.plan_of(model, method)
    expected = []
    for own in ids:
        with running(model, plan, EAGER, Chunks(64, known=False)) as session:
            expected.append(session.read(torch.cat([prefix, own[None]], 1)).logits[0])
    with running(model, plan, EAGER) as session:
        kept = session.keep(prefix)
        got = read_after(session, kept, ids)
        with pytest.raises(UnsupportedModelError, match=f"the batch is padded, which {method} does not serve with"):
            read_after(session, kept, following["input_ids"], following["attention_mask"])
    for row, logits in enumerate(expected):
        torch.testing.assert_close(got[row].float(), logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gemma3_text", "as it has layers that keep something else than the keys of all tokens"),
        ("llama4_text", "as it has layers of chunked attention"),
        ("deepseek_v3", "as it caches the latents"),
        ("qwen3_next", "as it has layers that keep something else"),
    ],
)
def test_models_that_keep_no_prefix_are_refused(family, words, prompt):
    model = small(family)
    with applied(model, "dense"), pytest.raises(UnsupportedModelError, match=f"no prefix of .* can be kept .*{words}"):
        tmbench.read_prefix(model, prompt(20))


def test_a_prefix_belongs_to_one_model_one_method_and_one_text(make_model, prompt, following):
    model = make_model("llama")
    with pytest.raises(UserError, match="a prefix is read by a method: use a block of tmbench.applied"):
        tmbench.read_prefix(model, prompt(20))
    with applied(model, "dense"):
        kept = tmbench.read_prefix(model, prompt(20))
        with pytest.raises(UserError, match="a prefix is one text without padding, not 2 rows"):
            tmbench.read_prefix(model, prompt(20, 2))
        hole = following["attention_mask"].clone()
        hole[0, -1] = 0
        with pytest.raises(UnsupportedModelError, match="padding behind its texts"):
            tmbench.generate(model, following | {"attention_mask": hole}, 2, prefix=kept)
    with applied(model, "streaming"), pytest.raises(UserError, match="the prefix was read by dense, and streaming"):
        tmbench.generate(model, following, 2, prefix=kept)
    other = make_model("llama")
    with applied(other, "dense"), pytest.raises(UserError, match="the prefix was read by another model, whose keys"):
        tmbench.generate(other, following, 2, prefix=kept)
