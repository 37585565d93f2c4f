"""A context that several questions are asked of is read once, and each answer is that of a context read anew."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from served_families import small

from bound_specs import Bound
from plans import plan_of
from tmbench.engine.batch import Batch
from tmbench.engine.chunks import Chunks
from tmbench.engine.prefill import COMPILED, EAGER
from tmbench.engine.prefix import let_go
from tmbench.engine.session import Session, running
from tmbench.measure.accuracy import AccuracySpec
from tmbench.measure.contexts import LastContext
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.suites.ruler import Ruler

WINDOW: dict[str, Any] = {"n_init": 3, "n_local": 17, "last_n": 12}
QUESTIONS, SAMPLES, NEW = 3, 2, 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64, "head_dim": 16}
CONFIGS = {"gemma3_text": SLIDING}

pytestmark = pytest.mark.usefixtures("graphs", "short_chunks")


@dataclass(frozen=True, kw_only=True)
class ShortAnswers(Ruler):
    """RULER with a few tokens for each answer."""

    def samples(self, *about):
        return [replace(sample, max_new_tokens=NEW) for sample in super().samples(*about)]


@pytest.fixture
def job(make_model, tokenizer, tmp_path):
    """``job(folder, family, **changes)``: two methods, each asked three questions of two contexts."""

    def make(folder, family="llama", device=DEVICE, **changes):
        config = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, **CONFIGS.get(family, {})}
        model = make_model(family, **config).to(device)
        model.generation_config.eos_token_id = None
        loaded = LoadedModel("small", model, tokenizer, "random", "")
        about = {
            "plans": [plan_of(model, name, **WINDOW) for name in ("dense", "tri_mix")], "tasks": ("niah_multikey_2",),
            "lengths": (700,), "samples": SAMPLES, "questions": QUESTIONS, "ask_later": True, "prefill": EAGER,
            "environment": environment.current(torch.device(device)), "root": tmp_path / folder,
            "suite": ShortAnswers(offline=True),
        }  # fmt: skip
        return Bound(AccuracySpec, loaded, **(about | changes))

    return make


@pytest.fixture
def reads(monkeypatch):
    """The contexts that methods have read, one after the other."""
    found: list[tuple[str, tuple[int, ...]]] = []
    real = Session.read_context

    def read(self, ids, later, into=None):
        found.append((self.applied.plan.method, tuple(ids[0].tolist())))
        return real(self, ids, later, into)

    monkeypatch.setattr(Session, "read_context", read)
    return found


@pytest.fixture
def anew(job, reads, monkeypatch):
    """``anew(folder, *about, **changes)``: the rows and samples of contexts that are all read anew."""

    def run(*about, **changes):
        work = job(*about, **changes)
        with monkeypatch.context() as patch:
            patch.setattr(LastContext, "keep", lambda self, context, slot=None: None)
            found = rows_of(work), samples_of(work)
        assert len(reads) == len(work.plans) * SAMPLES * QUESTIONS
        reads.clear()
        return found

    return run


COSTS = ("seconds", "batch_size", "decode", "peak_memory")


def rows_of(work):
    """All of the rows but when they were made and at what cost, in the order in which they are printed."""
    costs = {"time": "", "seconds_per_sample": 0.0, "peak_memory_bytes": None, "batch_size": 1, "decode": ""}
    return [replace(row, **costs) for row in work.run()]


def samples_of(work):
    """What is kept of each answer, by file, but for its cost."""
    found = {}
    for path in sorted(work.root.rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name] = [{name: value for name, value in line.items() if name not in COSTS} for line in lines]
    return found


def sorted_samples(found):
    return {name: sorted(lines, key=lambda line: int(line["index"])) for name, lines in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [None, Chunks(150), Chunks(200, known=False)])
@pytest.mark.parametrize("batch_size", [None, 2, 4])
def test_each_context_is_read_once_and_answered_as_if_it_were_read_anew(batch_size, chunks, job, anew, reads):
    how = {"batch_size": batch_size, "chunks": chunks}
    rows, samples = anew("anew", **how)
    work = job("once", **how)
    assert rows_of(work) == rows
    assert sorted_samples(samples_of(work)) == sorted_samples(samples)
    assert [(row.question, row.method) for row in rows] == [
        (question, method) for question in (1, 2, 3) for method in ("dense", "tri_mix")
    ]
    assert len(reads) == len(set(reads)) == len(work.plans) * SAMPLES
    assert len({line["prediction"] for lines in samples.values() for line in lines}) > 6, "answers that differ"
    # The pairs of the context count in every question's first sample, and what ran over it in every sample.
    assert all(row.coverage < 0.9 for row in rows if row.method == "tri_mix")
    assert all("triangle" in row.backends for row in rows if row.method == "tri_mix")


@pytest.mark.slow
def test_texts_that_end_at_once_leave_their_context_behind(job, anew, reads, monkeypatch):
    """The slot of such a text is free, and the next question of its context is read there."""
    monkeypatch.setattr("test_contexts.NEW", 1)
    for size in (1, 3):
        rows, samples = anew(f"anew {size}", batch_size=size)
        work = job(f"once {size}", batch_size=size)
        assert (rows_of(work), samples_of(work)) == (rows, samples)
        assert len(reads) == len(work.plans) * SAMPLES
        reads.clear()


@pytest.mark.slow
def test_what_is_compiled_for_a_longer_question_leaves_its_context_in_the_slot(job, monkeypatch):
    """The third question's prompt is the first that an MLP takes in two pieces, and the only slot holds its context."""
    monkeypatch.setattr("tmbench.engine.batch.SIZES", (1,))
    monkeypatch.setattr("tmbench.engine.chunked_mlp.CHUNK", 551)
    found, real = [], Session.read_into

    def read_into(self, ids, slot, context=0, prefix=None, over=None):
        logits = real(self, ids, slot, context, prefix, over)
        if over is not None:
            found.append((ids.shape[1], logits))
        return logits

    monkeypatch.setattr(Session, "read_into", read_into)
    plans = [plan_of(job("shape").loaded.model, "tri_mix", **WINDOW)]
    for kind in (COMPILED, EAGER):
        assert {row.status for row in job(kind, prefill=kind, batch_size=2, plans=plans).run()} == {"ok"}
    compiled, eager = found[: len(found) // 2], found[len(found) // 2 :]
    assert [length > 551 for length, _ in compiled[:QUESTIONS]] == [False, False, True]
    for (_, got), (_, expected) in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_context_with_windows_is_read_as_often_as_its_cache_asks_for(batch_size, job, anew, reads):
    """transformers' cache of such a layer lets go of what its window has left behind; a slot of a static one keeps all."""
    how = {"batch_size": batch_size}
    rows, samples = anew("anew", "gemma3_text", **how)
    work = job("once", "gemma3_text", **how)
    assert rows_of(work) == rows
    assert sorted_samples(samples_of(work)) == sorted_samples(samples)
    assert len(reads) == len(work.plans) * SAMPLES * (QUESTIONS if (batch_size, DEVICE) == (None, "cpu") else 1)


@pytest.mark.parametrize(
    ("family", "keeps"),
    [
        ("llama", True),
        pytest.param("deepseek_v3", True, marks=pytest.mark.slow),
        pytest.param("glm4_moe", True, marks=pytest.mark.slow),
        pytest.param("gemma3_text", False, marks=pytest.mark.slow),
        pytest.param("qwen3_5_text", False, marks=pytest.mark.slow),
        pytest.param("granitemoehybrid", False, marks=pytest.mark.slow),
        pytest.param("minimax", False, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_families_keep_what_they_have_read_or_say_that_they_cannot(family, keeps, prompt):
    """Behind a long question and a long answer comes a shorter question, and then a longer one."""
    model, context = small(family).to(DEVICE), prompt(60).to(DEVICE)
    asked = [torch.cat([context, prompt(length).to(DEVICE)], dim=1) for length in (20, 5, 30)]
    plan = plan_of(model, "tri_mix", **WINDOW)
    with running(model, plan, EAGER) as session:
        expected = [session.follow(ids, 12, context=60) for ids in asked]
        held, got = session.read_context(context, 20), []
        for ids in asked if keeps else asked[:1]:
            got.append(session.follow(ids, 12, context=60, over=held))
            assert let_go(held, 60) == keeps
    assert got == expected[: len(got)]
    assert len({tuple(tokens) for tokens in expected}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_killed_run_reads_each_context_once_for_the_questions_that_are_left(batch_size, job, anew, reads, monkeypatch):
    rows, samples = anew("anew", batch_size=batch_size)
    work, real, answered = job("killed", batch_size=batch_size), AccuracySpec.sample, []

    def sample(self, loaded, item, answer):
        answered.append(item)
        if len(answered) == 5:
            raise KeyboardInterrupt
        return real(self, loaded, item, answer)

    with monkeypatch.context() as patch:
        patch.setattr(AccuracySpec, "sample", sample)
        with pytest.raises(KeyboardInterrupt):
            work.run()
    kept = samples_of(work)
    assert sum(map(len, kept.values())) == 4
    reads.clear()
    assert rows_of(work) == rows
    assert sorted_samples(samples_of(work)) == sorted_samples(samples)
    # The first context of the first method is all answered; what is left of the second is asked of one reading.
    assert len(reads) == len(set(reads)) == len(work.plans) * SAMPLES - 1
    reads.clear()
    assert rows_of(work) == rows
    assert reads == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at"), [("read", 3), ("advance", 2)])
def test_memory_that_runs_out_has_a_context_read_again(name, at, job, anew, reads, monkeypatch):
    rows, samples = anew("anew", batch_size=4)
    calls, real = [0], getattr(Batch, name)

    def failing(self, *given, **more):
        calls[0] += 1
        if calls[0] == at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *given, **more)

    monkeypatch.setattr(Batch, name, failing)
    work = job("once", batch_size=4)
    assert rows_of(work) == rows
    assert sorted_samples(samples_of(work)) == sorted_samples(samples)
    assert len(reads) > len(set(reads)) == len(work.plans) * SAMPLES


@pytest.mark.slow
def test_a_question_that_fails_fails_alone_and_leaves_no_context_behind(job, reads, monkeypatch):
    real = Session.generate

    def failing(session, ids, *given):
        if len(reads) == 1 and ids.shape[1] == second:
            raise RuntimeError("an illegal memory access was encountered")
        return real(session, ids, *given)

    work = job("failed", device="cpu", plans=[plan_of(job("shape").loaded.model, "dense")])
    first = work.suite.samples("niah_multikey_2", 700, [0], work.seed, work.loaded.tokenizer)
    (asked,) = work.suite.further("niah_multikey_2", 700, first, 2, work.loaded.tokenizer)
    second = len(asked.ids)
    monkeypatch.setattr(Session, "generate", failing)
    assert [(row.question, row.status) for row in work.run()] == [(1, "ok"), (2, "failed"), (3, "ok")]
    # The third question of the first context has it read anew.
    assert len(reads) == 3
    assert reads[0] == reads[1] != reads[2]


@pytest.mark.slow
def test_the_time_of_reading_is_in_the_first_questions(job):
    rows = job("timed", lengths=(2000,), plans=[plan_of(job("shape").loaded.model, "dense")]).run()
    first, *others = [row.seconds_per_sample for row in rows]
    assert all(first > seconds > 0 for seconds in others)
