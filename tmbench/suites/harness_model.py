"""What lm-evaluation-harness takes for a model: it encodes what is asked, and answers with what was measured before.

Only to be imported where the harness is installed: see ``tmbench.suites.harness``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from tmbench.errors import UserError

NEW_TOKENS = 256
"""Of an answer, where a task does not say how many it may have; the harness's own number."""


class UnansweredError(Exception):
    """The harness has built all requests and asks the first ones."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A tokenizer, and answers by the requests that they answer; without any it can only be asked."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, length: int, answers: Mapping[str, tuple[str, float, bool]] | None = None
    ) -> None:
        """As what the harness asks.

        Args:
            length: the most tokens of a prompt and its answer.
            answers: by ``key_of`` the text that was written, the given one's log-likelihood, and whether it was likeliest.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = length
        self.answers = answers

    @property
    def eot_token_id(self) -> int:
        """The token at which a text ends."""
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token, which lm-eval's tasks need: give --model one that has")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that has no context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells chat templates apart by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's own format."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; a text that has the beginning token in it gets no second one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether likeliest) of texts behind contexts."""
        return [answer[1:] for answer in self._answers(requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of texts."""
        return [answer[1] for answer in self._answers(requests)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What was written behind contexts."""
        return [answer[0] for answer in self._answers(requests)]

    def _answers(self, requests: Sequence[Any]) -> list[tuple[str, float, bool]]:
        if self.answers is None:
            raise UnansweredError
        return [self.answers[key_of(request)] for request in requests]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        # What the harness has encoded is all that is wanted of it here.
        return requests

    def pair(self, request: Any) -> tuple[list[int], list[int]]:
        """The ids of a context and of the text behind it, as the harness parts them."""
        ((_, context, following),) = super().loglikelihood([request], disable_tqdm=True)
        return context, following

    def windows(self, request: Any) -> list[tuple[list[int], list[int]]]:
        """The ids of a text in as many stretches as it takes, each with what stands before it."""
        stretches = get_rolling_token_windows(
            token_list=self.tok_encode(request.args[0]),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(stretch) for stretch in stretches]

    def writing(self, request: Any) -> tuple[list[int], dict[str, Any]]:
        """The ids of a context, and how it is to be continued: ``until``, ``max_gen_toks``, the rest as the task has it."""
        context, given = request.args
        options = dict(normalize_gen_kwargs(given, NEW_TOKENS))
        end = self.tokenizer.decode([self.eot_token_id])
        options["until"] = handle_stop_sequences(options.get("until"), eos=end)
        return self.tok_encode(context), options


def key_of(request: Any) -> str:
    """What a request asks, as text: the harness may ask the same more than once."""
    return json.dumps([request.request_type, *request.args], sort_keys=True, default=repr)
