"""Which patterns of a row ran on a slower kind of kernel than dense attention: their times are of that kernel too."""

from __future__ import annotations

from tmbench.methods.table import NATIVE
from tmbench_kernels.kernel_kinds import KINDS

COMPARED = "dense"
"""The pattern that the others are held against."""


def slower_than_dense(backends: str, dense: str = "") -> str:
    """What ran on a slower kind of kernel than dense did, such as "triangle ran in Triton, dense on flash-attn-4".

    Layers that stay the model's own do not count: they are no part of a method.

    Args:
        backends: what ran, as rows have it: "dense:flash-attn-4+triangle:triton".
        dense: the same of dense's row beside it; "" takes what ran in the dense layers of the row itself.

    Returns "" where nothing did, and where the kind of either is not known.
    """
    known = [backend for pattern, backend in _ran(dense or backends) if pattern == COMPARED and backend in KINDS]
    if not known:
        return ""
    fastest = min(known, key=lambda backend: KINDS[backend].step)
    slower = [
        f"{pattern} ran {_place(backend)}"
        for pattern, backend in _ran(backends)
        if pattern not in (COMPARED, *NATIVE) and backend in KINDS and KINDS[backend].step > KINDS[fastest].step
    ]
    return f"{', '.join(slower)}, dense {_place(fastest)}" if slower else ""


def _ran(backends: str) -> list[tuple[str, str]]:
    """(pattern, backend) of each part of such a text."""
    parts = (part.partition(":") for part in backends.split("+"))
    return [(pattern, backend) for pattern, _, backend in parts]


def _place(backend: str) -> str:
    return KINDS[backend].place or f"on {backend}"
