"""Questions that are asked later: the method reads the context alone, and they see all of what it left."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import masked
import plans
from ruler_tasks import TASKS, Frame, further_questions, load_wording, question_start
from ruler_tasks import examples as drawn
from ruler_tasks.asking import _question
from tmbench.engine.chunks import Chunks
from tmbench.engine.kv_cache import CacheSlot, KvCache
from tmbench.engine.prefill import COMPILED, EAGER, PLAIN
from tmbench.engine.session import running
from tmbench.errors import UserError
from tmbench.models.loading import LoadedModel
from tmbench.suites.prompt_files import PromptFile
from tmbench.suites.prompts import offline_sources, prompt_context, prompt_ids
from tmbench.suites.ruler import Ruler

LENGTH, CONTEXT = 150, 120
WINDOW = {"n_init": 2, "n_local": 9, "last_n": 12}

pytestmark = pytest.mark.usefixtures("graphs", "short_chunks")


def later_masks(plan, context, length):
    """The method's masks over the context, and all keys for the rows behind it."""
    found = []
    for own in masked.masks_of(plan, context):
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask[:context, :context] = own
        found.append(mask)
    return found


@pytest.mark.parametrize("kind", [EAGER, pytest.param(COMPILED, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunks", [None, Chunks(50)])
@pytest.mark.parametrize("method", ["dense", "tri_mix", "streaming"])
@torch.inference_mode()
def test_the_method_reads_the_context_and_the_question_sees_everything(method, chunks, kind, make_model, prompt):
    model, ids = make_model("llama"), prompt(LENGTH)
    plan = plans.plan_of(model, method, **WINDOW)
    expected = masked.logits_under(model, ids, later_masks(plan, CONTEXT, LENGTH))[-1]
    with running(model, plan, kind, chunks) as session, session.prefill() as prefill:
        (got,) = prefill(ids, context=CONTEXT)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    whole = masked.logits_under(model, ids, masked.masks_of(plan, LENGTH))[-1]
    assert torch.allclose(whole, expected, rtol=1e-3, atol=1e-3) == (method == "dense")


@torch.inference_mode()
def test_answers_follow_a_question_that_was_asked_later(make_model, prompt):
    model, ids = make_model("llama"), prompt(LENGTH)
    model.generation_config.eos_token_id = None
    plan = plans.plan_of(model, "tri_mix", **WINDOW)
    text = ids
    for _ in range(4):
        logits = masked.logits_under(model, text, later_masks(plan, CONTEXT, text.shape[1]))[-1]
        text = torch.cat([text, logits.argmax()[None, None]], dim=1)
    with running(model, plan, EAGER) as session:
        assert session.generate(ids, 4, CONTEXT)[0].tolist() == text[0, LENGTH:].tolist()
        assert session.follow(ids, 4, context=CONTEXT) == text[0, LENGTH:].tolist()
        cache = KvCache(1, LENGTH)
        logits = session.read_into(ids, CacheSlot(cache, 0), CONTEXT)
    assert int(logits.argmax()) == text[0, LENGTH]
    with (
        running(model, plan, PLAIN) as session,
        session.prefill() as prefill,
        pytest.raises(ValueError, match="a plain prefill reads a prompt in one piece"),
    ):
        prefill(ids, context=CONTEXT)


@pytest.mark.parametrize("samples_as", ["tmbench", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_says_where_its_question_begins(task, samples_as, tokenizer):
    wording, sources = load_wording(), offline_sources()
    (example,) = drawn(task, 2048, [0], tokenizer=tokenizer, sources=sources, samples_as=samples_as)
    at = question_start(example, wording)
    context, question = example.prompt[:at], example.prompt[at:]
    assert question.endswith(example.answer_prefix)
    # What is asked stands in the question alone, and what it is asked of in the context alone.
    asked = {"vt": "which variables hold", "cwe": "which 10 words", "fwe": "which three code words"}
    asks = "Which secret" if task.startswith("niah") else asked.get(task, "Question: ")
    assert asks in question
    assert question.count("\n") <= 3
    assert len(question) < 400 + len(example.answer_prefix)
    assert all(output in context for output in example.outputs) or task.startswith("qa")


@pytest.mark.parametrize("samples_as", ["tmbench", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", [*(task for task in TASKS if task.startswith("niah_multi")), "niah_single_3", "vt"])
def test_further_questions_are_about_other_keys_of_the_same_context(task, samples_as, tokenizer):
    wording, sources = load_wording(), offline_sources()
    frame = Frame("<user>", "<model>", strip=True)
    (example,) = drawn(task, 2048, [3], tokenizer=tokenizer, sources=sources, samples_as=samples_as, frame=frame)
    found = further_questions(example, wording, frame)
    least = {"niah_multikey_1": 3, "niah_multikey_2": 20, "niah_multikey_3": 10, "niah_multiquery": 4}
    assert len(found) >= least.get(task, 0)
    assert not found or task in least
    context = example.input[: question_start(example, wording)]
    for text, outputs in found:
        assert "<model>" in text
        # The needle that answers stands in the context once, with the key that is asked for.
        (key,) = re.findall(r"Which secret \w+ of (\S+) does", text)
        (value,) = outputs
        assert context.count(f" of {key} is {value}.") == 1
        assert {value} != {*example.outputs}
    # The first question, written by the same rule, is the sample's own.
    if task == "niah_multikey_1":
        (asked,) = re.findall(r"of (\S+) does", example.input[len(context) :])
        assert _question(wording, frame, asked, example.outputs) == example.prompt[len(context) :]


@pytest.mark.slow
def test_further_questions_are_rows_of_their_own(tmbench):
    asked = ("ruler", "--length", "1K", "--samples", "2", "--json", "--method", "dense", "--questions", "3", "--ask-later")
    code, out, err = tmbench(*asked, "--task", "niah_multikey_2", "--task", "vt")
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["task"], row["question"]) for row in rows] == [
        ("niah_multikey_2", 1), ("niah_multikey_2", 2), ("niah_multikey_2", 3), ("vt", 1),
    ]  # fmt: skip
    assert len({row["predictions"] for row in rows}) == 4
    assert "--questions 3: vt at 1024 had 1 question for each context" in err
    code, out, _ = tmbench("report")
    assert "question 3 of each context" in out
    code, _, err = tmbench("ruler", "--data", ".", "--length", "1K", "--questions", "2")
    assert code == 2
    assert "--data has one question for each sample" in err


def test_contexts_are_tokens_that_the_whole_prompt_begins_with(tokenizer):
    suite = Ruler(offline=True)
    samples = suite.samples("niah_single_1", 1024, [0, 1], 42, tokenizer)
    for before, sample in zip(samples, suite.with_contexts("niah_single_1", samples, tokenizer), strict=True):
        assert sample.prompt_hash == before.prompt_hash
        assert 0 < len(sample.ids) - sample.context < 60
        assert "Which secret" in tokenizer.decode(sample.ids[sample.context :])
        assert "Which secret" not in tokenizer.decode(sample.ids[: sample.context])


@pytest.mark.parametrize(("task", "asks"), [("niah_multivalue", "Which secret"), ("qa_1", "Question: ")])
def test_a_prompt_that_is_cut_keeps_its_whole_question(task, asks, tokenizer, make_model):
    loaded = LoadedModel("small", make_model("llama", vocab_size=len(tokenizer)), tokenizer, "random", "")
    context = prompt_context(task, 1000, loaded, number=1)
    ids = prompt_ids(task, 1000, loaded, number=1)[0].tolist()
    text, question = tokenizer.decode(ids[:context]), tokenizer.decode(ids[context:])
    assert asks in question
    assert asks not in text
    with pytest.raises(UserError, match=r"--ask-later: a question of --prompt \S+ has \d+ tokens, and 8 are kept"):
        prompt_context(task, 16, loaded)


def test_a_line_of_a_file_says_where_its_question_begins(tokenizer, make_model, tmp_path):
    loaded = LoadedModel("small", make_model("llama", vocab_size=len(tokenizer)), tokenizer, "random", "")
    file = tmp_path / "asked.jsonl"
    lines = [{"prompt": "The lake is calm. " * 40, "question": "\nIs it?"}, {"prompt": "The lake is calm. " * 40}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = PromptFile.of(file, "jsonl")
    context = prompt_context(prompts, 100, loaded)
    assert tokenizer.decode(prompt_ids(prompts, 100, loaded)[0].tolist()[context:]) == "\nIs it?"
    with pytest.raises(UserError, match="line 2 has no question"):
        prompt_context(prompts, 100, loaded, number=1)
    with pytest.raises(UserError, match="prompts of kv do not say where their questions begin"):
        prompt_context("kv", 100, loaded)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "The lake is calm. ", "question": " \n"}, "line 1 has no question: add one"),
        ({"prompt": "lake", "question": "side calm ?"}, "line 1 has no token of its own before its question"),
    ],
)
def test_a_question_that_leaves_nothing_to_ask_or_to_read_before_it_is_refused(line, said, make_model, tmp_path):
    """Under a tokenizer that puts nothing in front, and takes "lakeside" for one word."""
    words = WordLevel({word: number for number, word in enumerate(["?", "lake", "lakeside", "calm"])}, unk_token="?")
    fast = Tokenizer(words)
    fast.pre_tokenizer = Whitespace()
    loaded = LoadedModel("small", make_model("llama"), PreTrainedTokenizerFast(tokenizer_object=fast), "random", "")
    (tmp_path / "asked.jsonl").write_text(json.dumps(line | {"answer": " calm"}))
    prompts = PromptFile.of(tmp_path / "asked.jsonl", "jsonl")
    shortest, longest = prompts.shortest(loaded), prompts.longest(loaded)
    assert shortest
    assert longest
    with pytest.raises(UserError, match=said):
        prompt_context(prompts, shortest, loaded)
    with pytest.raises(UserError, match=said):
        prompts.context(loaded, longest, 0)


@pytest.mark.slow
def test_rows_that_were_asked_later_are_rows_of_their_own(tmbench):
    asked = ("ruler", "--task", "niah_single_1", "--length", "1K", "--samples", "2", "--json")
    both = ("--method", "dense", "--method", "streaming")
    _, whole, _ = tmbench(*asked, *both)
    code, out, err = tmbench(*asked, *both, "--ask-later")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["ask_later"] for row in rows] == [True, True]
    assert rows[0]["score"] == json.loads(whole)[0]["score"]
    # The question's rows see more than in one piece.
    assert rows[1]["coverage"] > json.loads(whole)[1]["coverage"]
    code, _, err = tmbench("ruler", "--data", ".", "--length", "1K", "--ask-later")
    assert code == 2
    assert "--data has samples that do not say where their questions begin" in err


@pytest.mark.slow
def test_a_second_turn_is_timed_over_the_kept_cache(tmbench):
    run = (
        "ttft",
        "--length",
        "1K",
        "--repeats",
        "2",
        "--json",
        "--method",
        "dense",
        "--method",
        "streaming",
        "--n-local",
        "64",
    )
    code, out, err = tmbench(*run, "--ask-later", "--question-tokens", "32", "--chunk", "512")
    assert code == 0, err
    dense, streaming = json.loads(out)
    _, out, _ = tmbench(*run)
    whole = json.loads(out)
    assert [row["question_tokens"] for row in (dense, streaming, *whole)] == [32, 32, 0, 0]
    # The question's rows are dense under every method, and nothing else is timed or counted.
    assert (dense["coverage"], dense["flop"]) == (streaming["coverage"], streaming["flop"]) == (1.0, dense["flop"])
    assert dense["flop"] < whole[0]["flop"] / 8
    assert dense["ttft_median_s"] < whole[0]["ttft_median_s"]
    # What the method left of the context differs from dense's all the same.
    assert dense["first_token"] == whole[0]["first_token"]
    assert streaming["logit_error"] > 1e-3
    code, out, _ = tmbench("report")
    assert "asked later" in out
    assert "second turn of 32 tokens" in out


@pytest.mark.slow
def test_times_in_chunks_and_in_one_piece_come_from_the_same_rounds(tmbench):
    run = ["ttft", "--length", "512", "--repeats", "2", "--method", "dense", "--chunk", "128", "--json"]
    code, out, err = tmbench(*run, "--beside-one-piece")
    assert code == 0, err
    whole, chunks = json.loads(out)
    assert [(row["chunk"], row["prompt_length"]) for row in (whole, chunks)] == [(0, ""), (128, "known")]
    assert {row["interleaved"] for row in (whole, chunks)} == {"dense dense"}
    assert whole["matrix_rate_flops"] == chunks["matrix_rate_flops"]
    code, out, _ = tmbench("report")
    (line,) = [line for line in out.splitlines() if "in chunks of 128" in line and " % to " in line]
    assert "not interleaved" not in line
    # Neither is measured again.
    _, out, _ = tmbench(*run, "--beside-one-piece")
    assert json.loads(out) == [whole, chunks]
    code, _, err = tmbench("ttft", "--length", "512", "--beside-one-piece")
    assert code == 2
    assert "--beside-one-piece holds other prompts" in " ".join(err.split())


@pytest.mark.slow
def test_options_of_later_questions_are_refused_where_they_have_no_meaning(tmbench):
    for arguments, words in (
        (("--question-tokens", "9"), "--question-tokens is about questions that are asked later and needs --ask-later"),
        (
            ("--ask-later", "--attn-native"),
            "--attn-native shows attention over whole prompts and does not go with --ask-later",
        ),
        (("--ask-later", "--length", "64"), "--question-tokens 64 leaves nothing before the question in 64 tokens"),
    ):
        code, _, err = tmbench("ttft", *arguments)
        assert code == 2
        assert words in " ".join(err.split())


@pytest.mark.slow
def test_losses_of_questions_of_a_file_that_are_asked_later(tmbench, tmp_path):
    context = "The lake is calm. The secret number of red-fox is 42. " * 30
    line = {"prompt": context, "question": "\nWhich secret number of red-fox does the text mention?", "answer": " 42"}
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps(line) + "\n")
    run = ["probe", "--loss", "--prompt-file", str(file), "--samples", "1", "--json", "--n-init", "2", "--n-local", "16"]
    run += ["--method", "dense", "--method", "streaming"]
    found: dict[tuple[str, ...], Any] = {}
    for how in ((), ("--ask-later",), ("--ask-later", "--chunk", "100")):
        code, out, err = tmbench(*run, *how)
        assert code == 0, err
        found[how] = json.loads(out)
    whole, later, chunks = found.values()
    # The prompts are one text, and only what the method reads of it differs.
    assert [row["prompt_tokens_mean"] for row in later] == [row["prompt_tokens_mean"] for row in whole]
    assert later[0]["nll_answer"] == pytest.approx(whole[0]["nll_answer"], rel=1e-3)
    assert later[1]["nll_answer"] != pytest.approx(whole[1]["nll_answer"], rel=1e-3)
    assert chunks[1]["nll_answer"] == pytest.approx(later[1]["nll_answer"], rel=1e-3)
    file.write_text(json.dumps({name: text for name, text in line.items() if name != "question"}) + "\n")
    for arguments, words in (
        (("--prompt-file", str(file)), f"--prompt-file {file} line 1 has no question: add one, apart from its prompt"),
        (("--task", "kv"), "prompts of kv do not say where their questions begin: use a RULER task or --prompt-file"),
    ):
        code, _, err = tmbench("probe", "--loss", "--ask-later", "--samples", "1", *arguments)
        assert code == 2
        assert words in " ".join(err.split())
