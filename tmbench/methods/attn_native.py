"""``--attn-native``: dense attention by the function that transformers loaded the model with, as one more baseline.

It is no method of the table: nobody should take its row for that of dense attention as tmbench computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tmbench.methods.table import ATTN_NATIVE, Method, Part
from tmbench_kernels import Dense


@dataclass(frozen=True)
class AttnNative(Dense):
    """The pairs of dense attention, which the model's own function computes: see ``tmbench.engine.own_attention``."""

    name: ClassVar[str] = ATTN_NATIVE


BASELINE = Method(
    ATTN_NATIVE,
    "dense attention by transformers' own backend, as the model loads",
    (),
    Part(AttnNative, fixed={"dense_backend": ""}),
)
