"""Suites: what the table holds keeps the protocol, and one that nobody has heard of is measured as RULER is."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from bound_specs import Bound
from plans import plan_of
from tmbench.engine.session import Session
from tmbench.errors import UserError
from tmbench.measure import answering
from tmbench.measure.accuracy import AccuracySpec
from tmbench.models import loading
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.rows import Row, RulerRow
from tmbench.results.tables import read_all
from tmbench.suites.ruler import Ruler
from tmbench.suites.suite import Sample, Suite
from tmbench.suites.table import SUITES


class CountRow(RulerRow):
    kind = "count"


@dataclass(frozen=True, kw_only=True)
class Count(Suite):
    """Counts on from a number; whatever else is written behind the answer does not matter."""

    name: ClassVar[str] = "count"
    title: ClassVar[str] = "Counting"
    row: ClassVar[type[RulerRow]] = CountRow
    tasks: ClassVar[tuple[str, ...]] = ("up", "down")

    least: int = 8

    def check(self, tasks, lengths, count, seed, tokenizer):
        if min(lengths) < self.least:
            raise UserError(f"--length {min(lengths)} is too short to count")

    def new_tokens(self, task):
        return 3

    def samples(self, task, length, places, seed, tokenizer):
        step = 1 if task == "up" else -1
        texts = [(f"{seed + index}, {seed + index + step}, ", str(seed + index + 2 * step)) for index in places]
        return [
            Sample(index, text, tuple(tokenizer(text)["input_ids"])[:length], (answer,), 3, "numbers")
            for index, (text, answer) in zip(places, texts, strict=True)
        ]

    def score(self, task, answer, references):
        return float(answer.strip().startswith(references[0]))

    def figures(self, task, answers, references):
        right = [self.score(task, answer, own) for answer, own in zip(answers, references, strict=True)]
        return {"score": 100 * sum(right) / len(right), "nulls": 0}

    def provenance(self, task, length, samples, tokenizer):
        return {"wording": "numbers", "wording_hash": "", "source": samples[0].source, "chat_template": False}


@pytest.fixture
def job(make_model, tmp_path):
    tokenizer = loading.load_tokenizer("tiny")
    loaded = LoadedModel("small", make_model("llama", vocab_size=len(tokenizer)), tokenizer, "random", "")
    plans = [plan_of(loaded.shape, name, n_init=1, n_local=2) for name in ("dense", "streaming")]
    here = environment.current(torch.device("cpu"))

    def make(**changes):
        about = {"plans": plans, "lengths": (64,), "tasks": ("up", "down"), "samples": 2, "suite": Count()}
        return Bound(AccuracySpec, loaded, environment=here, root=tmp_path, **(about | changes))

    return make


def test_another_suite_is_measured_kept_and_gone_on_with(job, tmp_path, monkeypatch):
    real = Session.generate

    def generate(session, ids, count, context, stop, over):
        """The model reads the prompt, and 44 is what it is taken to answer, which is right for one sample of four."""
        real(session, ids, count, context, stop, over)
        return torch.tensor([work.loaded.tokenizer(" 44", add_special_tokens=False)["input_ids"]])

    monkeypatch.setattr(Session, "generate", generate)
    work = job()
    rows = work.run()
    assert [(row.method, row.task, row.score, row.samples) for row in rows] == [
        ("dense", "up", 50.0, 2),
        ("streaming", "up", 50.0, 2),
        ("dense", "down", 0.0, 2),
        ("streaming", "down", 0.0, 2),
    ]
    assert {row.backends for row in rows} == {"dense:sdpa", "triangle:torch-banded"}
    assert {row.key: row for row in read_all(tmp_path, CountRow)} == {row.key: row for row in rows}
    assert read_all(tmp_path, RulerRow) == [], "rows of one suite are not those of another"
    for row in rows:
        lines = (tmp_path / row.device / "count" / row.predictions).read_text().splitlines()
        assert [json.loads(line)["outputs"] for line in lines] == [["44"], ["45"]] if row.task == "up" else [["40"], ["41"]]
    monkeypatch.setattr(answering, "alone", None)
    assert job().run() == rows
    assert job(samples=1).run() == rows, "fewer samples than there are need nothing new"


def test_another_suite_refuses_before_anything_is_measured(job, tmp_path):
    with pytest.raises(UserError, match="--length 4 is too short to count"):
        job(lengths=(64, 4)).run()
    assert not list(tmp_path.iterdir())


def test_the_progress_bar_is_named_after_the_suite(job):
    (part,) = (step.part for step in job(samples=1).steps() if step.part is not None)
    assert (part.title, part.finished, part.total) == ("Counting", "Counting evaluated", 4)


def test_suites_of_the_table_have_names_rows_and_tasks_of_their_own():
    assert "ruler" in SUITES
    kinds = [row.kind for row in Row.__subclasses__()] + [suite.row.kind for suite in SUITES.values()]
    assert len({suite.row.kind for suite in SUITES.values()}) == len(SUITES)
    for name, suite in SUITES.items():
        assert suite.name == name
        assert kinds.count(suite.row.kind) <= 2
        assert len(set(suite.tasks)) == len(suite.tasks) > 0
        assert pickle.loads(pickle.dumps(suite())) == suite()


def test_what_a_suite_has_loaded_does_not_travel(tmp_path):
    suite = Ruler(offline=True)
    small = len(pickle.dumps(suite))
    assert suite.sources.essays()
    assert suite.texts.name == "tmbench-1"
    assert len(pickle.dumps(suite)) == small < 1000
    assert pickle.loads(pickle.dumps(suite)).texts == suite.texts
    assert replace(suite, offline=False) != suite
