"""Rows: what every kind of measurement records, one line of a CSV each, complete in itself.

A row's key names what was measured; two rows that agree in it measured the same thing, and the newer one counts. How rows
lie in files is in ``tmbench.results.tables``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from typing import Any, ClassVar, Final, Literal, Self, get_args, get_type_hints

from tmbench.errors import shortened
from tmbench.results.row_limits import check_values

SCHEMA_VERSION = 1
"""Rises when a column goes or changes its meaning. One that is added with a default leaves it: see ``Row.ADDED``."""
PARAMETERS: Final = (
    "starting_layer", "layers", "n_init", "n_local", "last_n", "patterns", "dense_backend",
    "gamma", "tau", "min_budget", "stride", "threshold", "first_chunk", "alpha",
)  # fmt: skip
"""The columns that hold a method's parameters."""
OK: Final = "ok"
OUT_OF_MEMORY: Final = "out_of_memory"
FAILED: Final = "failed"
Status = Literal["ok", "out_of_memory", "failed"]
UNESCAPED: Final = {r"\\": "\\", r"\n": "\n", r"\r": "\r"}
"""How line ends, and the backslash that stands for them, are written in every column but ``error``."""
ESCAPES: Final = str.maketrans({plain: written for written, plain in UNESCAPED.items()})


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
    starting_layer: int | None = None
    starting_layer_source: str = ""
    """Where the choice of deep layers comes from, be it a first layer or a list."""
    layers: str = ""
    """The deep layers, such as 5,7,10,15-35, where they are not all from ``starting_layer`` on."""
    n_init: int | None = None
    n_local: int | None = None
    last_n: int | None = None
    patterns: str = ""
    dense_backend: str = ""
    """The backend that dense attention was held to; "" where tmbench chose it."""
    gamma: float | None = None
    tau: float | None = None
    min_budget: int | None = None
    stride: int | None = None
    threshold: float | None = None
    first_chunk: int | None = None
    alpha: float | None = None
    prefill: str = "plain"
    """How the model read its prompts: "plain", as transformers runs it; "eager", without work that the first token does not
    need; "compiled", with compiled layers too."""
    backends: str = ""
    """What ran: pattern:backend, joined by "+"."""
    peak_memory_bytes: int | None = None
    """Device memory at its peak, model included; empty on the CPU."""
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
        "device", "method", "model", "revision", "weights", "dtype", "length", "seed",
        "starting_layer", "n_init", "n_local", "last_n", "patterns", "threads", "dense_backend",
        "gamma", "tau", "min_budget", "stride", "threshold", "first_chunk", "alpha", "layers", "model_hash", "prefill",
    )  # fmt: skip
    ADDED: ClassVar[tuple[str, ...]] = (
        "dense_backend", "gamma", "tau", "min_budget", "stride", "threshold", "first_chunk", "alpha", "layers",
        "model_hash", "prefill", "peak_memory_bytes",
    )  # fmt: skip
    """Columns that files of the first release lack; each has a default."""

    @classmethod
    def key_fields(cls) -> tuple[str, ...]:
        """The fields that say what was measured: two rows that agree in them measured the same thing."""
        return (*cls.SHARED_KEY, *cls.extra_key)

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.key_fields())

    @property
    def settings(self) -> dict[str, int | float | str]:
        """The method's parameters that are set, by the names of the options; what a method does not read is not there."""
        found = {name: getattr(self, name) for name in PARAMETERS}
        return {name: value for name, value in found.items() if value not in (None, "")}

    @property
    def name_parts(self) -> tuple[str, ...]:
        """The key as names of files are made from it: an added column counts only where it is not at its default."""
        added = {name: value for name, value in self.defaults().items() if name in self.ADDED}
        return tuple(str(getattr(self, n)) for n in self.key_fields() if n not in added or getattr(self, n) != added[n])

    @property
    def digest(self) -> str:
        """A hash of everything that was measured, for the names of files."""
        return short_hash(*self.name_parts)

    @classmethod
    def columns(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The columns that have a default, and it."""
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}

    @classmethod
    def is_header(cls, names: list[str]) -> bool:
        """Whether these are the columns of this version or of an older one, in any order."""
        known = set(cls.columns())
        return len(set(names)) == len(names) and known.issuperset(names) and known.difference(names) <= set(cls.ADDED)

    @classmethod
    def parse(cls, texts: dict[str, str]) -> Self:
        """A row from a CSV's texts; raises ValueError for a text that its column cannot hold, and an impossible figure."""
        hints = _hints(cls)  # type: ignore[arg-type]  # mypy takes the hash of a row for that of its class
        values = {name: _parse(text, hints[name], name) for name, text in texts.items()}
        if values["status"] not in get_args(Status):
            raise ValueError(f"status is {shortened(values['status'])!r}, not one of {', '.join(get_args(Status))}")
        check_values(values)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TtftRow(Row):
    """One time to first token: a method on a prompt of one length. Times in seconds."""

    kind: ClassVar[str] = "ttft"
    ADDED: ClassVar[tuple[str, ...]] = (*Row.ADDED, "compile_s", "prompt_hash")
    extra_key: ClassVar[tuple[str, ...]] = ("prompt", "prompt_hash")

    prompt: str
    prompt_hash: str = ""
    """A hash of the prompt's token ids."""
    repeats: int
    warmup: int
    interleaved: str
    """The methods measured in turns with this one."""
    ttft_median_s: float | None = None
    ttft_min_s: float | None = None
    ttft_max_s: float | None = None
    samples_s: str = ""
    """Every timed repeat, in order, joined by spaces."""
    coverage: float | None = None
    """Part of the causal (query, key) pairs that attention computed, over all layers: 1 for dense."""
    flop: float | None = None
    """Operations that this method must do: linear layers, and attention over the pairs it keeps. See ``tmbench.engine.roofline``."""
    matrix_rate_flops: float | None = None
    """Operations per second of large matrix products on this device, measured between the prefills; the median."""
    floor_s: float | None = None
    ttft_over_floor: float | None = None
    first_token: int | None = None
    same_token_as_dense: bool | None = None
    logit_error: float | None = None
    """RMS of (logits - dense logits) over the RMS of the dense logits, last position; empty where dense did not run."""
    compile_s: float | None = None
    """How much longer the first warm-up took than the fastest repeat: compilation, loading of kernels."""


@dataclass(frozen=True, kw_only=True)
class RulerRow(Row):
    """One RULER score: a method on one task at one length."""

    kind: ClassVar[str] = "ruler"
    ADDED: ClassVar[tuple[str, ...]] = (*Row.ADDED, "coverage", "data_hash", "samples_as", "chat_template_kwargs")
    extra_key: ClassVar[tuple[str, ...]] = (
        "task", "wording", "wording_hash", "source", "chat_template", "data_hash", "samples_as",
        "chat_template_kwargs",
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
    predictions: str = ""
    """The JSONL file of predictions, relative to the CSV's folder."""
    coverage: float | None = None
    """Part of the causal (query, key) pairs that attention computed over all layers, in the first sample's prefill."""
    # Its quotes keep it from being the last column: see ``csv_text``.
    chat_template_kwargs: str = ""
    """What the chat template was given beside the message: JSON with sorted keys; "" for nothing."""
    samples_as: str = "tmbench"
    """Whose rules the samples were drawn by, where tmbench drew them: "tmbench", or "reference" for RULER's own."""


@dataclass(frozen=True, kw_only=True)
class AgreeRow(Row):
    """How well one method's greedy choices agree with dense along dense's own text; see ``tmbench.measure.agree``."""

    kind: ClassVar[str] = "agree"
    ADDED: ClassVar[tuple[str, ...]] = (*Row.ADDED, "prompt_hash")
    extra_key: ClassVar[tuple[str, ...]] = ("prompt", "new_tokens", "prompt_hash")

    prompt: str
    prompt_hash: str = ""
    """A hash of the first prompt's token ids."""
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
    """Part of the causal pairs that are not in the middle section, which triangle attention computes."""
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
        return tuple(getattr(self, name) for name in self.probed_fields)

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


def field_text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return repr(value)
    # A row is one line of the file, whatever it holds. Of an error the words count; all else must read back as it was, or a
    # row would not be found under its own key.
    return " ".join(str(value).split()) if name == "error" else str(value).translate(ESCAPES)


def _parse(text: str, hint: Any, name: str) -> Any:
    kinds = getattr(hint, "__args__", (hint,))
    if text == "" and type(None) in kinds:
        return None
    if bool in kinds:
        if text not in ("yes", "no"):
            raise ValueError(f"{name} is {shortened(text)!r}, not yes or no")
        return text == "yes"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                raise ValueError(f"{name} is {shortened(text)!r}, not a number") from None
    # Hardly any text has one, and a search in each takes as long as all else of a row.
    if name == "error" or "\\" not in text:
        return text
    return re.sub(r"\\[\\nr]", lambda found: UNESCAPED[found[0]], text)
