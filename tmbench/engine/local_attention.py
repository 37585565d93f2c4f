"""Attention of windows and chunks over a whole prompt, by the kernels that patterns have: the model's own in other words.

transformers' attention computes all pairs and masks most of them out: at 128K tokens its mask alone takes 16 GiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tmbench.engine.left_padding import by_text
from tmbench.engine.prefill_state import release
from tmbench.methods.layer_kinds import SLIDING
from tmbench.methods.table import NATIVE
from tmbench_kernels import Dense, Pattern, Triangle

if TYPE_CHECKING:
    from tmbench.engine.attention import NativeSlot


@dataclass(frozen=True)
class Local:
    """What the queries of such a layer see: so many tokens up to themselves, or those of their own chunk."""

    kind: str
    span: int

    @property
    def name(self) -> str:
        """What results call it, in front of its backend."""
        return NATIVE[0 if self.kind == SLIDING else 1]

    @property
    def pattern(self) -> Pattern:
        """What computes it: a band, or dense attention of one chunk after another."""
        return Triangle(n_init=0, n_local=self.span, last_n=0) if self.kind == SLIDING else Dense()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, about: dict[str, Any]) -> tuple[Tensor, str]:
        """Attention ``[batch, queries, heads, v_dim]`` and the backend that computed it.

        A window takes a chunk's queries with the keys before it. ``about`` is what ``Pattern.attend`` takes of soft-capped
        logits and sinks. Raises ValueError as it does.
        """
        pattern = self.pattern
        parts = [[q, k, v]]
        if self.kind != SLIDING:
            parts = [[x[:, :, at : at + self.span] for x in (q, k, v)] for at in range(0, q.shape[2], self.span)]
        lse = about["sinks"] is not None
        backend = pattern.backend(*parts[0], softcap=about["softcap"], lse=lse).name
        out = [pattern.attend(*part, scale=scale, **about).transpose(1, 2) for part in parts]
        return (out[0] if len(out) == 1 else torch.cat(out, dim=1)).contiguous(), backend


def attend_locally_cached(slot: NativeSlot, query: Tensor, key: Tensor, value: Tensor, *of_logits: Any) -> Tensor:
    """As ``attend_locally``, where the layer itself caches nothing: of a chunk, with what the cache has of those before."""
    prefill = slot.session.prefill
    _, key, value = prefill.exchanged(slot.layer, query, key, value)
    if prefill.chunk is not None and prefill.cache is not None:
        release(prefill.cache, slot.layer)
    return attend_locally(slot, query, key, value, *of_logits)


def attend_locally(
    slot: NativeSlot,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    *,
    padding: Sequence[int] = (),
) -> Tensor:
    """As ``attention.attend``, for a layer that stays the model's own and has a window or chunks."""

    def attend_texts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, backend = slot.local.attend(q, k, v, scale, {"softcap": softcap, "sinks": sinks})
        slot.session.backends.add(f"{slot.local.name}:{backend}")
        return out

    return by_text(attend_texts, query, key, value, padding)
