"""Rows: what every kind of measurement records, one line of a CSV each, complete in itself.

A row's key names what was measured; two rows that agree in it measured the same thing, and the newer one counts. How rows
lie in files is in ``tmbench.results.tables``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from typing import Any, ClassVar, Final, Literal, Self, get_args, get_type_hints

from tmbench.errors import shortened
from tmbench.results import schema_1
from tmbench.results.parameters_text import Value, parse_parameters
from tmbench.results.row_limits import check_values
from tmbench.results.values import parse_value
from tmbench.results.words import fed_words

SCHEMA_VERSION: Final = 2
"""Rises when a column goes or changes its meaning; files of older schemas are read by readers of their own. A column that is
added with a default leaves it: see ``Row.ADDED``."""
OK: Final = "ok"
OUT_OF_MEMORY: Final = "out_of_memory"
FAILED: Final = "failed"
PLAIN_LOOP: Final = "plain"
"""Decoding as transformers does it, one text at a time."""
PREPARED: Final = "prepared"
"""The wording of prompts that ``--data`` read, which no seed of a run drew."""
Status = Literal["ok", "out_of_memory", "failed"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every measurement records. ``key`` names what was measured; the rest says how it came out and where."""

    kind: ClassVar[str]
    extra_key: ClassVar[tuple[str, ...]]

    schema_version: int = SCHEMA_VERSION
    time: str
    """When the row was written: UTC, ISO 8601."""
    status: str = OK
    error: str = ""
    device: str
    """The folder's name: the device, made safe for a path."""
    method: str
    model: str
    revision: str = ""
    weights: str
    model_hash: str = ""
    """What the model was made from, configs, tokenizer and weights: see ``tmbench.models.fingerprint``. "" in older rows."""
    dtype: str
    length: int
    """Tokens: of the prompt for TTFT; of prompt and answer together for RULER."""
    seed: int
    parameters: str = ""
    """The parameters of the method: see ``tmbench.results.parameters_text``, and ``settings`` for the values."""
    layers_source: str = ""
    """Where the choice of deep layers comes from, in words; "" for methods without."""
    prefill: str = "plain"
    """How the model read its prompts: "plain", as transformers runs it; "eager", without work that the first token does not
    need; "compiled", with compiled layers too."""
    tensor_parallel_size: int = 1
    """How many GPUs shared the model, each with a part of every layer's heads and MLP."""
    context_parallel_size: int = 1
    """How many GPUs shared each prompt, each with a part of its tokens, and in attention of the heads."""
    rope_scaling: str = ""
    """That of ``--rope-scaling``, as the option takes it; "" for rotary embeddings as the checkpoint has them."""
    remote_code: bool = False
    """Whether code that the checkpoint brings ran, and not transformers' own for its family."""
    quantization: str = ""
    """How the checkpoint holds its weights, such as "gguf Q4_K+Q6_K, dequantized"; "" for ordinary ones."""
    chunk: int = 0
    """How many tokens of a prompt the method read at a time; 0 for prompts in one piece."""
    prompt_length: str = ""
    """Whether attention was told how long the prompt is while it read a chunk, "known" or "unknown"; "" in one piece."""
    ask_later: bool = False
    """Whether the method read a prompt's context alone, and its question was then read densely over what that left."""
    backends: str = ""
    """What ran: pattern:backend, joined by "+"."""
    peak_memory_bytes: int | None = None
    """Device memory at its peak, model included, of several GPUs the most that one had; empty on the CPU."""
    threads: int
    """CPU threads that torch used; 0 where the device is not the CPU."""
    device_name: str
    driver: str = ""
    tmbench: str
    commit: str = ""
    dirty: bool = False
    python: str
    torch: str
    triton: str = ""
    transformers: str
    environment: str
    """The name of the environment record beside the CSVs, without ".json"."""

    SHARED_KEY: ClassVar[tuple[str, ...]] = (
        "device", "method", "model", "revision", "weights", "dtype", "length", "seed", "parameters", "threads", "model_hash",
        "prefill", "tensor_parallel_size", "context_parallel_size", "rope_scaling", "remote_code", "quantization",
        "chunk", "prompt_length", "ask_later",
    )  # fmt: skip
    ADDED: ClassVar[tuple[str, ...]] = (
        "tensor_parallel_size", "context_parallel_size", "rope_scaling", "remote_code", "quantization", "chunk",
        "prompt_length", "ask_later",
    )  # fmt: skip
    """Columns that the first files of this schema lack; each has a default."""

    @classmethod
    def key_fields(cls) -> tuple[str, ...]:
        """The fields that say what was measured: two rows that agree in them measured the same thing."""
        return (*cls.SHARED_KEY, *cls.extra_key)

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured. The order of the parameters does not count."""
        return tuple(self._key_value(name) for name in self.key_fields())

    def _key_value(self, name: str) -> Any:
        return tuple(sorted(self.settings.items())) if name == "parameters" else getattr(self, name)

    @property
    def fed(self) -> str:
        """How prompts were fed, in words that stand behind a text; "" in one piece."""
        return fed_words(self.chunk, self.prompt_length, self.ask_later)

    @property
    def settings(self) -> Mapping[str, Value]:
        """The method's parameters by name, deep layers as a text among them; what a method does not read is not there."""
        return parse_parameters(self.parameters)

    @property
    def digest(self) -> str:
        """A hash of everything that was measured, for the names of files: the one that the first release gave it."""
        # A column that came later counts where it is not at what stands for it.
        defaults = self.defaults()
        later = {**schema_1.ADDED, **{name: defaults[name] for name in self.ADDED}}
        told = {name: value for name, value in self.key_columns.items() if name not in later or value != later[name]}
        return short_hash(*map(str, told.values()))

    @property
    def key_columns(self) -> dict[str, Any]:
        """The key as names of files are made from it: see ``tmbench.results.schema_1``."""
        return schema_1.key_columns(vars(self), self.settings, self.key_fields())

    @classmethod
    def columns(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The columns that have a default, and it."""
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}

    @classmethod
    def is_header(cls, names: Sequence[str]) -> bool:
        """Whether these are the columns of this version or of an older one, in any order."""
        known = set(cls.columns())
        return len(set(names)) == len(names) and known.issuperset(names) and known.difference(names) <= set(cls.ADDED)

    @classmethod
    def parse(cls, texts: dict[str, str]) -> Self:
        """A row from a CSV's texts; raises ValueError for a text that its column cannot hold, and an impossible figure."""
        hints = _hints(cls)  # type: ignore[arg-type]  # mypy takes the hash of a row for that of its class
        values = {name: parse_value(text, hints[name], name) for name, text in texts.items()}
        if values["status"] not in get_args(Status):
            raise ValueError(f"status is {shortened(values['status'])!r}, not one of {', '.join(get_args(Status))}")
        check_values(values)
        parse_parameters(values["parameters"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TtftRow(Row):
    """One time to first token: a method on prompts of one length, read together. Times in seconds."""

    kind: ClassVar[str] = "ttft"
    extra_key: ClassVar[tuple[str, ...]] = ("prompt", "prompt_hash", "batch_size", "question_tokens")

    prompt: str
    prompt_hash: str = ""
    """A hash of the token ids of all prompts."""
    prompt_file: str = ""
    """The name of the file that they were read from, whose contents ``prompt`` is a hash of; "" for made prompts."""
    repeats: int
    warmup: int
    interleaved: str
    """The methods interleaved with this one, itself included, as ``variants.labels`` tells them apart."""
    ttft_median_s: float | None = None
    ttft_min_s: float | None = None
    ttft_max_s: float | None = None
    samples_s: str = ""
    """Every timed repeat, in order, joined by spaces."""
    coverage: float | None = None
    """The density: the share of the causal (query, key) pairs computed, over all layers and prompts; 1 for dense."""
    flop: float | None = None
    """Operations that this method must do: linear layers, and attention over the pairs it keeps, for all prompts. See
    ``tmbench.engine.roofline``."""
    matrix_rate_flops: float | None = None
    """GEMM throughput: operations per second of large matrix products, measured between the prefills; the median. Of several
    GPUs it is the sum, as ``flop`` counts the whole model."""
    floor_s: float | None = None
    """The roofline: ``flop`` at that throughput."""
    ttft_over_floor: float | None = None
    """TTFT / roofline."""
    first_token: int | None = None
    """Of the first prompt."""
    same_token_as_dense: bool | None = None
    """Whether every prompt's first token is dense's; empty where dense did not run."""
    logit_error: float | None = None
    """RMS of (logits - dense logits) over the RMS of the dense logits, last positions of all prompts; empty where dense did
    not run."""
    batch_size: int = 1
    """How many prompts, all different and of this length, were read together."""
    compile_s: float | None = None
    """How much longer the first warm-up took than the fastest repeat: compilation, loading of kernels."""
    question_tokens: int = 0
    """Where questions are asked later, how many of a prompt's last tokens are one: the time is theirs alone, over the kept
    cache of the others."""
    skipped_share: float | None = None
    """Of methods that skip tiles while they compute: the share skipped, over the layers that do so; empty for others."""
    communication_s: float | None = None
    """How long attention waited for tensors of the other GPUs that share the prompt, on the first of them; the median."""

    ADDED: ClassVar[tuple[str, ...]] = (
        *Row.ADDED, "batch_size", "communication_s", "prompt_file", "question_tokens", "skipped_share",
    )  # fmt: skip

    @property
    def rounds(self) -> tuple[str, float | None]:
        """What rows of one length have in common that come from the same rounds, and others have not.

        The GEMM throughput is measured between the rounds, so that rows of other rounds have another one.
        """
        return self.interleaved, self.matrix_rate_flops

    @property
    def tokens_per_second(self) -> float | None:
        """Prompt tokens read in a second, of all prompts, at the median time."""
        return self.batch_size * self.length / self.ttft_median_s if self.ttft_median_s else None


@dataclass(frozen=True, kw_only=True)
class RulerRow(Row):
    """One RULER score: a method on one task at one length."""

    kind: ClassVar[str] = "ruler"
    title: ClassVar[str] = "RULER"
    """What people call the suite."""
    tasks: ClassVar[tuple[str, ...]] = ()
    """All there are, in the suite's own order; RULER's are those of ``ruler_tasks``."""
    extra_key: ClassVar[tuple[str, ...]] = (
        "task", "wording", "wording_hash", "source", "chat_template", "data_hash", "samples_as",
        "chat_template_kwargs", "question",
    )  # fmt: skip

    task: str
    samples: int
    score: float | None = None
    """0 to 100, as RULER publishes it."""
    nulls: int | None = None
    """Predictions that were empty as RULER counts them: control characters are white space."""
    wording: str
    wording_hash: str
    source: str
    """What the prompts are made of: noise, essays, generated prose, squad, a folder, ..."""
    data_hash: str = ""
    """A hash of that: of the texts and questions or the prepared file, whole, and of the first sample."""
    chat_template: bool
    prompt_tokens_mean: float | None = None
    seconds_per_sample: float | None = None
    """A context that several questions are asked of is read in the time of one of them: see ``measure.answering.Answer``."""
    predictions: str = ""
    """The JSONL file of predictions, relative to the CSV's folder."""
    coverage: float | None = None
    """The density: the share of the causal (query, key) pairs computed over all layers, in the first sample's prefill."""
    # Its quotes keep it from being the last column: see ``csv_text``.
    chat_template_kwargs: str = ""
    """What the chat template was given beside the message: JSON with sorted keys; "" for nothing."""
    samples_as: str = "tmbench"
    """Whose rules the samples were drawn by, where tmbench drew them: "tmbench", or "reference" for RULER's own."""
    skipped_share: float | None = None
    """See ``TtftRow.skipped_share``; in the first sample's prefill."""
    question: int = 1
    """Which of the questions that were asked of each context it is, from 1; the first is the task's own."""
    decode: str = PLAIN_LOOP
    """How answers were decoded: "plain", as transformers does it, one at a time; over a "static-cache", or in a "cuda-graph"
    over one, both of which decode several together. Joined by "+" where samples differ."""
    batch_size: int = 1
    """How many samples decoded together at most."""

    ADDED: ClassVar[tuple[str, ...]] = (*Row.ADDED, "skipped_share", "question", "decode", "batch_size")


@dataclass(frozen=True, kw_only=True)
class AgreeRow(Row):
    """How well one method's greedy choices agree with dense along dense's own text; see ``tmbench.measure.agree``."""

    kind: ClassVar[str] = "agree"
    extra_key: ClassVar[tuple[str, ...]] = ("prompt", "new_tokens", "prompt_hash")

    prompt: str
    prompt_hash: str = ""
    """A hash of the first prompt's token ids."""
    prompt_file: str = ""
    """See ``TtftRow.prompt_file``."""
    samples: int
    new_tokens: int
    """Tokens that dense wrote behind each prompt."""
    agreement: float | None = None
    """The part of all places, 0 to 1, at which the method's choice is dense's."""
    divergence_median: float | None = None
    """Tokens in common with dense before the first that differs, the median over samples; ``new_tokens`` where none does."""
    identical: float | None = None
    """The part of the samples, 0 to 1, in which no token differs."""
    seconds_per_sample: float | None = None
    choices: str = ""
    """The JSONL file of choices, relative to the CSV's folder."""
    decode: str = PLAIN_LOOP
    """How texts were decoded, see ``RulerRow.decode``."""
    batch_size: int = 1
    """How many samples decoded together at most."""

    ADDED: ClassVar[tuple[str, ...]] = (*Row.ADDED, "decode", "batch_size", "prompt_file")


@dataclass(frozen=True, kw_only=True)
class ProbeRow(Row):
    """How much three sections of one layer's attention matter to the first generated token: see ``tmbench.measure.probe``.

    ``<section>_<measure>`` is the mean over the section's pairs, the heads that the row is about, and the samples; empty for
    a section without pairs. The measures are the derivatives of the true next token's logit by the attention logits and by
    the attention probabilities, absolute and signed.
    """

    kind: ClassVar[str] = "probe"
    extra_key: ClassVar[tuple[str, ...]] = ("task", "wording_hash", "layer", "head")

    task: str
    """What the prompts ask; several tasks are joined by "+"."""
    samples: int
    """Of each task."""
    wording_hash: str
    source: str
    """What the prompts are made of."""
    layer: int | None = None
    """From 0; empty where the probe failed as a whole."""
    head: int | None = None
    """The query head, from 0; empty for the mean over all heads of the layer."""
    streaming_logits: float | None = None
    middle_logits: float | None = None
    last_logits: float | None = None
    streaming_logits_signed: float | None = None
    middle_logits_signed: float | None = None
    last_logits_signed: float | None = None
    streaming_probabilities: float | None = None
    middle_probabilities: float | None = None
    last_probabilities: float | None = None
    streaming_probabilities_signed: float | None = None
    middle_probabilities_signed: float | None = None
    last_probabilities_signed: float | None = None
    kept_share: float | None = None
    """Share of the causal pairs that are not in the middle section, which triangle attention computes."""
    prompt_tokens_mean: float | None = None
    probability_mean: float | None = None
    """The model's probability of the true next token."""
    answered: float | None = None
    """The part of the samples in which the true next token is the likeliest."""
    seconds_per_sample: float | None = None
    triangle: bool | None = None
    """Whether the proposal gives the layer triangle attention; empty for single heads."""
    proposal: str = ""
    """What decided that: the rule, the budget and the derivative."""
    lost_share: float | None = None
    """The share of the middle sections' gradient that the proposal loses, over all layers."""
    pairs_share: float | None = None
    """The share of dense attention's pairs that the proposal computes, over all layers."""
    sample_files: str = ""
    """The JSONL files of the samples, relative to the CSV's folder, joined by "+"."""

    @property
    def probed(self) -> tuple[Any, ...]:
        """The key without layer and head: what one probe's rows have in common."""
        return tuple(self._key_value(name) for name in self.probed_fields)

    @property
    def probed_fields(self) -> tuple[str, ...]:
        """The names of what is in ``probed``."""
        return tuple(name for name in self.key_fields() if name not in ("layer", "head"))


@dataclass(frozen=True, kw_only=True)
class LossRow(Row):
    """A method's negative log-likelihood inside of prompts and after them, in nats per token: see ``tmbench.measure.loss``."""

    kind: ClassVar[str] = "loss"
    extra_key: ClassVar[tuple[str, ...]] = ("task", "wording_hash")

    task: str
    samples: int
    wording_hash: str
    source: str
    nll_prompt: float | None = None
    """Of the prompt's tokens but the first, each given those before it: mean over tokens, then over samples."""
    nll_answer: float | None = None
    """Of the answer's tokens, each given the prompt and those before it."""
    nll_first: float | None = None
    """Of the answer's first token alone."""
    nll_prompt_vs_dense: float | None = None
    """The mean difference to dense attention on the same samples; empty where dense has not read them."""
    nll_answer_vs_dense: float | None = None
    nll_first_vs_dense: float | None = None
    prompt_tokens_mean: float | None = None
    answer_tokens_mean: float | None = None
    seconds_per_sample: float | None = None
    sample_files: str = ""
    """The JSONL file of the samples, relative to the CSV's folder."""


@cache
def _hints(row: type[Row]) -> dict[str, Any]:
    """The columns' types; making them out takes much longer than reading a row."""
    return get_type_hints(row)


def short_hash(*parts: str) -> str:
    """12 hexadecimal digits that texts are told apart by."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def now() -> str:
    """The time as rows hold it: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
