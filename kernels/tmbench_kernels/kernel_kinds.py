"""Which kind of kernel each backend is, by the name that results have for it. Imports no torch: reports read this.

How fast attention is depends on the kind of kernel as much as on the pattern. A sparse pattern on a slower kind than dense's
is not compared like with like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of kernel."""

    name: str
    place: str
    """Where such a backend runs, in words; "on" and the backend's own name where it is empty."""
    step: int
    """0 for the fastest kinds; kinds of one step are not told apart by how fast they are."""


HOPPER = Kind("hand-written for Hopper", "", 0)
LIBRARY = Kind("library", "", 0)
TRITON = Kind("Triton", "in Triton", 1)
TORCH = Kind("torch", "in torch", 2)
KINDS: Mapping[str, Kind] = {
    "cuda-hopper": HOPPER,
    "flash-attn-4": LIBRARY,
    "flash-attn-3": LIBRARY,
    "cudnn": LIBRARY,
    "flash-attn-2": LIBRARY,
    "triton": TRITON,
    "sdpa": TORCH,
    "torch": TORCH,
    "torch-banded": TORCH,
    "torch-blocks": TORCH,
    "torch-gathered": TORCH,
    "torch-by-kind": TORCH,
}
"""Every backend of this package; those of other packages have no kind, and nothing is said of them."""
