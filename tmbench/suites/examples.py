"""What suites of text have in common: the model's chat template around a task's text, and token ids of what is drawn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ruler_tasks import Example, encode_prompt, encode_prompts
from tmbench.errors import UserError
from tmbench.suites.chat import Chat, parse_kwargs, take_apart
from tmbench.suites.split import shared
from tmbench.suites.suite import Sample, Suite


@dataclass(frozen=True, kw_only=True)
class ExampleSuite(Suite):
    """A suite whose samples are those of ``ruler_tasks``."""

    chat_template_kwargs: str | None = None
    """The variables of the model's chat template, as JSON; None asks without a template."""

    @abstractmethod
    def examples(
        self, task: str, length: int, places: Sequence[int], seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> Iterable[Example]:
        """The samples of a task as ``ruler_tasks`` has them; raises UserError as ``check`` does."""

    def chat(self, tokenizer: PreTrainedTokenizerBase) -> Chat:
        """What the model's chat template makes of a prompt; raises UserError where it cannot be used."""
        if self.chat_template_kwargs is None:
            return Chat()
        return take_apart(tokenizer, parse_kwargs(self.chat_template_kwargs))

    def chat_columns(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What rows say of the model's chat template; raises UserError where it cannot be used."""
        return {
            "chat_template": self.chat_template_kwargs is not None,
            "chat_template_kwargs": self.chat(tokenizer).kwargs,
        }

    def samples(
        self, task: str, length: int, places: Sequence[int], seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Sample]:
        """The samples at these places, each with the ids that the model reads."""
        special = self.chat(tokenizer).frame.add_special_tokens
        examples = list(self.examples(task, length, places, seed, tokenizer))
        prompts = encode_prompts(tokenizer, (example.prompt for example in examples), add_special_tokens=special)
        return [
            Sample(
                example.index,
                example.prompt,
                tuple(ids),
                example.outputs,
                example.max_new_tokens,
                example.source,
                dict(example.parameters),
                self.question_at(example),
            )
            for example, ids in zip(examples, prompts, strict=True)
        ]

    def question_at(self, example: Example) -> int:
        """The character of a sample's prompt at which its question begins; 0 where that is not known."""
        return 0

    def with_contexts(self, task: str, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> Sequence[Sample]:
        """As ``Suite.with_contexts``: a context has the tokens that a prompt begins with whatever is asked.

        Those of the text before the question, as far as they are the whole prompt's: a token may reach into both.
        """
        special = self.chat(tokenizer).frame.add_special_tokens
        found = []
        for sample in samples:
            if not sample.question_at:
                raise UserError(f"--ask-later: it is not known where the questions of {task} begin: leave it out")
            ids = encode_prompt(tokenizer, sample.prompt[: sample.question_at], add_special_tokens=special)
            found.append(replace(sample, context=shared(ids, sample.ids)))
        return found
