"""Attention of windows and chunks over a whole prompt, by the kernels that patterns have: the model's own in other words.

transformers' attention computes all pairs and masks most of them out: at 128K tokens its mask alone takes 16 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tmbench.methods.layer_kinds import SLIDING
from tmbench.methods.table import NATIVE
from tmbench_kernels import Dense, Pattern, Triangle


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

        ``about`` is what ``Pattern.attend`` takes of soft-capped logits and sinks. Raises ValueError as it does.
        """
        pattern, span = self.pattern, q.shape[2] if self.kind == SLIDING else self.span
        parts = [[x[:, :, start : start + span] for x in (q, k, v)] for start in range(0, q.shape[2], span)]
        lse = about["sinks"] is not None
        backend = pattern.backend(*parts[0], softcap=about["softcap"], lse=lse).name
        out = [pattern.attend(*part, scale=scale, **about).transpose(1, 2) for part in parts]
        return (out[0] if len(out) == 1 else torch.cat(out, dim=1)).contiguous(), backend
