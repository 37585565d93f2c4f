"""What rows must agree in to be held against each other: one frozen setting for each kind of section."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from tmbench.report.samples_as import drawn_words
from tmbench.results.lm_eval_rows import LmEvalRow
from tmbench.results.rows import PREPARED, AgreeRow, LossRow, ProbeRow, Row, RulerRow, TtftRow
from tmbench.results.tune_rows import TuneRow
from tmbench.results.words import counted, fed_words


@dataclass(frozen=True, order=True)
class Setting:
    """The device and the model."""

    BARE: ClassVar[tuple[tuple[str, object], ...]] = (
        ("model_hash", ""),
        ("tensor_parallel_size", 1),
        ("context_parallel_size", 1),
        ("rope_scaling", ""),
        ("remote_code", False),
        ("quantization", ""),
        ("chunk", 0),
        ("prompt_length", ""),
        ("ask_later", False),
    )
    """Fields that older rows have not, at the values that stand for it: they leave a setting's file names as they were."""

    device: str
    model: str
    revision: str
    weights: str
    dtype: str
    model_hash: str
    tensor_parallel_size: int
    """How many GPUs shared the model."""
    context_parallel_size: int
    """How many GPUs shared each prompt."""
    rope_scaling: str
    """Of the option; "" for the checkpoint's own."""
    remote_code: bool
    """Whether the checkpoint's own code ran."""
    quantization: str
    """How the checkpoint holds its weights; "" for ordinary ones."""
    chunk: int
    """Tokens of a prompt that were read at a time; 0 for prompts in one piece."""
    prompt_length: str
    """Whether its length was known then; "" in one piece."""
    ask_later: bool
    """Whether questions were read after their contexts."""

    @property
    def base(self) -> Setting:
        """The device and the model alone: what times and accuracies of the same model have in common."""
        return Setting(*(getattr(self, field.name) for field in fields(Setting)))

    @property
    def subject(self) -> str:
        """The model, in words."""
        revision = f" at {self.revision[:8]}" if self.revision else ""
        contents = f" (files {self.model_hash[:8]})" if self.model_hash else ""
        split = f", split over {self.tensor_parallel_size} GPUs" if self.tensor_parallel_size > 1 else ""
        if self.context_parallel_size > 1:
            split += f", prompts split over {self.context_parallel_size} GPUs"
        scaling = f", rope scaling {self.rope_scaling}" if self.rope_scaling else ""
        scaling += ", by the checkpoint's own code" * self.remote_code
        kept = f"{self.weights} weights" + f" ({self.quantization})" * bool(self.quantization)
        return f"{self.model}{revision}{contents}, {kept}, {self.dtype}{scaling}{split}{self.fed}"

    @property
    def fed(self) -> str:
        """How prompts were fed, in words, with ", " before them; nothing in one piece."""
        return fed_words(self.chunk, self.prompt_length, self.ask_later)

    @property
    def read(self) -> str:
        """As ``fed``, with all else that tells such prompts apart from the same in one piece."""
        return self.fed


@dataclass(frozen=True, order=True)
class TtftSetting(Setting):
    """Of times: one kind of prompt, so many of them read together by one prefill."""

    BARE: ClassVar[tuple[tuple[str, object], ...]] = (
        *Setting.BARE, ("older_prompt", 0), ("batch_size", 1), ("question_tokens", 0),
    )  # fmt: skip

    prompt: str
    prefill: str
    threads: int
    seed: int
    older_prompt: int
    """Counts the prompts that read otherwise from the newest, 0, back."""
    batch_size: int
    question_tokens: int
    """Of a question that is asked later, which alone is timed; 0 for whole prompts."""

    @classmethod
    def of(cls, row: TtftRow, older: int) -> TtftSetting:
        same = ("prompt", "prefill", "threads", "seed", "batch_size", "question_tokens")
        return cls(**model_of(row), **_taken(row, same), older_prompt=older)

    @property
    def words(self) -> str:
        """The setting in words, without the model."""
        return times_words(self)

    @property
    def read(self) -> str:
        return self.fed + f", {turn_words(self.question_tokens)}" * bool(self.question_tokens)


@dataclass(frozen=True, order=True)
class AgreeSetting(Setting):
    """Of token agreement: one kind of prompt, and answers of one length."""

    prompt: str
    new_tokens: int
    threads: int
    seed: int
    older_prompt: int
    prefill: str

    @classmethod
    def of(cls, row: AgreeRow, older: int) -> AgreeSetting:
        same = ("prompt", "new_tokens", "threads", "seed", "prefill")
        return cls(**model_of(row), **_taken(row, same), older_prompt=older)


@dataclass(frozen=True, order=True)
class RulerSetting(Setting):
    """Of scores: one length, one wording and one set of data."""

    BARE: ClassVar[tuple[tuple[str, object], ...]] = (
        *Setting.BARE, ("samples_as", "tmbench"), ("chat_template_kwargs", ""), ("accuracy_prefill", "plain"),
        ("question", 1),
    )  # fmt: skip

    length: int
    wording: str
    wording_version: str
    """A hash of the wording; "" for prepared prompts, whose hash names the data."""
    samples_as: str
    chat_template: bool
    chat_template_kwargs: str
    threads: int
    seed: int
    older_data: int
    """Counts the data that were measured on from the newest, 0, back."""
    accuracy_prefill: str
    """How the scores' prompts were read."""
    question: int
    """Which of those that were asked of each context."""

    @classmethod
    def of(cls, row: RulerRow, older: int) -> RulerSetting:
        same = ("length", "wording", "samples_as", "chat_template", "chat_template_kwargs", "threads", "seed")
        version = "" if row.wording == PREPARED else row.wording_hash
        newer: dict[str, Any] = {"wording_version": version, "older_data": older, "accuracy_prefill": row.prefill}
        newer |= {"question": row.question}
        return cls(**model_of(row), **_taken(row, same), **newer)

    @property
    def drawn(self) -> str:
        """How the samples were drawn, in words, with ", " behind them; nothing for tmbench's own rules."""
        return drawn_words(self.samples_as)

    @property
    def template(self) -> str:
        """Whether there is a chat template, and what it was given, in words."""
        given = f" {self.chat_template_kwargs}" if self.chat_template_kwargs else ""
        return f"with chat template{given}" if self.chat_template else "without chat template"

    @property
    def words(self) -> str:
        """The setting in words, without the model and the length."""
        wording = f"wording {self.wording} {self.wording_version}".rstrip()
        older = f", older data {self.older_data}" if self.older_data else ""
        older += f", question {self.question} of each context" if self.question > 1 else ""
        machine = f"{prefill_words(self.accuracy_prefill)}{machine_words(self.threads)}"
        return f"{wording}, {self.drawn}{self.template}, {machine}seed {self.seed}{older}"


@dataclass(frozen=True, order=True)
class TradeOffSetting(RulerSetting):
    """Of times and scores together."""

    BARE: ClassVar[tuple[tuple[str, object], ...]] = (*RulerSetting.BARE, ("batch_size", 1), ("question_tokens", 0))

    prompt: str
    prefill: str
    """How the timed prompts were read."""
    batch_size: int
    """How many of these were read together."""
    question_tokens: int

    @classmethod
    def joined(cls, scores: RulerSetting, times: TtftSetting) -> TradeOffSetting:
        return cls(
            **vars(scores), prompt=times.prompt, prefill=times.prefill, **_taken(times, ("batch_size", "question_tokens"))
        )


@dataclass(frozen=True, order=True)
class LossSetting(Setting):
    """Of losses: one set of prompts for each task and length."""

    threads: int
    seed: int
    older_data: int
    prefill: str

    @classmethod
    def of(cls, row: LossRow, older: int) -> LossSetting:
        return cls(**model_of(row), **_taken(row, ("threads", "seed", "prefill")), older_data=older)


@dataclass(frozen=True, order=True)
class LmEvalSetting(Setting):
    """Of lm-evaluation-harness: one version of it, one length, and one way of asking."""

    length: int
    harness: str
    limit: str
    num_fewshot: int
    chat_template: bool
    asked_as: str
    threads: int
    seed: int
    prefill: str
    older_data: int

    @classmethod
    def of(cls, row: LmEvalRow, older: int) -> LmEvalSetting:
        same = (
            "length", "harness", "limit", "num_fewshot", "chat_template", "asked_as", "threads", "seed", "prefill",
        )  # fmt: skip
        return cls(**model_of(row), **_taken(row, same), older_data=older)

    @property
    def words(self) -> str:
        """The setting in words, without the model, the version and the length."""
        template = f"with{'' if self.chat_template else 'out'} chat template"
        asked = f", asked as {self.asked_as}" if self.asked_as else ""
        limit = f", --limit {self.limit}" if self.limit else ""
        machine = f"{prefill_words(self.prefill)}{machine_words(self.threads)}"
        shots = counted(self.num_fewshot, "example")
        return f"{shots}, {template}{asked}{limit}, {machine}seed {self.seed}{older_words('data', self.older_data)}"


@dataclass(frozen=True, order=True)
class ProbeSetting(Setting):
    """Of one probe: its prompts, and the sections that its parameters make."""

    BARE: ClassVar[tuple[tuple[str, object], ...]] = (*Setting.BARE, ("older_data", 0), ("prefill", "plain"))

    task: str
    length: int
    threads: int
    seed: int
    prefill: str
    parameters: str
    older_data: int

    @classmethod
    def of(cls, row: ProbeRow, older: int) -> ProbeSetting:
        given = ", ".join(f"{name} {value}" for name, value in row.settings.items())
        same = ("task", "length", "threads", "seed", "prefill")
        return cls(**model_of(row), **_taken(row, same), parameters=given, older_data=older)


@dataclass(frozen=True, order=True)
class TuneSetting(Setting):
    """Of one search for layers."""

    method: str
    tuning: str
    """A hash of all that decides how it goes."""
    threads: int
    seed: int
    prefill: str

    @classmethod
    def of(cls, row: TuneRow, older: int) -> TuneSetting:
        return cls(**model_of(row), **_taken(row, ("method", "tuning", "threads", "seed", "prefill")))


def model_of(row: Row) -> dict[str, Any]:
    """What a row says of its device and model, by the names of ``Setting``."""
    return _taken(row, (field.name for field in fields(Setting)))


def _taken(row: Row | Setting, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def times_words(about: TtftSetting | TradeOffSetting) -> str:
    """How prompts were timed, in words."""
    batches = f"batches of {about.batch_size}, " if about.batch_size > 1 else ""
    question = f"{turn_words(about.question_tokens)}, " if about.question_tokens else ""
    return (
        f"prompt {about.prompt}, {batches}{question}{about.prefill} prefill, {machine_words(about.threads)}seed {about.seed}"
    )


def turn_words(question_tokens: int) -> str:
    """A question that is asked later, as what is timed."""
    return f"second turn of {counted(question_tokens, 'token')}"


def machine_words(threads: int) -> str:
    """The CPU threads in words, where the device is a CPU, with ", " behind them."""
    return f"{counted(threads, 'CPU thread')}, " if threads else ""


def prefill_words(prefill: str) -> str:
    """A prefill other than that of transformers, with ", " behind it."""
    return "" if prefill == "plain" else f"{prefill} prefill, "


def older_words(noun: str, older: int) -> str:
    """What tells contents of one kind apart that read otherwise, in words."""
    return f", older {noun} {older}" if older else ""
