"""The rows of ``tmbench tune``: one for each trial of a set of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tmbench.results.rows import Row

SEARCH, CHECK, COMPARISON, HELD_OUT = "search", "check", "comparison", "held-out"
STAGES = (SEARCH, CHECK, COMPARISON, HELD_OUT)


@dataclass(frozen=True, kw_only=True)
class TuneRow(Row):
    """How one set of layers did against dense attention on the same prompts: see ``tmbench.measure.tune``.

    The layers are those of ``parameters``. Losses are of the answers, in nats per token.
    """

    kind: ClassVar[str] = "tune"
    extra_key: ClassVar[tuple[str, ...]] = ("tuning", "stage", "task", "lengths", "wording_hash")

    tuning: str
    """A hash of all that decides how one run goes: what its rows have in common."""
    stage: str
    """"search", where trials may err; "check", on prompts that the search did not see; "comparison" with other choices, on
    prompts that neither read; "held-out", on tasks or lengths that neither saw."""
    trial: int
    """From 1 within its stage."""
    rule: str
    """What the set is, in words."""
    model_layers: int
    """How many layers the model has."""
    order: str
    """Where the order of the layers comes from, in words."""
    task: str
    """What the prompts ask; several tasks are joined by "+"."""
    lengths: str
    """Tokens of the prompts with their answers at most; several are joined by "+", and ``length`` is the largest."""
    wording_hash: str
    source: str = ""
    """What the prompts are made of."""
    margin: float
    """The mean difference that is still taken for none."""
    cap: float
    """A prompt's difference counts for no more than this, on either side of zero."""
    confidence: float
    samples: int
    """How many prompts were read."""
    verdict: str = ""
    """Whether the mean of the capped differences is below the margin: "accepted", "refused" or "undecided"."""
    chosen: bool = False
    """Whether it is the set that the run chose: one that the check accepted."""
    nll_answer: float | None = None
    """The mean over prompts."""
    nll_answer_dense: float | None = None
    """Dense attention's, over the same prompts."""
    nll_answer_vs_dense: float | None = None
    """The mean difference."""
    capped_vs_dense: float | None = None
    """The mean of the capped differences."""
    capped_low_vs_dense: float | None = None
    """The ends of its interval, which holds at whatever number of prompts a trial ended."""
    capped_high_vs_dense: float | None = None
    capped_share: float | None = None
    """The part of the prompts, 0 to 1, whose difference is the cap or more."""
    time_vs_dense: float | None = None
    """How much longer a prefill takes than dense attention's, as a part of it: below zero for one that saves time."""
    time_from: str = ""
    """What says so: "roofline", or "ttft rows"."""
    prefills: int = 0
    """Prompts that search and check had read until then, dense attention's among them."""
    measured_s: float = 0.0
    """The seconds that these took, of all workers together."""

    @property
    def stretches(self) -> tuple[int, ...]:
        """The lengths as numbers."""
        return tuple(int(text) for text in self.lengths.split("+"))
