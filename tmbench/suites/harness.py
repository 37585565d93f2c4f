"""Tasks of EleutherAI's lm-evaluation-harness: what they ask of a model, and what the harness makes of the answers.

The harness's own ``simple_evaluate`` gives a task the options and builds its requests, and stops at the first one that it
asks. Once they are answered its ``evaluate``, which the other calls, builds them again, is given the answers and computes
the metrics. A request that was not there before has no answer, and fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from tmbench.errors import UserError, shortened
from tmbench.models.fingerprint import of_ids
from tmbench.results.lm_eval_rows import Response
from tmbench.results.rows import short_hash

if TYPE_CHECKING:
    from tmbench.suites.harness_model import HarnessModel

EXTRA = "tmbench lm-eval needs lm-evaluation-harness: pip install 'tmbench[reference]'"
WRITTEN = "generate_until"
ROLLING = "loglikelihood_rolling"
SEEDS = (0, 1234)
"""Of Python's and numpy's random numbers, the harness's own."""
HONOURED = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")
"""Options of generation that mean something, or nothing, where the likeliest token is always chosen."""


@dataclass(frozen=True)
class Request:
    """One thing that a task asks of a model, once however often it asks it."""

    index: int
    kind: str
    """"generate_until", "loglikelihood" or "loglikelihood_rolling"."""
    parts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Token ids of contexts, each with those of the text behind it that is scored. To be continued is one context."""
    until: tuple[str, ...] = ()
    """Texts at which what is written ends."""
    most: int = 0
    """Tokens of it."""
    truncated: bool = False
    """Whether a context has lost its beginning."""

    @cached_property
    def prompt_hash(self) -> str:
        """A hash of all of it but its number."""
        ids = [of_ids(ids) for part in self.parts for ids in part]
        return short_hash(self.kind, str(self.most), *self.until, *ids)

    @property
    def context(self) -> tuple[int, ...]:
        """The ids that a method reads before the others; none of a text that is scored whole and has no tokens."""
        return self.parts[0][0] if self.parts else ()

    @property
    def prompt_tokens(self) -> int:
        """How many tokens a method reads: of a text that is scored whole, all of them."""
        return sum(len(context) + (len(text) - 1) * (self.kind == ROLLING) for context, text in self.parts)


@dataclass(frozen=True)
class Scored:
    """What the harness made of the answers to a task."""

    values: Mapping[tuple[str, str], float]
    """By metric and filter."""
    documents: Sequence[Mapping[str, Any]]
    """What each document scored, as lines of a file."""


@dataclass(frozen=True, kw_only=True)
class Harness:
    """How tasks are asked: the options of lm-eval, by its names."""

    include_path: str | None = None
    num_fewshot: int | None = None
    limit: str = ""
    """Documents of a task, or below 1 the part of them; "" for all."""
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    confirm_run_unsafe_code: bool = False
    seed: int = SEEDS[1]
    """Of the choice of few-shot examples."""

    @property
    def asked_as(self) -> str:
        """A hash of what prompts or answers depend on and no column of a row has; "" for nothing of it."""
        given = [self.system_instruction or "", self.gen_kwargs or "", "turns" * self.fewshot_as_multiturn]
        return short_hash(*given) if any(given) else ""

    @property
    def options(self) -> dict[str, Any]:
        """What both of the harness's functions take."""
        return {
            "limit": float(self.limit) if self.limit else None,
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": self.fewshot_as_multiturn,
            "system_instruction": self.system_instruction,
            "confirm_run_unsafe_code": self.confirm_run_unsafe_code,
            "bootstrap_iters": 0,
        }

    def tasks(self, names: Sequence[str]) -> dict[str, Any]:
        """The tasks of these names, those of groups one by one; raises UserError for a name that there is none of."""
        self.check(names)
        with quiet(), saying("--tasks " + " ".join(names)):
            return dict(_manager(self.include_path, tuple(names)).load(list(names))["tasks"])

    def check(self, names: Sequence[str]) -> None:
        """Raise UserError for a name that there is no task of, and where the harness is not installed."""
        check_installed()
        with quiet(), saying("--tasks " + " ".join(names)):
            manager = _manager(self.include_path, tuple(names))
        for name in names:
            if name not in manager.all_tasks:
                where = f", and --include-path {self.include_path} has none such" if self.include_path else ""
                raise UserError(f"--tasks {name} is unknown to lm-eval{where}: lm-eval ls tasks lists what there is")

    def ask(self, name: str, task: Any, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Request]:
        """All that a task asks, in its order; raises UserError for a task that cannot be asked so."""
        from tmbench.suites.harness_model import HarnessModel, UnansweredError, key_of

        _check_metrics(name, task)
        model = HarnessModel(tokenizer, length)
        with quiet(), saying(f"--tasks {name}"):
            from lm_eval.evaluator import simple_evaluate
            from lm_eval.tasks import TaskManager

            with contextlib.suppress(UnansweredError):
                simple_evaluate(
                    model=model,
                    tasks=[task],
                    # One that knows no names: the task is there, and to look at all others takes long.
                    task_manager=TaskManager(include_defaults=False),
                    num_fewshot=self.num_fewshot,
                    gen_kwargs=self.gen_kwargs,
                    fewshot_random_seed=self.seed,
                    **self.options,
                )
            distinct = {key_of(one): one for one in task.instances}
        return [_request(number, one, model, name) for number, one in enumerate(distinct.values())]

    def score(
        self, name: str, task: Any, tokenizer: PreTrainedTokenizerBase, length: int, answers: Sequence[Response]
    ) -> Scored:
        """What the harness makes of the answers to what ``ask`` returned, in its order."""
        from tmbench.suites.harness_model import HarnessModel, key_of

        keys = dict.fromkeys(map(key_of, task.instances))
        told = [(one.text, one.logprob, one.greedy) for one in answers]
        model = HarnessModel(tokenizer, length, dict(zip(keys, told, strict=True)))
        _seed()
        task.set_fewshot_seed(seed=self.seed)
        with quiet(), saying(f"--tasks {name}", "cannot be scored; its answers are kept"):
            from lm_eval.evaluator import evaluate

            results = evaluate(lm=model, task_dict={"tasks": {name: task}, "groups": {}}, log_samples=True, **self.options)
        return Scored(_values(results["results"][name]), _documents(results["samples"][name]))


def check_installed() -> None:
    """Raise UserError where the harness is not installed, or not with all that it needs."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(EXTRA)
    try:
        with quiet():
            importlib.import_module("lm_eval.evaluator")
            importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise UserError(f"{EXTRA} (what is there lacks {error.name or error})") from error


def harness_version() -> str:
    """The version that is installed."""
    return version("lm_eval")


def columns_of(task: Any) -> dict[str, Any]:
    """The columns of rows that a task has, once it was asked."""
    about = task.get_config("metadata") or {}
    return {
        "output_type": str(task.get_config("output_type") or task.OUTPUT_TYPE),
        "num_fewshot": int(task.get_config("num_fewshot") or 0),
        "task_version": str(about.get("version", "")),
        "samples": len({one.doc_id for one in task.instances}),
    }


def measures_of(task: Any) -> list[tuple[str, str, bool | None]]:
    """The metrics that a task declares: each with a filter, and whether more of it is better."""
    filters = [str(one["name"]) for one in task.get_config("filter_list") or []] or ["none"]
    better = task.higher_is_better()
    return [(str(metric), one, better.get(metric)) for one in filters for metric in task.aggregation()]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, the harness says nothing: its bars would stand among ours. What it refuses it raises."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def saying(option: str, what: str = "cannot be asked") -> Iterator[None]:
    """Have what the harness raises be a UserError that names the option, and where a package is missing the extra."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        line = next(iter(str(error).splitlines()), "")
        raise UserError(f"{option} {what}, as a package is missing ({line}): pip install 'tmbench[reference]'") from error
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        if isinstance(error, KeyError) or not line:
            # The key alone, such as None for a metric that there is none of, says nothing.
            line = f"{type(error).__name__} {line}".rstrip()
        raise UserError(f"{option} {what}, lm-eval says: {shortened(line, 300)}") from error


@lru_cache(maxsize=4)
def _manager(folder: str | None, names: tuple[str, ...]) -> Any:
    """What knows the tasks of a folder and, unless these names are all of it, the harness's own: many thousands of files."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        alone = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(alone.all_subtasks):
            return alone
    return TaskManager(include_path=folder)


def _check_metrics(name: str, task: Any) -> None:
    """Raise UserError for a metric that there is none of, which the harness itself finds out once all is answered."""
    # A task with a function of its own for all of its metrics has none for each.
    found = {} if task.get_config("process_results") else getattr(task, "_metric_fn_list", {})
    if unknown := [str(metric) for metric, function in found.items() if function is None]:
        raise UserError(
            f"--tasks {name} is scored by {unknown[0]}, which neither lm-eval nor the package evaluate has: leave it out"
        )


def _seed() -> None:
    import numpy as np

    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])


def _request(number: int, given: Any, model: HarnessModel, task: str) -> Request:
    if given.request_type == WRITTEN:
        return _written(number, given, model, task)
    if given.request_type == ROLLING:
        windows = model.windows(given)
        return Request(number, ROLLING, tuple((tuple(context), tuple(text)) for context, text in windows))
    if given.request_type != "loglikelihood":
        raise UserError(f"--tasks {task} asks for {given.request_type}, which no model of text answers: leave it out")
    context, text = model.pair(given)
    if not 0 < len(text) <= model.max_length:
        raise UserError(
            f"--tasks {task} has a text of {len(text)} tokens to be scored, where --length allows 1 to {model.max_length}: "
            "give another --length or leave the task out"
        )
    kept = (context + text)[-(model.max_length + 1) :]
    context_kept = tuple(kept[: -len(text)])
    truncated = len(context_kept) < len(context)
    return Request(number, "loglikelihood", ((context_kept, tuple(text)),), truncated=truncated)


def _written(number: int, given: Any, model: HarnessModel, task: str) -> Request:
    with saying(f"--tasks {task}"):
        ids, options = model.writing(given)
    most = int(options["max_gen_toks"])
    if options.get("do_sample"):
        raise UserError(f"--tasks {task} draws its answers at random: --gen-kwargs do_sample=false asks for the likeliest")
    if other := sorted(options.keys() - set(HONOURED)):
        raise UserError(
            f"--tasks {task} wants {', '.join(other)} of generation, which greedy decoding has not: leave it out"
        )
    if numbers := [end for end in options["until"] if not isinstance(end, str)]:
        raise UserError(f"--tasks {task} ends answers at {numbers[0]}, which is no text: give until as one")
    room = model.max_length - most
    if room < 1 or most < 1:
        raise UserError(
            f"--tasks {task} writes up to {most} tokens, which --length {model.max_length} leaves no prompt: give a longer "
            "one, or --gen-kwargs max_gen_toks=..."
        )
    kept = tuple(ids[-room:])
    return Request(number, WRITTEN, ((kept, ()),), tuple(options["until"]), most, truncated=len(kept) < len(ids))


def _values(results: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    parted = ((name.partition(","), value) for name, value in results.items())
    return {
        (metric, of): float(value)
        for (metric, comma, of), value in parted
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float)
    }


def _documents(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each document, with what it scored under each filter."""
    found: dict[int, dict[str, Any]] = {}
    for sample in samples:
        about = short_hash(*(str(sample[name]) for name in ("doc_hash", "prompt_hash", "target_hash")))
        line = found.setdefault(int(sample["doc_id"]), {"index": int(sample["doc_id"]), "hash": about, "scores": {}})
        for metric in sample["metrics"]:
            line["scores"][f"{metric},{sample['filter']}"] = _plain(sample[metric])
    return [found[number] for number in sorted(found)]


def _plain(value: Any) -> Any:
    """A score as JSON has it: a number, a text, or a list of such."""
    # What numpy and torch have is a number or an array: a Brier score is taken of a document's array of probabilities.
    found = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(found, list | tuple):
        return [_plain(one) for one in found]
    if isinstance(found, bool | int | float):
        return float(found) if math.isfinite(found) else str(found)
    return found if isinstance(found, str) else json.dumps(found, default=str)
