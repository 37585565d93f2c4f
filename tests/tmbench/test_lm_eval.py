"""``tmbench lm-eval``: scores are those of lm-evaluation-harness's own model class, and a run goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from importlib.resources import files

import pytest

from tmbench.errors import UserError
from tmbench.models import loading
from tmbench.results.lm_eval_rows import LmEvalRow, Response, document_likelihoods, document_scores
from tmbench.results.sample_files import read_samples_of
from tmbench.results.tables import read_all
from tmbench.suites import harness

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install tmbench[reference]",
)
LENGTH = 96
WORDS = ["red", "blue", "green", "cat", "dog", "house", "tree", "river", "stone", "cloud", "light", "dark", "seven"]
TASKS = {
    "writes": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
num_fewshot: 0
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "chooses": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]
""",
    "scores": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "rolls": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of each kind, over documents of which some are longer than the prompts that they make may be."""
    draw = random.Random(3)
    documents = tmp_path / "documents.jsonl"
    with documents.open("w") as file:
        for count in (0, 5, 30, 80):
            texts = [" ".join(draw.choices(WORDS, k=k)) for k in (count, 1, 1, 3)]
            # An empty question has the beginning token alone as its context.
            entry = {"question": texts[0], "choices": texts[1:], "gold": 1, "answer": draw.choice(WORDS)}
            file.write(json.dumps(entry) + "\n")
    folder = tmp_path / "yaml"
    folder.mkdir()
    for name, text in TASKS.items():
        told = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {documents}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(told + text.lstrip())
    # A text to be scored may not be empty, nor a prompt to be continued.
    for name in ("rolls", "writes"):
        path = folder / f"{name}.yaml"
        path.write_text(path.read_text().replace("{{question}}", "{{answer}} {{question}}"))
    return folder


@pytest.fixture
def measured(tmbench, tasks, monkeypatch):
    """``measured("writes", ...)`` runs the command on the embedded model; its rows by method and metric."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks.parent / "cache"))

    def run(task, *arguments, code=0):
        about = ("--include-path", str(tasks), "--length", str(LENGTH), "--device", "cpu", "--output-dir", "results")
        ended, out, err = tmbench("lm-eval", "--tasks", task, *about, *arguments)
        assert ended == code, out + err
        return {(row.method, row.metric): row for row in read_all(tasks.parent / "results", LmEvalRow)}

    return run


def answers(tasks, row):
    return read_samples_of(tasks.parent / "results" / row.device / "lm_eval" / row.sample_files, Response)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_dense_scores_are_those_of_the_harness(task, measured, tasks):
    pytest.importorskip("accelerate", reason="the harness's own model class needs accelerate")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = measured(task, "--method", "dense")
    loaded = loading.load("tiny", device="cpu")
    with harness.quiet():
        theirs = simple_evaluate(
            model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=LENGTH, batch_size=1),
            tasks=[task],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
        )
    expected = {name.partition(",")[0]: value for name, value in theirs["results"][task].items() if name.endswith(",none")}
    expected = {name: value for name, value in expected.items() if not name.endswith("_stderr")}
    assert {metric: row.value for (_, metric), row in rows.items()} == pytest.approx(expected, rel=1e-4)
    row = next(iter(rows.values()))
    assert (row.samples, row.truncated > 0) == (4, task != "rolls")
    told = [one["resps"][place][0] for one in theirs["samples"][task] for place in range(len(one["resps"]))]
    ours = [answers(tasks, row)[index] for index in range(row.requests)]
    if task == "writes":
        assert [one.text for one in ours] == told
    elif task == "rolls":
        assert [one.logprob for one in ours] == pytest.approx(told, rel=1e-4)
    else:
        assert [one.logprob for one in ours] == pytest.approx([logprob for logprob, _ in told], rel=1e-3, abs=1e-4)
        assert [one.greedy for one in ours] == [greedy for _, greedy in told]


@installed
@pytest.mark.slow
def test_under_a_chat_template_examples_are_turns_as_the_harness_has_them(measured, tasks, tmp_path):
    pytest.importorskip("accelerate", reason="the harness's own model class needs accelerate")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    model = tmp_path / "chatty"
    shutil.copytree(str(files("tmbench.models") / "tiny"), model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    turns = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": turns}))
    asked = ("--method", "dense", "--model", str(model), "--apply-chat-template", "--num-fewshot", "1")
    with harness.quiet():
        theirs = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "max_length": LENGTH, "dtype": "float32"},
            device="cpu",
            tasks=["scores"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            num_fewshot=1,
            apply_chat_template=True,
            bootstrap_iters=0,
        )
    told = [one["resps"][0][0][0] for one in theirs["samples"]["scores"]]
    found = {}
    for more in ((), ("--no-fewshot-as-multiturn",)):
        rows = measured("scores", *asked, *more, "--overwrite")
        own = next(row for row in rows.values() if bool(row.asked_as) == (not more))
        found[more] = [one.logprob for _, one in sorted(answers(tasks, own).items())]
    assert found[()] == pytest.approx(told, rel=1e-3, abs=1e-4)
    assert found["--no-fewshot-as-multiturn",] != pytest.approx(told, rel=1e-2)


@installed
@pytest.mark.slow
def test_texts_that_are_written_together_are_those_written_alone(measured, tasks):
    methods = ("--method", "dense", "--method", "streaming", "--n-local", "16")
    alone = measured("writes", *methods)
    before = {method: [one.text for one in answers(tasks, row).values()] for (method, _), row in alone.items()}
    together = measured("writes", *methods, "--batch-size", "3", "--overwrite")
    for (method, metric), row in together.items():
        assert row.value == alone[method, metric].value
        assert (row.decode, alone[method, metric].decode) == ("static-cache", "plain")
        assert [one.text for _, one in sorted(answers(tasks, row).items())] == before[method]
    assert before["dense"] != before["streaming"]
    assert all("e" not in text for text in before["dense"])


@installed
@pytest.mark.slow
def test_a_larger_run_answers_what_is_missing_alone(measured, tasks, monkeypatch):
    measured("chooses", "--method", "dense", "--limit", "2")
    asked = []
    from tmbench.measure.harness import LmEvalSpec

    score = LmEvalSpec._score
    monkeypatch.setattr(LmEvalSpec, "_score", lambda self, item, worker: (asked.append(item), score(self, item, worker)))
    rows = read_all(tasks.parent / "results", LmEvalRow)
    metrics = ("acc", "acc_norm", "brier_score")
    assert {(row.metric, row.samples, row.limit) for row in rows} == {(metric, 2, "2") for metric in metrics}
    measured("chooses", "--method", "dense")
    assert sorted(request.index for item in asked for request in item.requests) == list(range(6, 12))
    # Choices share the context that was read for the first of them.
    assert max(len(item.requests) for item in asked) == 3
    asked.clear()
    measured("chooses", "--method", "dense")
    assert not asked
    row = next(row for row in read_all(tasks.parent / "results", LmEvalRow) if row.metric == "acc" and not row.limit)
    scores = document_scores(tasks.parent / "results", row)
    assert sum(scores.scores.values()) / 4 == row.value
    assert document_scores(tasks.parent / "results", next(row for row in rows if row.metric == "acc_norm")).missing == ""


@installed
@pytest.mark.slow
def test_a_failure_is_a_row_and_the_next_run_mends_it(measured, tasks, monkeypatch):
    from tmbench.measure import harness as measuring

    def fail(*args):
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patched:
        patched.setattr(measuring, "prompt_losses", fail)
        rows = measured("rolls", "--method", "dense", code=1)
    assert {row.error for row in rows.values()} == {"RuntimeError: no such luck"}
    assert {metric for _, metric in rows} == {"word_perplexity", "bits_per_byte"}
    with monkeypatch.context() as patched:
        patched.setattr(harness, "_values", lambda results: {})
        measured("rolls", "--method", "dense", code=1)
    rows = measured("rolls", "--method", "dense")
    assert {(row.status, row.value is None) for row in rows.values()} == {("ok", False)}
    assert len(document_likelihoods(tasks.parent / "results", rows["dense", "bits_per_byte"])) == 4


@installed
@pytest.mark.slow
def test_what_cannot_be_asked_is_one_sentence(tmbench, tasks):
    about = ("--include-path", str(tasks), "--device", "cpu", "--method", "dense", "--length", "96")
    random_text = (tasks / "writes.yaml").read_text().replace("task: writes", "task: draws")
    (tasks / "draws.yaml").write_text(
        random_text.replace("max_gen_toks: 12", "max_gen_toks: 12, do_sample: true, temperature: 1")
    )
    no_metric = (tasks / "writes.yaml").read_text().replace("task: writes", "task: measures")
    (tasks / "measures.yaml").write_text(no_metric.replace("exact_match, aggregation: mean", "nosuchmetric"))
    (tasks / "averages.yaml").write_text(no_metric.replace("exact_match", "nosuchmetric").replace("measures", "averages"))
    for task, more, said in (
        ("draws", (), "--tasks draws draws its answers at random: --gen-kwargs do_sample=false"),
        ("writes", ("--gen-kwargs", "max_gen_toks=96"), "writes up to 96 tokens, which --length 96 leaves no prompt"),
        ("writes", ("--gen-kwargs", "num_beams=2"), "wants num_beams of generation"),
        ("writes", ("--gen-kwargs", "max_gen_toks=many"), "--tasks writes cannot be asked, lm-eval says: invalid literal"),
        ("writes", ("--gen-kwargs", "until=5"), "--tasks writes ends answers at 5, which is no text"),
        ("measures", (), "--tasks measures cannot be asked, lm-eval says: KeyError"),
        ("averages", (), "--tasks averages is scored by nosuchmetric, which neither lm-eval nor the package evaluate has"),
        ("writes", ("--apply-chat-template",), "--tasks writes cannot be asked, lm-eval says"),
    ):
        code, _, err = tmbench("lm-eval", "--tasks", task, *about, *more)
        assert (code, said in err) == (2, True), err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--tasks names no task"),
        (("--tasks", "a", "--limit", "many"), "--limit many is no number of documents"),
        (("--tasks", "a", "--limit", "1.5"), "--limit 1.5 is no number of documents"),
        (("--tasks", "a", "--fewshot-as-multiturn"), "--fewshot-as-multiturn needs turns: add --apply-chat-template"),
        (("--tasks", "a", "--include-path", "nowhere"), "--include-path nowhere is no folder"),
    ],
)
def test_bad_input_is_one_sentence(tmbench, arguments, said):
    code, _, err = tmbench("lm-eval", *arguments)
    assert code == 2
    assert said in err


def test_a_missing_harness_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs lm-evaluation-harness: pip install 'tmbench\[reference\]'"):
        harness.check_installed()
