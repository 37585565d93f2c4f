"""Skip-softmax's threshold for a model: how light the tiles of its attention are, on prompts of several lengths.

Yuan et al. 2025, arXiv 2512.12087, whose threshold falls with the number of keys. The form of the fit is that of NVIDIA's
Model Optimizer: see ``tmbench_kernels.skip_softmax.calibration``. Prompts are read densely. Every tile of every layer of
full attention has a margin by which a threshold spares it or not, so one reading says what any threshold would have skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tmbench.engine.finite import check_logits, not_finite
from tmbench.engine.prefill import PLAIN
from tmbench.engine.session import running
from tmbench.errors import NotFiniteError, UserError
from tmbench.measure.executor import Worker
from tmbench.measure.keeping import Target
from tmbench.measure.partial import Partial, check_output
from tmbench.measure.spec import Item, ItemSpec, Part
from tmbench.methods.table import METHODS
from tmbench.models import parallel
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results.rows import OUT_OF_MEMORY
from tmbench.suites.prompts import check_prompt, prompt_ids
from tmbench_kernels import Pattern, SkipSoftmax
from tmbench_kernels.pattern import default_scale
from tmbench_kernels.skip_softmax.calibration import calibration_json, fit

LOWEST, STEPS = -32, 16
"""Margins are counted from so many logits below the maximum on, in so many steps to a logit."""
BINS = -LOWEST * STEPS
TARGETS = tuple(n / 10 for n in range(1, 10))
"""The shares of skipped tiles that a fit is made of, as far as a threshold of at most 1 reaches them."""
SHOWN = (0.3, 0.5, 0.7)
"""Those by which a fit is shown."""


@dataclass(frozen=True)
class Margins:
    """One prompt's sample: how many tiles there are of each margin."""

    index: int
    counts: tuple[int, ...]
    """Those below ``LOWEST``, of each step up to 0, and of 0 and more, which no threshold skips."""


@dataclass(frozen=True, kw_only=True)
class MarginsItem(Item):
    """One prompt."""

    length: int
    prompt: str
    number: int
    """Which of its kind and length it is."""

    @property
    def work(self) -> float:
        return float(self.length) ** 2


class Calibrated(NamedTuple):
    """What came out: the coefficients, and what the fit skips of the prompts that it was made of."""

    a: float
    b: float
    shares: dict[int, dict[float, float]]
    """By length and target the share of tiles that the fit's threshold skips."""


@dataclass(frozen=True, kw_only=True)
class CalibrateSpec(ItemSpec[Calibrated]):
    """What one ``tmbench patterns calibrate`` does."""

    output: Path
    lengths: tuple[int, ...]
    prompts: tuple[str, ...]
    """Kinds of prompts, in turn."""
    samples: int
    """Prompts of each length."""
    order: str
    seed: int = 42

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError for prompts that cannot be made, and for a file that is there already."""
        check_output(self.output, "calibrate", overwrite=self.overwrite)
        for prompt in self.prompts:
            check_prompt(prompt, loaded, self.lengths)

    def parts(self, loaded: LoadedModel) -> Iterator[Part[Calibrated]]:
        target = _Fit(self, loaded)
        yield Part(self, "calibration", "calibration finished", sum(item.work for item in target.items), [[target]])

    def measure(self, item: MarginsItem, worker: Worker) -> None:
        """Read the prompt, and count the margins of its tiles.

        Raises UserError for a model whose logits or attention are not finite.
        """
        model, pattern = worker.loaded.model, SkipSoftmax(order=self.order)
        total = torch.zeros(BINS + 2, dtype=torch.long)

        def look(layer: int, _: Pattern, q: Tensor, k: Tensor, scale: float | None) -> None:
            worker.step(f"{item.title}, layer {layer + 1} of {worker.loaded.shape.layers}")
            margins = pattern.margins(q, k, default_scale(q, scale))
            if margins.isnan().any():
                raise not_finite(f"the attention logits of layer {layer}", model)
            total.add_(counted(margins))

        ids = prompt_ids(item.prompt, item.length, worker.loaded, self.seed, item.number)
        # Plainly: of a last layer on its last position it would see one query.
        plan = METHODS["dense"].plan(worker.loaded.shape)
        with torch.inference_mode(), running(model, plan, PLAIN) as session, session.prefill() as prefill:
            session.applied.observer = look
            logits = prefill(ids)
            session.applied.check_complete()
        check_logits(logits, model, "of the prompt's last token")
        worker.keep(Margins(item.index, tuple(parallel.summed(total).tolist())))


def counted(margins: Tensor) -> Tensor:
    """How many tiles there are of each margin, as ``Margins`` has them; tiles of later keys are none."""
    places = ((margins[margins > -torch.inf] - LOWEST) * STEPS).floor().clamp(-1, BINS).long() + 1
    return torch.bincount(places, minlength=BINS + 2).cpu()


def skipped(counts: Sequence[int], least: float) -> float:
    """The share of tiles whose margin lies below ``least``, in logits, at most 0; within a step it is taken as even."""
    place = min(max((least - LOWEST) * STEPS, 0.0), float(BINS))
    whole = math.floor(place)
    part = (place - whole) * counts[whole + 1]
    return (sum(counts[: whole + 1]) + part) / sum(counts)


def margin_of(counts: Sequence[int], share: float) -> float | None:
    """The margin below which such a share of tiles lies; None where it is above 0 or below ``LOWEST``."""
    wanted, before = share * sum(counts), float(counts[0])
    if wanted < before:
        return None
    for number, count in enumerate(counts[1:-1]):
        if before + count >= wanted and count:
            return LOWEST + (number + (wanted - before) / count) / STEPS
        before += count
    return None


def fitted(counts: dict[int, list[int]]) -> Calibrated:
    """The fit to the counts of several lengths; raises UserError where hardly a tile can be skipped."""
    points = [
        (share, math.exp(margin) * length)
        for length, own in counts.items()
        for share in TARGETS
        if (margin := margin_of(own, share)) is not None
    ]
    try:
        a, b = fit([share for share, _ in points], [factor for _, factor in points])
    except ValueError as error:
        raise UserError(
            f"so few tiles lie below the maximum before them that no threshold skips {TARGETS[1]:.0%} of them: give a "
            "longer --length, or the other --order"
        ) from error
    shares = {
        length: {share: skipped(own, min(math.log(a * math.exp(b * share) / length), 0.0)) for share in SHOWN}
        for length, own in counts.items()
    }
    return Calibrated(a, b, shares)


class _Fit(Target[Calibrated, Margins]):
    """The file that is written, once all prompts are read."""

    unit = "prompt"

    def __init__(self, spec: CalibrateSpec, loaded: LoadedModel) -> None:
        self._spec = spec
        self._name = loaded.name
        items = [
            MarginsItem(
                title=f"{prompt} of {length}, number {number + 1}",
                index=place * spec.samples + number,
                length=length,
                prompt=prompt,
                number=number,
            )
            for place, length in enumerate(spec.lengths)
            for number in range(spec.samples)
            for prompt in [spec.prompts[number % len(spec.prompts)]]
        ]
        ids = torch.cat([prompt_ids(one.prompt, one.length, loaded, spec.seed, one.number)[0] for one in items])
        self._about = {
            **loaded.row_fields(),
            "order": spec.order,
            "lengths": list(spec.lengths),
            "samples": spec.samples,
            "prompts": list(spec.prompts),
            "seed": spec.seed,
            "prompt_hash": of_ids(ids.tolist()),
        }
        self._partial: Partial[Margins] = Partial(spec.output, "calibration", self._about, _line, _sample)
        super().__init__("calibration", items, {"": self._partial})

    def finish(self) -> Sequence[Calibrated]:
        """Write the file; raises UserError for a model that cannot be calibrated, RuntimeError where something broke."""
        if self.failure is not None:
            kind, _, reason = self.failure.error.partition(": ")
            if kind != NotFiniteError.__name__ and self.failure.status != OUT_OF_MEMORY:
                raise RuntimeError(self.failure.error)
            raise UserError(f"{self._name} cannot be calibrated: {reason}")
        counts = {length: [0] * (BINS + 2) for length in self._spec.lengths}
        for sample in self.in_order():
            own = counts[self._spec.lengths[sample.index // self._spec.samples]]
            own[:] = [one + more for one, more in zip(own, sample.counts, strict=True)]
        found = fitted(counts)
        shares = {
            str(length): {f"{target:g}": round(share, 4) for target, share in own.items()}
            for length, own in found.shares.items()
        }
        self._partial.finish(calibration_json(found.a, found.b, {**self._about, "skipped": shares}))
        return [found]


def _line(sample: Margins) -> dict[str, Any]:
    return {"prompt": sample.index, "counts": sample.counts}


def _sample(entry: Any) -> tuple[int, Margins]:
    counts = tuple(int(count) for count in entry["counts"])
    if len(counts) != BINS + 2 or min(counts) < 0:
        raise ValueError("counts of other margins")
    return int(entry["prompt"]), Margins(int(entry["prompt"]), counts)
