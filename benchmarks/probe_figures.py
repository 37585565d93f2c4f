"""Figures within sentences about the embedded model's probes and token agreement."""

from __future__ import annotations

from collections.abc import Mapping

from accuracy_figures import is_of
from accuracy_tables import LAYERS
from sources import INTEL, Block, Sources, only

from tmbench.methods.layers import parse_layers
from tmbench.report.probe import ProbeSection

PROBES: Mapping[str, tuple[str, int]] = {
    "vt-16K": ("vt", 16384),
    "multikey-16K": ("niah_multikey_2", 16384),
    "four-tasks": ("vt+niah_multivalue+niah_multikey_2+cwe", 4096),
}
"""Those of benchmarks/probes, by task and length; ``vt-4K`` is the one of the results."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def _probe(sources: Sources, name: str) -> ProbeSection:
    if name == "vt-4K":
        return only(sources.results.probes, device=INTEL)
    task, length = PROBES[name]
    return only(sources.probes.probes, task=task, length=length)


def _middles(section: ProbeSection) -> dict[int, float]:
    """Each layer's share of the middle's gradient."""
    found = {layer: cell.gradients(section.derivative).middle or 0.0 for layer, cell in section.layers.items()}
    return {layer: middle / sum(found.values()) for layer, middle in found.items()}


def middle(sources: Sources, name: str, layers: str) -> str:
    """The share of the middle's gradient that layers hold, in percent."""
    shares = _middles(_probe(sources, name))
    percent = 100 * sum(shares[layer] for layer in parse_layers(layers, LAYERS))
    return f"{percent:.{0 if percent >= 10 else 1}f} %"


def order(sources: Sources, name: str, count: str) -> str:
    """The layers that matter least to a probe, the least first."""
    shares = _middles(_probe(sources, name))
    return ", ".join(str(layer) for layer in sorted(shares, key=shares.__getitem__)[: int(count)])


def place_of(sources: Sources, name: str, layer: str) -> str:
    """The place of a layer among those that matter most to a probe, in words."""
    shares = _middles(_probe(sources, name))
    return ORDINALS[sorted(shares, key=shares.__getitem__, reverse=True).index(int(layer))]


def proposed(sources: Sources, name: str) -> str:
    """The layers that a probe proposes, in words."""
    *others, last = map(str, _probe(sources, name).proposed)
    return f"{', '.join(others)} and {last}"


def probe_seconds(sources: Sources, name: str) -> str:
    """How long a probe takes for one prompt."""
    return f"{_probe(sources, name).cells[0].row.seconds_per_sample:.0f} s"


def agreement(sources: Sources, who: str, what: str) -> str:
    """Of a method's token agreement with dense: the share, the lower end of its interval, or where decoding parts."""
    section = only(sources.results.agree, device=INTEL)
    (cell,) = (cell for cell in section.measured() if is_of(cell.row, who))
    if what == "parts":
        return f"{cell.row.divergence_median:g}"
    value = {"share": cell.row.agreement, "low": cell.agreement_low}[what]
    assert value is not None
    return f"{value:.{1 if what == 'share' else 0}%}".replace("%", " %")


PROBE_FIGURES: dict[str, Block] = {
    "middle": middle,
    "order": order,
    "place": place_of,
    "proposed": proposed,
    "probe-seconds": probe_seconds,
    "agreement": agreement,
}
