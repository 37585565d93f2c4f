"""A model that is ready to measure: its geometry, its lengths, and what rows say of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tmbench.errors import UserError
from tmbench.methods.plan import ModelShape
from tmbench.models.attention_modules import limiting_windows
from tmbench.models.geometry import Geometry, max_positions
from tmbench.models.rope_scaling import obstacle

Weights = Literal["checkpoint", "random", "structured"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to measure, and what a result row says of it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None where weights were drawn and the checkpoint has no tokenizer."""
    weights: Weights
    revision: str
    """The commit of a Hub checkpoint, where transformers knows it."""
    model_hash: str = ""
    """What it was made from: see ``content_hash``."""
    planned_for: torch.device | None = None
    """The device of a run that is only planned: the model then has a geometry and no weights."""
    tensor_parallel_size: int = 1
    """Over how many ranks it is split."""
    context_parallel_size: int = 1
    """Over how many ranks each of its prompts is split, all of which hold the model."""
    rope_scaling: str = ""
    """That of ``--rope-scaling``; "" where rotary embeddings are as the checkpoint has them."""
    remote_code: bool = False
    """Whether code that the checkpoint brings is what runs."""
    quantization: str = ""
    """How the checkpoint holds its weights, and whether they were made ordinary ones; "" where they always were."""
    notes: tuple[str, ...] = ()
    """What was done on the user's behalf, a sentence each."""

    @property
    def device(self) -> torch.device:
        place: torch.device = self.model.device
        return self.planned_for or place

    @property
    def geometry(self) -> Geometry:
        """The shape of its attention."""
        return Geometry.of(self.model)

    @property
    def shape(self) -> ModelShape:
        """What plans are made for: known by the name that rows have, whatever the folder that it was loaded from."""
        return replace(ModelShape.of(self.model), name=self.name, model_hash=self.model_hash)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def row_fields(self) -> dict[str, Any]:
        """The columns that a result row takes from here."""
        named = {"model": self.name, "revision": self.revision, "model_hash": self.model_hash}
        same = ("tensor_parallel_size", "context_parallel_size", "rope_scaling", "remote_code", "quantization")
        return {**named, "weights": self.weights, "dtype": self.dtype, **{name: getattr(self, name) for name in same}}

    @property
    def max_length(self) -> int | None:
        """The most positions the model has, prompt and answer together; None where nothing limits them.

        Weights that were drawn have learnt no positions: with rotary embeddings, which have no table, they read any length.
        """
        text = self.model.config.get_text_config()
        if self.weights != "checkpoint" and getattr(text, "rope_parameters", None):
            return None
        return max_positions(self.model.config)

    def check_length(self, length: int) -> None:
        """Raise UserError for a length past the model's positions, or one at which a layer's own window would matter.

        Also for one that leaves a rank without a token.
        """
        if length < (ranks := self.context_parallel_size):
            raise UserError(
                f"--length {length} has fewer tokens than the {ranks} GPUs that --context-parallel splits prompts over: "
                f"give {ranks} or more, or leave the option out"
            )
        if self.max_length is not None and length > self.max_length:
            scaled = f" under --rope-scaling {self.rope_scaling}" if self.rope_scaling else ""
            others = "a larger factor, or" if scaled else "or" if obstacle(self.model.config) else "--rope-scaling, or"
            raise UserError(
                f"--length {length} is more than the {self.max_length} positions of {self.name}{scaled}: "
                f"give {self.max_length} or less, {others} another --model"
            )
        layer, window = min(limiting_windows(self.model).items(), key=lambda one: one[1], default=(0, None))
        if window is not None and window < length:
            raise UserError(
                f"--length {length} reaches beyond the sliding window of {window} tokens in layer {layer} of {self.name}, "
                f"which no method here can honour: give {window} or less, or another --model"
            )

    @property
    def longest(self) -> int | None:
        """The longest prompt and answer that the methods serve; None where nothing limits them."""
        limits = [limit for limit in (self.max_length, *limiting_windows(self.model).values()) if limit is not None]
        return min(limits, default=None)

    def qkv(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """What one layer's q, k and v of a prompt look like, in shape, type and device; they take no memory.

        Of several ranks those of one, which has a part of the heads.
        """
        shape, ranks = self.geometry, self.tensor_parallel_size * self.context_parallel_size
        one = torch.empty(1, 1, 1, 1, dtype=self.model.dtype, device=self.device)
        q = one.expand(1, shape.heads // ranks, length, shape.qk_head_dim)
        k = one.expand(1, shape.kv_heads // ranks, length, shape.qk_head_dim)
        return q, k, one.expand(1, shape.kv_heads // ranks, length, shape.v_head_dim)

    def need_tokenizer(self, wish: str, remedy: str = "use another --model") -> PreTrainedTokenizerBase:
        """The tokenizer, or a UserError that says what it was wanted for, and what to do."""
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer, which {wish} needs: {remedy}")
        known, vocabulary = self.tokenizer.vocab_size, self.geometry.vocabulary
        if known > vocabulary:
            raise UserError(
                f"the tokenizer of {self.name} has {known} tokens and the model {vocabulary}, so {wish} cannot use it: "
                f"give the model its own, or {remedy}"
            )
        return self.tokenizer
