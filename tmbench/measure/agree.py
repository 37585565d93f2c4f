"""Long answers: where a method's greedy decoding leaves dense's, and how often its next token is dense's own.

Dense writes so many tokens by greedy decoding, its end token left out so that every text has that length. A method reads the
same prompt in its own way, then dense's text token by token, and at each place its likeliest next token is its choice. Up to
the first choice that differs this is the method's own greedy decoding, so that place is where the two diverge. After it the
method goes on along dense's text: one different token does not count against all the tokens that come after it.

Choices go to a JSONL file beside the CSV, one line per sample, so that a killed run goes on with the next sample.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from tmbench.errors import UserError
from tmbench.measure.answering import Answer, AnswerItem, AnswerSpec, Asked
from tmbench.measure.keeping import RowTarget
from tmbench.measure.shard import row_target
from tmbench.measure.spec import Part, Place, Step
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results.choices import Choices, choices_of, kept_choices
from tmbench.results.rows import AgreeRow, now
from tmbench.results.sample_files import decoded
from tmbench.results.variants import dense_of
from tmbench.suites.prompt_files import PromptFile
from tmbench.suites.prompts import Kind, check_prompt, file_of, prompt_context, prompt_id, prompt_ids


@dataclass(frozen=True, kw_only=True)
class AgreeItem(AnswerItem):
    """One prompt, and dense's text behind it, read by one method."""

    length: int
    prompt_hash: str
    text: tuple[int, ...] | None
    """Dense's text; None has the method write its own."""
    id: str = ""
    """What the user calls the prompt."""
    context: int = 0
    """How many of the prompt's tokens stand before its question, where that is asked later."""


@dataclass(frozen=True, kw_only=True)
class AgreeSpec(AnswerSpec[AgreeRow]):
    """What one ``tmbench agree`` measures. Dense is the first of its plans: the others are held against its text."""

    lengths: Sequence[int]
    prompt: Kind = "kv"
    samples: int = 10
    new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.plans[0] is not dense_of(self.plans):
            raise ValueError("the first plan must be dense, whose text the other methods follow")

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError for a prompt that cannot be made, or that leaves no room for the new tokens."""
        check_prompt(self.prompt, loaded, self.lengths, self.samples)
        if self.ask_later:
            # Lines of a file are each their own; a task's questions are alike, and the shortest prompt keeps the least.
            each = isinstance(self.prompt, PromptFile)
            for length, number in product(self.lengths, range(self.samples)) if each else [(min(self.lengths), 0)]:
                prompt_context(self.prompt, length, loaded, self.seed, number)
        limit = loaded.longest
        for length in self.lengths:
            if limit is not None and length + self.new_tokens > limit:
                raise UserError(
                    f"--length {length} and --new-tokens {self.new_tokens} are more than the {limit} positions of "
                    f"{loaded.name}: give a length of {max(limit - self.new_tokens, 1)} or less, or fewer new tokens"
                )

    def ids(self, loaded: LoadedModel, length: int, number: int) -> Tensor:
        """A sample's prompt, ``[1, length]`` on the model's device."""
        return prompt_ids(self.prompt, length, loaded, self.seed, number)

    def parts(self, loaded: LoadedModel) -> Iterator[Part[AgreeRow]]:
        """One part; at each length dense writes in a first round what the others follow in a second."""
        total = len(self.plans) * sum(len(self.places(self.samples, length)) for length in self.lengths)
        yield Part(self, "agreement", "agreement measured", total, self._rounds(loaded))

    def _rounds(self, loaded: LoadedModel) -> Iterator[Step[AgreeRow] | Sequence[RowTarget[AgreeRow, Choices]]]:
        for length in self.lengths:
            own = self.places(self.samples, length)
            hashes = {n: of_ids(self.ids(loaded, length, n)[0].tolist()) for n in sorted({0, *own})}
            known = {**self.common(loaded), "length": length, "prompt": str(self.prompt), "prompt_hash": hashes[0]}
            prompts = {number: self._known_of(loaded, length, number, hashes[number]) for number in own}
            known |= {"samples": self.samples, "new_tokens": self.new_tokens, "prompt_file": file_of(self.prompt)}
            dense = self._target(0, known, prompts, None)
            yield [dense]
            yield [self._target(number, known, prompts, dense.samples) for number in range(1, len(self.plans))]

    def _known_of(self, loaded: LoadedModel, length: int, number: int, prompt_hash: str) -> dict[str, Any]:
        """What an item has of its prompt."""
        context = prompt_context(self.prompt, length, loaded, self.seed, number) if self.ask_later else 0
        return {"prompt_hash": prompt_hash, "id": prompt_id(self.prompt, length, loaded, number), "context": context}

    def _target(
        self,
        number: int,
        known: dict[str, Any],
        prompts: Mapping[int, Mapping[str, Any]],
        texts: Mapping[Place, Choices] | None,
    ) -> RowTarget[AgreeRow, Choices]:
        """One method's row; ``prompts`` is what is known of each, ``texts`` dense's samples, None for dense itself."""
        fields: dict[str, Any] = {**known, **self.plans[number].row_fields()}
        row = AgreeRow(**fields, time=now())
        title = f"{self.labels[number]} at {row.length}"
        items = []
        for index, known_of in prompts.items():
            wrote = None if texts is None else texts.get(("", index))
            item = AgreeItem(
                title=f"{title}, sample {index + 1} of {self.samples}",
                index=index,
                obstacle="" if texts is None or wrote is not None else "dense wrote no text to follow",
                plan=number,
                room=row.length + self.new_tokens,
                new=self.new_tokens,
                length=row.length,
                text=None if wrote is None else wrote.chosen,
                **known_of,
            )
            items.append(item)
        file = kept_choices(self.root, row)
        return row_target(
            self,
            title,
            items,
            {"": file},
            rows=[row],
            make=partial(choice_rows, file.name),
            stands=partial(choices_stand, self.root),
            belongs=_belongs,
            more=lambda item: {"id": item.id} if item.id else {},
        )

    def asked(self, loaded: LoadedModel, item: AgreeItem) -> Asked:
        """The prompt, and dense's text to read behind it."""
        ids = self.ids(loaded, item.length, item.index)
        if of_ids(ids[0].tolist()) != item.prompt_hash:
            raise UserError(
                f"--prompt {self.prompt} reads otherwise where it is measured than where the run was started, as the "
                "essays or questions there are others: have the same files on all machines, or use --prompt kv"
            )
        return Asked(ids, self.new_tokens, endless=True, given=item.text, context=item.context)

    def sample(self, loaded: LoadedModel, item: AgreeItem, answer: Answer) -> Choices:
        """What is kept of one text's choices."""
        chosen = tuple(answer.tokens)
        return Choices(
            index=item.index,
            chosen=chosen,
            reference=chosen if item.text is None else item.text,
            prompt_hash=item.prompt_hash,
            **answer.cost,
        )


def choice_rows(file: str, rows: Sequence[AgreeRow], found: Sequence[Choices]) -> list[AgreeRow]:
    """The row of what was chosen, ``file`` being the name that it is to give of the choices."""
    (row,) = rows
    return [
        replace(
            row,
            agreement=statistics.mean(one.agreement for one in found),
            divergence_median=statistics.median(one.divergence for one in found),
            identical=sum(one.divergence == row.new_tokens for one in found) / len(found),
            choices=file,
            **decoded(found),
        )
    ]


def choices_stand(root: Path, have: AgreeRow) -> bool:
    """Whether the choices that a row names make its agreement."""
    return bool(choices_of(root, asdict(have)))


def _belongs(item: AgreeItem, kept: Choices) -> bool:
    """Choices along another text, as of another backend or version of torch, say nothing of this one, nor write one."""
    text = kept.chosen if item.text is None else item.text
    return kept.prompt_hash == item.prompt_hash and kept.reference == text
