"""A probe: how much each layer's sections matter, the layers that it proposes, and what these lose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tmbench.methods.layers import layers_text
from tmbench.methods.table import LAYERS
from tmbench.report.comparable import Placed
from tmbench.report.loss import IN_NATS, LOSS_COLUMNS, LossCell, LossSection
from tmbench.report.section import Cell, Section
from tmbench.report.settings import ProbeSetting, machine_words, older_words, prefill_words
from tmbench.report.table import Table, columns
from tmbench.report.words import figure_text
from tmbench.results.parameters_text import Value
from tmbench.results.rows import ProbeRow
from tmbench.results.variants import pattern_settings
from tmbench.results.words import counted, length_name

Derivative = Literal["logits", "probabilities"]
DERIVATIVES: dict[Derivative, str] = {"logits": "|dz/ds|", "probabilities": "|dz/dp|"}
"""What a proposal goes by: the derivatives by the attention logits, and by the attention probabilities."""


@dataclass(frozen=True)
class SectionGradients:
    """Mean gradients over the pairs of each section; None for a section without pairs."""

    streaming: float | None
    middle: float | None
    last: float | None


@dataclass(frozen=True)
class ProbeCell(Cell[ProbeRow]):
    """One layer, or one of its heads."""

    @property
    def figure(self) -> float | None:
        return self.row.middle_logits

    def gradients(self, derivative: Derivative) -> SectionGradients:
        """The absolute gradients by a derivative."""
        row = self.row
        if derivative == "logits":
            return SectionGradients(row.streaming_logits, row.middle_logits, row.last_logits)
        return SectionGradients(row.streaming_probabilities, row.middle_probabilities, row.last_probabilities)


@dataclass(frozen=True)
class ProbeSection(Section[ProbeSetting, ProbeCell]):
    """One probe of one model."""

    losses: Sequence[LossCell] = ()
    """Those of dense, and of methods that take the proposed layers, on the same device and model."""

    @property
    def title(self) -> str:
        about, first = self.setting, self.cells[0].row
        asked = f"{about.task} at {length_name(about.length)}, {counted(first.samples, 'sample')}, {about.parameters}"
        machine = f"{prefill_words(about.prefill)}{machine_words(about.threads)}seed {about.seed}"
        return f"Gradients by layer: {about.subject}, {asked}, {machine}{older_words('data', about.older_data)}"

    @cached_property
    def layers(self) -> dict[int, ProbeCell]:
        """The means over each layer's heads, by layer."""
        found = {cell.row.layer: cell for cell in self.measured() if cell.row.head is None}
        return {layer: found[layer] for layer in sorted(layer for layer in found if layer is not None)}

    @property
    def proposal(self) -> str:
        """What decided on the proposed layers: the rule, the budget and the derivative."""
        return next((cell.row.proposal for cell in self.layers.values() if cell.row.proposal), "")

    @property
    def derivative(self) -> Derivative:
        """The one that the proposal goes by."""
        return derivative_of(self.proposal)

    @property
    def proposed(self) -> tuple[int, ...]:
        """The layers proposed for triangle attention."""
        return tuple(layer for layer, cell in self.layers.items() if cell.row.triangle)

    def tables(self) -> list[Table]:
        """The sections' gradients layer by layer, the proposal, and the losses of methods that take it."""
        return [self._gradients(), self._proposal(), self._losses()]

    def _gradients(self) -> Table:
        name = DERIVATIVES[self.derivative]
        middles = {layer: cell.gradients(self.derivative).middle or 0.0 for layer, cell in self.layers.items()}
        whole = sum(middles.values())
        lines = []
        for layer, cell in self.layers.items():
            found = cell.gradients(self.derivative)
            lines.append(
                [
                    str(layer),
                    *(figure_text(value, ".2e") for value in (found.streaming, found.middle, found.last)),
                    figure_text(middles[layer] / whole if whole else None, ".1%"),
                    "yes" if cell.row.triangle else "no",
                ]
            )
        return Table(
            f"Mean {name} of the true next token's logit by section, over pairs, heads and samples, and each layer's share "
            "of the middle's sum:",
            columns("layer", "streaming", "middle", "last", "share of the middle", "proposed"),
            lines,
        )

    def _proposal(self) -> Table:
        first = next(iter(self.layers.values()), None)
        lines = []
        if first is not None and self.proposal:
            shares = (first.row.lost_share, first.row.pairs_share)
            # Behind the last one that was probed a model may have others, which stay its own: "16-" leaves them out.
            chosen = layers_text(self.proposed, max(self.layers) + 1)
            lines = [[chosen, self.proposal, *(figure_text(share, ".1%") for share in shares)]]
        names = ("layers", "decided by", "middle's gradient lost", "pairs computed")
        return Table("The layers proposed for triangle attention:", columns(*names, texts=("layers", "decided by")), lines)

    def _losses(self) -> Table:
        lines = [
            [cell.row.task, length_name(cell.row.length), cell.label, *cell.texts, str(cell.row.samples)]
            for cell in self.losses
        ]
        names = ("task", "length", "method", *LOSS_COLUMNS, "samples")
        caption = f"What the proposed layers lose: mean negative log-likelihoods {IN_NATS}:"
        return Table(caption, columns(*names, texts=("task", "method")), lines)

    def notes(self) -> list[str]:
        notes = {
            f"The weights are {self.setting.weights}: gradients and proposals say nothing about a trained model.": (
                self.setting.weights != "checkpoint"
            ),
            "No loss was measured with the proposed layers: `tmbench probe --loss --layers auto` does it.": (
                bool(self.proposed) and not self.losses
            ),
        }
        return [note for note, applies in notes.items() if applies] + super().notes()


def derivative_of(proposal: str) -> Derivative:
    """The derivative that a proposal names last."""
    return "probabilities" if proposal.rpartition(", ")[2] == "probabilities" else "logits"


def probe_section(
    setting: ProbeSetting, placed: Sequence[Placed[ProbeRow]], losses: Iterable[LossSection] = ()
) -> ProbeSection:
    """The section of one probe's rows; of all losses those of the same model with the proposed layers count."""
    section = ProbeSection(setting, [ProbeCell(one.row, one.label) for one in placed])
    last = max(section.layers, default=0)
    sections = [own for own in losses if own.setting.base == setting.base and own.setting.threads == setting.threads]
    parameters = pattern_settings(placed[0].row).items()
    found = []
    for own in sections:
        taken = [cell for cell in own.measured() if _takes(cell, section.proposed, last, parameters)]
        places = {(cell.row.task, cell.row.length) for cell in taken}
        dense = [cell for cell in own.measured("dense") if (cell.row.task, cell.row.length) in places]
        found += [*dense, *taken]
    return ProbeSection(section.setting, section.cells, found)


def _takes(cell: LossCell, layers: Sequence[int], last: int, parameters: Iterable[tuple[str, Value]]) -> bool:
    """Whether a method's deep layers are these, and its triangle is the probe's; ``last`` is the last that was probed."""
    given = pattern_settings(cell.row)
    # As they are named in a model that ends with it, or goes on with layers that stay its own.
    named = [layers_text(layers, last + 1 + behind) for behind in (0, 1)]
    return bool(layers) and set(parameters) <= given.items() and given.get(LAYERS) in named
