"""Greedy decoding of several texts at once: each is read by itself, then all write a token in every step.

Texts have lengths of their own and end by themselves; one that has ended makes room for the next. On a GPU a step is one
recorded CUDA graph, since at small batches a step takes longer to launch than to run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tmbench.engine.decode import Stop, end_tokens
from tmbench.engine.decode_step import next_logits, prepared
from tmbench.engine.finite import check_logits, not_finite
from tmbench.engine.forwards import forward_of
from tmbench.engine.kv_cache import CacheSlot, KvCache
from tmbench.engine.memory import held, most_held
from tmbench.engine.prefix import Prefix
from tmbench.engine.session import Session
from tmbench.errors import NotFiniteError

STEPPED: Final = "static-cache"
GRAPH: Final = "cuda-graph"
StepKind = Literal["static-cache", "cuda-graph"]
"""How a step runs: launched operation by operation, or as one recorded CUDA graph."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""How many texts a batch may hold: for each such number the decoder layers are compiled once."""
BURST = 8
"""Steps between two looks at which texts have ended."""


@dataclass(eq=False)
class Text:
    """A prompt that is being continued."""

    slot: int
    most: int
    """New tokens, at most."""
    tokens: list[int]
    """The new ones, complete once the text has ended."""
    peak: int | None
    """The most memory that the device held meanwhile, in bytes, model included; None on a CPU."""
    seconds: float = 0.0
    """Its share of the time that steps have taken so far."""
    steps: int = 0
    """How many steps it has been part of."""
    beside: int = 1
    """The most texts that wrote together with it, itself among them."""
    error: NotFiniteError | None = None
    """Why it could not be continued."""
    stop: Stop | None = None
    seen: int = 1
    """How many of its new tokens ``stop`` was asked about."""


@dataclass
class _State:
    """What a step reads and writes on the device, a row for each slot."""

    tokens: Tensor
    """``[slots, 1]``: the last token of each text, to be read next."""
    cache_seqlens: Tensor
    written: Tensor
    most: Tensor
    active: Tensor
    broken: Tensor
    """Whether logits were not finite."""
    new: Tensor
    """``[slots, most_new]``: what was chosen."""
    endless: Tensor
    """Whether end tokens are never chosen, so that every text has all of its tokens."""
    follows: Tensor
    """Whether tokens of ``given`` are read behind the prompt in place of those that were chosen."""
    given: Tensor
    """``[slots, most_new]``."""


class Batch:
    """Texts of one model that decode together. Use it inside of ``torch.inference_mode``."""

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        most_new: int,
        *,
        size: int,
        graph: bool,
        runner: Callable[[int], Callable[..., Any]] = lambda size: forward_of,
    ) -> None:
        """A batch without texts.

        Args:
            capacity: the most tokens of a text, its new ones included.
            most_new: the most new tokens of a text.
            size: the most texts; the batch plans for fewer where memory does not hold so many.
            graph: whether a step is to be recorded as a CUDA graph.
            runner: what runs a decoder layer in steps of so many texts.
        """
        self.model = model
        self.size = size
        self.kind: StepKind = GRAPH if graph else STEPPED
        self.cache = KvCache(1, capacity)
        self.texts: list[Text] = []
        self._runner = runner
        self._most_new = most_new
        self._state = self._new_state(1)
        self._is_end = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool, device=model.device)
        self._is_end[end_tokens(model)] = True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._planned = False

    @property
    def slots(self) -> int:
        """How many texts there is room for now."""
        return self.cache.slots

    @property
    def full(self) -> bool:
        """Whether no other text fits; before a first prompt was read it is not known how many do."""
        return len(self.texts) >= (self.cache.slots if self._planned or self.texts else 1)

    @property
    def free_slot(self) -> CacheSlot:
        """Where the next prompt goes; raises RuntimeError where the batch is full."""
        taken = {text.slot for text in self.texts}
        for number in range(self.slots):
            if number not in taken:
                return CacheSlot(self.cache, number)
        raise RuntimeError(f"all {self.slots} slots are taken")

    def read(
        self,
        session: Session,
        ids: Tensor,
        most: int,
        *,
        endless: bool = False,
        given: Sequence[int] | None = None,
        context: int = 0,
        stop: Stop | None = None,
        prefix: Prefix | None = None,
        over: CacheSlot | None = None,
    ) -> Text:
        """Read a prompt by the session's plan; its text has ended already where one token was enough.

        Args:
            ids: ``[1, length]``.
            most: new tokens, at most; with ``endless`` exactly so many, as none of the model's end tokens is chosen.
            given: so many tokens, which are read behind the prompt in place of those that are chosen.
            context: as ``Session.read_into`` has it.
            stop: where else than at an end token the text ends.
            prefix: what was read before of the prompt, whose other tokens are ``ids``.
            over: a slot that holds the context already: the free one, or one that ``holds`` it.

        Raises:
            ValueError: a text that is too long for the batch.
            NotFiniteError: logits that are not finite. The batch is then as before, as after whatever else reading raises.
        """
        length = ids.shape[1] + (0 if prefix is None else prefix.length)
        if length + most > self.cache.capacity or most > self._most_new:
            raise ValueError(f"{length} and {most} tokens are more than this batch has room for")
        free, before = self.free_slot, self.cache.bytes_per_slot * self.slots
        held_before, slot = held(self.model.device), free.number
        logits = session.read_into(ids, free, context, prefix, over)
        check_logits(logits, self.model, "of the prompt's last token")
        first = int(self._choices(logits, torch.tensor([[endless]], device=logits.device)))
        text = Text(slot, most, [first], session.peak.bytes, stop=stop)
        if most > 1 and not bool(self._is_end[first]) and not (stop is not None and stop([first])):
            self.texts.append(text)
            state = self._state
            state.new[slot, 0] = first
            state.tokens[slot, 0] = first if given is None else given[0]
            state.endless[slot], state.follows[slot] = endless, given is not None
            if given is not None:
                state.given[slot, :most] = torch.tensor(given, device=ids.device)
            state.cache_seqlens[slot] = length
            state.written[slot], state.most[slot] = 1, most
            state.active[slot], state.broken[slot] = True, False
        if not self._planned:
            grown = self.cache.bytes_per_slot * self.slots - before
            self._plan(0 if held_before is None or text.peak is None else text.peak - held_before - grown)
        return text

    def holds(self, slot: CacheSlot) -> bool:
        """Whether a slot will keep what a prompt left there while texts write: that of none is written to in each step."""
        return any(text.slot == slot.number for text in self.texts)

    @property
    def runs_model(self) -> bool:
        """Whether the next step calls the model; a recorded one does not."""
        return self._graph is None

    def ended(self, text: Text) -> bool:
        """Whether a text that was read is complete."""
        return text not in self.texts

    def advance(self) -> list[Text]:
        """Let all texts write until one or more of them have ended; these, which are then no part of the batch.

        Raises whatever a step raises, for instance that memory ran out: the texts can then only be begun again.
        """
        self._record()
        ended: list[Text] = []
        with ExitStack() as stack:
            if self._graph is None:
                stack.enter_context(self._prepared())
            while self.texts and not ended:
                ended = self._burst()
        return ended

    def _run(self) -> None:
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _burst(self) -> list[Text]:
        start = time.perf_counter()
        steps = min(BURST, *(text.most - 1 - text.steps for text in self.texts))
        for _ in range(steps):
            self._run()
        active = self._state.active.tolist()
        share = (time.perf_counter() - start) / len(self.texts)
        peak = most_held(self.model.device)
        for text in self.texts:
            text.seconds += share
            text.steps += steps
            text.beside = max(text.beside, len(self.texts))
            text.peak = peak if text.peak is None or peak is None else max(text.peak, peak)
        ended = [text for text in self.texts if self._stopped(text) or not active[text.slot]]
        self._close(ended)
        return ended

    def _stopped(self, text: Text) -> bool:
        """Whether a text ends by its own ``stop``; what was written behind that place is taken back."""
        if text.stop is None:
            return False
        state, slot = self._state, text.slot
        new = state.new[slot, : int(state.written[slot])].tolist()
        for count in range(text.seen + 1, len(new) + 1):
            if text.stop(new[:count]):
                state.written[slot], state.active[slot], state.broken[slot] = count, False, False
                return True
        text.seen = len(new)
        return False

    def _close(self, ended: Sequence[Text]) -> None:
        if not ended:
            return
        state = self._state
        written, broken, new = state.written.tolist(), state.broken.tolist(), state.new.cpu()
        for text in ended:
            self.texts.remove(text)
            text.tokens = new[text.slot, : written[text.slot]].tolist()
            if broken[text.slot]:
                text.error = not_finite(f"the logits of new token {len(text.tokens) + 1}", self.model)
            # Attention of an empty slot reads no keys.
            state.cache_seqlens[text.slot] = 0

    def drop(self) -> list[Text]:
        """Give up all texts, which can only be begun again; these texts."""
        dropped, self.texts = self.texts, []
        self._state.active.zero_()
        self._state.cache_seqlens.zero_()
        return dropped

    def resize(self, slots: int) -> None:
        """Have room for so many texts from now on; raises ValueError where a text would lose its slot."""
        if any(text.slot >= slots for text in self.texts):
            raise ValueError("a text is at work in a slot that would go")
        self._graph = None
        before, self._state = self._state, self._new_state(slots)
        kept = min(slots, self.slots)
        self.cache.resize(slots)
        for name, old in vars(before).items():
            getattr(self._state, name)[:kept] = old[:kept]
        self._planned = True

    def _plan(self, prompt_bytes: int) -> None:
        """Make room for as many texts as memory holds beside what reading a prompt takes, model and cache aside."""
        slots, device = self.size, self.model.device
        if device.type == "cuda" and self.cache.bytes_per_slot:
            free, total = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            # Memory comes in pieces, and a recorded step keeps its own.
            spare = free - max(prompt_bytes, 0) - 0.06 * total
            slots = min(slots, 1 + max(0, int(spare // self.cache.bytes_per_slot)))
        slots = max(size for size in SIZES if size <= slots)
        if slots != self.slots:
            self.resize(slots)
        self._planned = True

    def _new_state(self, slots: int) -> _State:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=self.model.device)

        return _State(
            tokens=zeros(1, dtype=torch.long),
            cache_seqlens=zeros(dtype=torch.int32),
            written=zeros(dtype=torch.long),
            most=zeros(dtype=torch.long),
            active=zeros(dtype=torch.bool),
            broken=zeros(dtype=torch.bool),
            new=zeros(self._most_new, dtype=torch.long),
            endless=zeros(dtype=torch.bool),
            follows=zeros(dtype=torch.bool),
            given=zeros(self._most_new, dtype=torch.long),
        )

    def _choices(self, logits: Tensor, endless: Tensor) -> Tensor:
        """The likeliest tokens ``[texts]`` of logits ``[texts, vocabulary]``; ``endless`` is ``[texts, 1]``."""
        return logits.float().masked_fill(endless & self._is_end, -torch.inf).argmax(-1)

    def _prepared(self) -> Any:
        return prepared(self.model, self.cache, self._state.cache_seqlens, self._runner(self.slots))

    def _step(self) -> None:
        """One token of every text, chosen and counted on the device."""
        state = self._state
        logits = next_logits(self.model, state.tokens, state.cache_seqlens)
        state.cache_seqlens += state.active
        finite = torch.isfinite(logits.amax(-1))
        state.broken |= state.active & ~finite
        state.active &= finite
        token = self._choices(logits, state.endless[:, None])[:, None]
        place, active = state.written.clamp(max=self._most_new - 1)[:, None], state.active[:, None]
        state.new.scatter_(1, place, torch.where(active, token, state.new.gather(1, place)))
        following = torch.where(state.follows[:, None], state.given.gather(1, place), token)
        state.tokens.copy_(torch.where(active, following, state.tokens))
        state.written += state.active
        state.active &= ~self._is_end[token[:, 0]] & (state.written < state.most)

    def _record(self) -> None:
        """Record a step, unless it is recorded, or is not to be."""
        if self.kind != GRAPH or self._graph is not None:
            return
        active = self._state.active.clone()
        # Nothing is counted of what is tried first.
        self._state.active.zero_()
        with self._prepared():
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    self._step()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
        self._graph = graph
        self._state.active.copy_(active)
