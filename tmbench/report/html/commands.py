"""The command that measures a row again, and what a reader must have for it that rows do not hold."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

from ruler_tasks import TASKS
from tmbench.methods.table import ATTN_NATIVE, LAYERS
from tmbench.results.lm_eval_rows import LmEvalRow
from tmbench.results.rows import PREPARED, AgreeRow, LossRow, ProbeRow, Row, RulerRow, TtftRow
from tmbench.results.suite_rows import SuiteRow
from tmbench.results.variants import DENSE, labels_in, own_label
from tmbench.results.words import length_name

AGAIN = "again"
"""The folder that a repeated row goes to: in its own folder it would be there already."""
NATIVE_OPTION = "--attn-native"
FILE, FOLDER = "FILE", "FOLDER"
PROPOSED = re.compile(r"(\w+), (accuracy|time) budget ([-+.\de]+), (\w+)")
"""What decided a probe's proposal, as its rows have it."""


@dataclass(frozen=True)
class Command:
    """A line for a shell, and sentences on what it does not say."""

    text: str
    needs: Sequence[str]


def command_of(row: Row) -> Command:
    """The command that measures a row again; capitals stand for files that rows know by a hash alone."""
    words, needs = _own(row)
    gpus = max(row.tensor_parallel_size, row.context_parallel_size)
    program = ["torchrun", "--nproc-per-node", str(gpus), "-m", "tmbench"] if gpus > 1 else ["tmbench"]
    given: dict[str, object] = {
        "model": row.model,
        "revision": row.revision,
        "weights": row.weights if row.weights != "checkpoint" else "",
        "dtype": row.dtype,
        "rope-scaling": row.rope_scaling,
        "chunk": row.chunk or "",
        "prompt-length": row.prompt_length,
        "device": "cpu" if row.threads else "",
        "length": length_name(row.length),
        # It draws no prepared prompts, and rows of older versions have one all the same.
        "seed": "" if isinstance(row, RulerRow) and row.wording == PREPARED else row.seed,
        "output-dir": AGAIN,
    }
    shared = [word for name, value in given.items() if value != "" for word in (f"--{name}", str(value))]
    shared += ["--ask-later"] * row.ask_later
    shared += ["--context-parallel"] * (row.context_parallel_size > 1)
    shared += ["--trust-remote-code"] * row.remote_code
    threads = f"OMP_NUM_THREADS={row.threads} " if row.threads else ""
    return Command(threads + shlex.join([*program, *words, *shared]), needs)


@singledispatch
def _own(row: Row) -> tuple[list[str], list[str]]:
    """What a row's own command takes beside what all take, its name first, and what is needed."""
    raise TypeError(f"{type(row).__name__} has no command")


@_own.register
def _(row: TtftRow) -> tuple[list[str], list[str]]:
    methods, needs = _method(row)
    turns = list(dict.fromkeys(labels_in(row.interleaved)))
    own = own_label(row, turns)
    beside = [label for label in turns if label not in (DENSE, ATTN_NATIVE, own)]
    if DENSE in turns and own not in (DENSE, ATTN_NATIVE):
        methods = ["--method", DENSE, *methods]
    if ATTN_NATIVE in turns and row.method != ATTN_NATIVE:
        methods += [NATIVE_OPTION]
    if beside:
        needs.append(f"It was interleaved with {', '.join(beside)} too: add each as a further --method to repeat that.")
    prompt, more = _prompt(row.prompt, "--prompt", row.prompt_file)
    sizes = ["--batch-size", str(row.batch_size)] * (row.batch_size > 1)
    compiled = {"compiled": ["--compile"], "eager": ["--no-compile"]}.get(row.prefill, [])
    counts = ["--repeats", str(row.repeats), "--warmup", str(row.warmup)]
    counts += ["--question-tokens", str(row.question_tokens)] * row.ask_later
    return ["ttft", *methods, *prompt, *sizes, *counts, *compiled], needs + more


@_own.register
def _(row: RulerRow) -> tuple[list[str], list[str]]:
    methods, needs = _method(row)
    words = ["ruler", *methods, "--task", row.task, "--samples", str(row.samples)]
    words += ["--questions", str(row.question)] * (row.question > 1)
    if row.wording == PREPARED:
        needs.append(f"{FOLDER} is the folder of prepared prompts that it was asked from.")
        words += ["--data", FOLDER]
    else:
        if row.wording.startswith("reference"):
            words += ["--wording", "reference"]
        elif not row.wording.startswith("tmbench"):
            needs.append(f"{FILE} is the file of the wording {row.wording}.")
            words += ["--wording", FILE]
        words += ["--samples-as", row.samples_as] * (row.samples_as != "tmbench")
        words += _template(row)
        if row.source.startswith("generated"):
            words.append("--offline")
        elif row.task in TASKS and TASKS[row.task].needs:
            needs.append(f"Its texts are of: {row.source}. Where they are not downloaded, --data-dir names their folder.")
    words += ["--batch-size", str(row.batch_size)] * (row.batch_size > 1)
    return words, needs


@_own.register
def _(row: SuiteRow) -> tuple[list[str], list[str]]:
    methods, needs = _method(row)
    words = ["suite", row.kind, *methods, "--task", row.task, "--samples", str(row.samples), *_template(row)]
    return words + ["--batch-size", str(row.batch_size)] * (row.batch_size > 1), needs


@_own.register
def _(row: LmEvalRow) -> tuple[list[str], list[str]]:
    methods, needs = _method(row)
    words = ["lm-eval", *methods, "--tasks", row.task, "--num-fewshot", str(row.num_fewshot)]
    words += ["--limit", row.limit] * bool(row.limit) + ["--apply-chat-template"] * row.chat_template
    words += ["--no-fewshot-as-multiturn"] * (row.chat_template and not row.asked_as)
    needs.append(f"lm-evaluation-harness {row.harness} asked it: a task of your own needs --include-path {FOLDER}.")
    if row.asked_as:
        needs.append("It was asked with --system-instruction, --gen-kwargs or examples as turns, which rows know by a hash.")
    return words + ["--batch-size", str(row.batch_size)] * (row.batch_size > 1), needs


@_own.register
def _(row: AgreeRow) -> tuple[list[str], list[str]]:
    methods, needs = _method(row)
    if row.method == DENSE:
        needs.append("Dense is measured beside any other method: METHOD is one.")
        methods = [*methods, "--method", "METHOD"]
    prompt, more = _prompt(row.prompt, "--prompt", row.prompt_file)
    words = ["agree", *methods, *prompt, "--samples", str(row.samples), "--new-tokens", str(row.new_tokens)]
    return words + ["--batch-size", str(row.batch_size)] * (row.batch_size > 1), needs + more


@_own.register
def _(row: ProbeRow) -> tuple[list[str], list[str]]:
    words: list[str] = ["probe"]
    needs: list[str] = []
    for name in row.task.split("+"):
        task, more = _prompt(name, "--task")
        words, needs = words + task, needs + more
    words += ["--samples", str(row.samples)]
    words += [word for name, value in row.settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    if found := PROPOSED.fullmatch(row.proposal):
        words += ["--rule", found[1], f"--{found[2]}-budget", found[3], "--derivative", found[4]]
    return words, needs


@_own.register
def _(row: LossRow) -> tuple[list[str], list[str]]:
    methods, needs = _method(row)
    task, more = _prompt(row.task, "--task")
    return ["probe", "--loss", *methods, *task, "--samples", str(row.samples)], needs + more


def _template(row: RulerRow) -> list[str]:
    """The option of a chat template, where there was one."""
    if not row.chat_template:
        return []
    given = row.chat_template_kwargs not in ("", "{}")
    return ["--chat-template-kwargs", row.chat_template_kwargs] if given else ["--apply-chat-template"]


def _method(row: Row) -> tuple[list[str], list[str]]:
    """The options that make a row's method."""
    if row.method == ATTN_NATIVE:
        # It stands beside methods, and without any named there would be several.
        return ["--method", DENSE, NATIVE_OPTION], []
    given = dict(row.settings)
    layers = given.pop(LAYERS, None)
    needs = []
    if given.get("patterns") == "default":
        del given["patterns"]
    elif "patterns" in given:
        needs.append(f"{FILE} is the file of head patterns that the row knows as {given['patterns']}.")
        given["patterns"] = FILE
    parameters = ",".join(f"{name}={value}" for name, value in given.items())
    words = ["--method", row.method + (f":{parameters}" if parameters else "")]
    return words + ([] if layers is None else ["--layers", str(layers)]), needs


def _prompt(prompt: str, option: str, file: str = "") -> tuple[list[str], list[str]]:
    """The options that make a row's prompts; a file of the user's is known by a hash of its contents."""
    form, _, digest = prompt.partition("-")
    if form not in ("jsonl", "text") or not digest:
        return [option, prompt], []
    named = f"the file {file}, or another" if file else "the file"
    needs = [f"{FILE} is {named} whose contents have the hash {digest}."]
    return (["--prompt-file", FILE] if form == "jsonl" else [option, f"text:{FILE}"]), needs
