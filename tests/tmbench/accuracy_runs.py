"""A small model that is asked RULER's tasks, and a stand-in for what it would answer: for tests of accuracy."""

from __future__ import annotations

import torch

from bound_specs import Bound
from plans import plan_of
from ruler_tasks import TASKS
from tmbench.measure import answering
from tmbench.measure.accuracy import AccuracySpec
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.predictions import Prediction
from tmbench.results.rows import RulerRow
from tmbench.results.tables import read_all
from tmbench.suites.ruler import Ruler


def job_maker(make_model, tokenizer, root):
    """What makes a run of two methods, two tasks and three samples, with changes."""

    def make(**changes):
        model = make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
        loaded = LoadedModel("small", model, tokenizer, "random", "")
        plans = [plan_of(model, name) for name in ("dense", "streaming")]
        values = {
            "plans": plans, "lengths": (1024,), "samples": 3, "tasks": ("niah_single_1", "vt"),
            "environment": environment.current(torch.device("cpu")), "root": root, "suite": Ruler(offline=True),
        }  # fmt: skip
        return Bound(AccuracySpec, loaded, **(values | changes))

    return make


def answered(monkeypatch):
    """Stands in for generation: answers with the right reference for dense, with nothing for any other method."""
    asked = []

    def answer(spec, loaded, item, ran, last):
        method, sample = spec.plans[item.plan].method, item.sample
        asked.append((method, item.task, sample.index, sample.prompt))
        text = " ".join(sample.references) if method == "dense" else " "
        score = TASKS[item.task].score(text, sample.references)
        coverage = {"dense": 1.0, "streaming": 0.25}[method] if item.count else None
        backends = {"dense": "dense:sdpa", "streaming": "triangle:torch-banded"}[method]
        ran.add(backends)
        about = (400, 5, 0.5, coverage, backends, sample.prompt_hash)
        return Prediction(sample.index, text, sample.references, score, *about)

    monkeypatch.setattr(answering, "alone", answer)
    return asked


def samples_of(work, task, length):
    """The samples that every method is asked."""
    return work.suite.samples(task, length, range(work.samples), work.seed, work.loaded.tokenizer)


def rows_of(root):
    return {(row.method, row.task, row.length): row for row in read_all(root, RulerRow)}
