"""The parameters that several methods share, and those that have been options all along: declared here, used by patterns.

What one method alone has is declared in its pattern. Imports no torch: the command line's help reads this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmbench_kernels.parameters import Parameter

DENSE_BACKENDS = ("flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2", "sdpa", "triton", "torch")
"""The names of what computes dense attention, in order of preference."""


def _read_head_patterns(given: Any) -> Any:
    from tmbench_kernels.minference.head_patterns import HeadPatterns

    return given if isinstance(given, HeadPatterns) else HeadPatterns.read(given)


N_INIT = Parameter(default=8, at_least=0, tokens=True, option=True, help="First keys that all queries see.")
N_LOCAL = Parameter(default=512, at_least=0, tokens=True, option=True, help="Local window, the query included.")
LAST_N = Parameter(default=128, at_least=0, tokens=True, option=True, help="Last queries, which see all keys.")
PATTERNS = Parameter(
    default=None, option=True, read=_read_head_patterns, unset="default", shown_default="1000, 6096 each",
    help="MInference-format JSON of each head's type and budget.",
)  # fmt: skip
DENSE_BACKEND = Parameter(
    default="", option=True, choices=DENSE_BACKENDS,
    shown_default="the first of these that is installed and serves the model",
    help=f"What computes dense attention: {', '.join(DENSE_BACKENDS)}.",
)  # fmt: skip

OPTIONS: Mapping[str, Parameter] = {
    "n_init": N_INIT,
    "n_local": N_LOCAL,
    "last_n": LAST_N,
    "patterns": PATTERNS,
    "dense_backend": DENSE_BACKEND,
}
"""Those that are options of the command line, in the order of its help."""
