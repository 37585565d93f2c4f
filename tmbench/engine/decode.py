"""Greedy decoding: a prompt is read once, through the patterns that are applied, then token after token over the full cache.

It is a loop of our own because transformers' ``generate`` takes whatever a call leaves open from the checkpoint's generation
config. A repetition penalty in there changes what greedy decoding writes, and ``use_cache: false`` reads the whole text once
more, through the patterns, for every token. Here only the end and padding tokens are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tmbench.engine.calls import cache_name, padded_call, rope_switch
from tmbench.engine.finite import check_logits
from tmbench.engine.left_padding import offsets
from tmbench.engine.prefill import Prefill
from tmbench.engine.prefix import Prefix
from tmbench.errors import UnsupportedModelError, UserError
from tmbench.methods.layer_kinds import FULL, layer_kinds
from tmbench.models.attention_modules import PLACE

Stop = Callable[[Sequence[int]], bool]
"""Whether a text ends with the last of these new tokens, whatever the model would write behind it."""


class Decoding:
    """A prompt that a model has read, and the tokens that followed it so far. Use it inside of ``torch.inference_mode``.

    Raises NotFiniteError where logits are not finite, and UnsupportedModelError for a model that returns no cache.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, logits: Tensor, cache: Any, mask: Tensor | None = None) -> None:
        """Go on after a prefill.

        Args:
            ids: the prompt, ``[batch, length]``, on the model's device.
            logits: ``[batch, vocabulary]`` of its last token, as ``Prefill`` returns them.
            cache: what the prefill left there.
            mask: of the prompt, 0 for padding in front of a text; None where there is none.
        """
        self.model = model
        self.prompt = ids
        self.mask = mask
        self.length = ids.shape[1]
        """Tokens read so far, prompt and padding included."""
        self.cache = cache
        # Not every cache of transformers says so of a layer that holds no keys.
        if self.cache is None or int(self.cache.get_seq_length(_first_full(model))) != self.length:
            raise UnsupportedModelError(
                f"{type(model).__name__} returns no cache of the prompt's keys and values: nothing can be decoded after it"
            )
        self.logits = self._checked(logits, "of the prompt's last token")
        """Of the next token, float32 ``[batch, vocabulary]``."""

    def read(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Read one more token of each sequence, densely over the full cache; returns the new ``logits``."""
        longest = self.length if self.mask is None else int(self.mask.sum(1).max())
        if longest == rope_switch(self.model):
            raise RuntimeError(
                f"{type(self.model).__name__} changes its rotary embeddings behind token {longest}, so keys in the "
                f"cache would no longer fit: use a --length that stays below {longest}, answer included, or begins above"
            )
        following = torch.as_tensor(tokens, device=self.prompt.device, dtype=self.prompt.dtype).reshape(-1, 1)
        known = {cache_name(self.model): self.cache}
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            known |= padded_call(self.model, self.mask, 1)
        output = self.model(input_ids=following, use_cache=True, return_dict=True, **known)
        self.length += 1
        self.logits = self._checked(output.logits[:, -1], f"of new token {self.length - self.prompt.shape[1] + 1}")
        return self.logits

    def _checked(self, logits: Tensor, place: str) -> Tensor:
        check_logits(logits, self.model, place)
        return logits.float()


@torch.inference_mode()
def read_prefix(model: PreTrainedModel, inputs: Any) -> Prefix:
    """Read what several prompts begin with, within ``tmbench.applied``, for ``generate`` to go on from.

    Args:
        model: a decoder-only model whose layers keep the keys of all tokens.
        inputs: token ids of one text, or what a tokenizer returns of one.

    Raises:
        UserError: inputs that are none of this, and no method at work.
        UnsupportedModelError: a model whose prefixes cannot be kept, and as ``tmbench.applied``.
    """
    ids, mask = _ids(inputs)
    if ids.shape[0] > 1 or mask is not None:
        raise UserError(f"a prefix is one text without padding, not {ids.shape[0]} rows: give what all prompts begin with")
    return _at_work(model).keep(ids.to(model.device))


def _at_work(model: PreTrainedModel) -> Prefill:
    """A prefill of the method that is applied to a model."""
    found = next((slot for module in model.modules() if (slot := getattr(module, PLACE, None)) is not None), None)
    if found is None:
        raise UserError('a prefix is read by a method: use a block of tmbench.applied, which "dense" is good for too')
    return Prefill(model, found.session)


@torch.inference_mode()
def generate(model: PreTrainedModel, inputs: Any, max_new_tokens: int, prefix: Prefix | None = None) -> Tensor:
    """Greedy decoding, within ``tmbench.applied`` or without: the new tokens alone, ``[batch, new]``, on the model's device

    The prompt is read by the method, once; decoding is dense over the full cache. Of the checkpoint's generation config only
    the end tokens, at which a sequence stops, and the padding token behind them are used.

    Args:
        model: a decoder-only model.
        inputs: token ids, ``[batch, length]`` or one sequence; or what a tokenizer returns, of texts of different lengths
            with padding in front of them and an ``attention_mask``.
        max_new_tokens: the most tokens to write, 1 or more.
        prefix: what ``read_prefix`` has read of all of these prompts, under the method that is applied; ``inputs`` are then
            what follows it.

    Raises:
        UserError: inputs that are none of this, no token to write, or a prefix of another model or method.
        UnsupportedModelError: padding behind or within a text, or under a method that takes none; a model that cannot
            generate, and as ``tmbench.applied``.
        NotFiniteError: logits that are not finite.
    """
    # With a fraction of a token decoding would never end.
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be a whole number, 1 or more, not {max_new_tokens!r}")
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} has no head that yields tokens: load it as a causal language model"
        )
    ids, mask = _ids(inputs)
    ids, mask = ids.to(model.device), None if mask is None else mask.to(model.device)
    if prefix is not None:
        prefill = _at_work(model)
        logits = prefill.after(prefix, ids, mask)
        whole, seen = prefix.before(ids, mask)
        return greedy(Decoding(model, whole, logits, prefill.cache, seen), max_new_tokens)
    prefill = Prefill(model)
    return greedy(Decoding(model, ids, prefill(ids, mask=mask), prefill.cache, mask), max_new_tokens)


def greedy(decoding: Decoding, max_new_tokens: int, stop: Stop | None = None) -> Tensor:
    """The likeliest tokens after a prompt, ``[batch, new]``: until every sequence has ended, at most so many.

    One sequence alone may be given a ``stop``.
    """
    model, logits = decoding.model, decoding.logits
    ends = torch.tensor(end_tokens(model), device=logits.device, dtype=torch.long)
    pad = _pad_token(model)
    running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    new: list[Tensor] = []
    while True:
        new.append(torch.where(running, logits.argmax(-1), pad))
        running &= ~torch.isin(new[-1], ends)
        if len(new) == max_new_tokens or not bool(running.any()) or (stop is not None and stop(torch.cat(new).tolist())):
            return torch.stack(new, 1)
        logits = decoding.read(new[-1])


def follow(decoding: Decoding, count: int, given: Sequence[int] | None = None) -> list[int]:
    """The likeliest token, the model's end tokens aside, at each of ``count`` places behind one prompt.

    ``given`` are ``count`` tokens that are read behind the prompt; None reads the choices themselves.
    """
    ends = end_tokens(decoding.model)
    chosen: list[int] = []
    while True:
        logits = decoding.logits[0]
        logits[ends] = -torch.inf
        chosen.append(int(logits.argmax()))
        if len(chosen) == count:
            return chosen
        decoding.read(chosen[-1:] if given is None else [given[len(chosen) - 1]])


def _first_full(model: PreTrainedModel) -> int:
    """The first layer of full attention, whose cache holds every token; 0 for a model that has none."""
    kinds = layer_kinds(model.config)
    return kinds.index(FULL) if FULL in kinds else 0


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The ids at which the checkpoint says that a text ends; ids outside of the vocabulary, such as -1, stand for none."""
    ends = model.generation_config.eos_token_id
    vocabulary = model.config.get_text_config().vocab_size
    listed = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
    return [int(token) for token in listed if 0 <= token < vocabulary]


def _pad_token(model: PreTrainedModel) -> int:
    pad = model.generation_config.pad_token_id
    fits = pad is not None and 0 <= pad < model.config.get_text_config().vocab_size
    return int(pad) if fits else next(iter(end_tokens(model)), 0)


def _ids(inputs: Any) -> tuple[Tensor, Tensor | None]:
    """Token ids ``[batch, length]``, given as such or as a tokenizer's output, and their mask where a text is padded."""
    given = None
    if isinstance(inputs, Mapping):
        other = [name for name in inputs if name not in ("input_ids", "attention_mask", "token_type_ids")]
        if other or inputs.get("input_ids") is None:
            raise UserError(
                f"generate reads input_ids with their attention_mask, and nothing else: leave out "
                f"{', '.join(other) or 'the rest'}"
            )
        inputs, given = inputs["input_ids"], inputs.get("attention_mask")
    ids = _batch(inputs)
    if given is None:
        return ids, None
    mask = torch.as_tensor(given)
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise UserError(f"generate takes an attention_mask of the ids' shape {tuple(ids.shape)}, not {tuple(mask.shape)}")
    return ids, mask.long() if any(offsets(mask, ids.shape[1])) else None


def _batch(inputs: Any) -> Tensor:
    """``[batch, length]`` of token ids, or of those of one text."""
    try:
        ids = torch.as_tensor(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            "generate takes token ids, all sequences of one length: tokenize first, return_tensors='pt', padding to the left"
        ) from error
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise UserError(
            f"generate takes token ids [batch, length], not {str(ids.dtype).removeprefix('torch.')} {tuple(ids.shape)}"
        )
    return ids
