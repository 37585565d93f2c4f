"""MInference's offline search on a whole model: which pattern each head of it takes, and a file that says so.

Jiang et al. 2024, arXiv 2407.02490, section 3.2. One prompt is read once, densely; every layer's heads are weighed while it
is being read (see ``tmbench_kernels.minference.search``). The released search writes every winner as a vertical-slash head;
the paper gives each head the pattern that won, and so does this search unless ``remap`` asks for the published habit.

Each layer's figures are appended to ``<file>.partial`` when it is done, so a search that is killed goes on with the layer
that it was at. The file itself is written once, at the end, and the partial one goes.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tmbench.engine.finite import check_logits, not_finite
from tmbench.engine.prefill import PLAIN
from tmbench.engine.session import running
from tmbench.errors import NotFiniteError, UserError
from tmbench.measure.executor import Worker
from tmbench.measure.keeping import Target
from tmbench.measure.partial import Partial, check_output
from tmbench.measure.spec import Item, ItemSpec, Part, Place
from tmbench.methods.table import METHODS
from tmbench.models.attention_modules import logits_feature
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results.rows import OUT_OF_MEMORY
from tmbench.suites.prompts import check_prompt, prompt_ids
from tmbench_kernels import HeadPattern, Pattern, head_patterns_json
from tmbench_kernels.minference.search import CANDIDATES, FIRST_ROW, best_pattern, kept_attention, published_remapping
from tmbench_kernels.pattern import default_scale


@dataclass(frozen=True)
class LayerFigures:
    """One layer's sample: how much attention each candidate keeps, by head."""

    index: int
    """The layer, from 0."""
    kept: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class SearchItem(Item):
    """The whole search, as one prefill passes all layers; of those that were weighed before it keeps nothing."""

    tells: ClassVar[bool] = True

    layers: tuple[int, ...]
    """Those that are to be weighed."""

    @property
    def work(self) -> float:
        return len(self.layers)

    @property
    def places(self) -> Sequence[Place]:
        return [(self.file, layer) for layer in self.layers]

    def without(self, kept: Container[Place]) -> SearchItem | None:
        left = tuple(layer for layer in self.layers if (self.file, layer) not in kept)
        return replace(self, layers=left) if left else None


@dataclass(frozen=True, kw_only=True)
class SearchSpec(ItemSpec[tuple[HeadPattern, ...]]):
    """What one ``tmbench patterns search`` does; it hands over the pattern of each head, layer by layer.

    Layers that stay the model's own have none.
    """

    output: Path
    length: int
    prompt: str = "kv"
    seed: int = 42
    remap: bool = False
    """Whether streaming and block-sparse winners are written as vertical-slash heads, as the published files have them."""

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError for a length that leaves nothing to weigh, for logits that are weighed otherwise, and for a file
        that is there already."""
        if self.length <= FIRST_ROW:
            raise UserError(
                f"--length {self.length} leaves nothing to search: only queries from {FIRST_ROW} on count, so give more"
            )
        if feature := logits_feature(loaded.model):
            raise UserError(
                f"tmbench patterns search does not weigh {feature}, which {loaded.name} has: use another --model"
            )
        check_output(self.output, "search", overwrite=self.overwrite)
        check_prompt(self.prompt, loaded, [self.length])

    def parts(self, loaded: LoadedModel) -> Iterator[Part[tuple[HeadPattern, ...]]]:
        """One part of one target; the unit of work is a layer."""
        yield Part(self, "search", "search finished", len(loaded.shape.full), [[_HeadPatterns(self, loaded)]])

    def measure(self, item: SearchItem, worker: Worker) -> None:
        """Read the prompt, weigh the heads of the item's layers while it is being read, and hand over each when it is done.

        Raises UserError for a model whose logits or attention are not finite.
        """
        loaded = worker.loaded
        model, layers = loaded.model, loaded.shape.layers
        ids = prompt_ids(self.prompt, self.length, loaded, self.seed)

        def look(layer: int, pattern: Pattern, q: Tensor, k: Tensor, scale: float | None) -> None:
            if layer not in item.layers:
                return
            kv_heads = k.shape[1]
            text = f"layer {layer + 1} of {layers}"
            worker.step(text)
            groups = q[0].unflatten(0, (kv_heads, -1))  # type: ignore[no-untyped-call]
            figures: list[list[float]] = []
            for keys, queries in zip(k[0], groups, strict=True):
                figures += kept_attention(
                    queries,
                    keys,
                    scale=default_scale(q, scale),
                    advance=lambda part: worker.step(text, part / kv_heads),
                ).tolist()
            if not all(math.isfinite(figure) for head in figures for figure in head):
                raise not_finite(f"the attention weights of layer {layer}", model)
            worker.keep(LayerFigures(layer, tuple(map(tuple, figures))))

        plan = METHODS["dense"].plan(loaded.shape)
        # Plainly: of a last layer on its last position it would see one query.
        with torch.inference_mode(), running(model, plan, PLAIN) as session, session.prefill() as prefill:
            session.applied.observer = look
            logits = prefill(ids)
            session.applied.check_complete()
        check_logits(logits, model, "of the prompt's last token")


def _partial(spec: SearchSpec, loaded: LoadedModel) -> Partial[LayerFigures]:
    """Where layers are kept while the search runs."""
    heads = loaded.shape.heads
    ids = prompt_ids(spec.prompt, spec.length, loaded, spec.seed)[0].tolist()
    about = {
        **loaded.row_fields(),
        "layers": loaded.shape.layers,
        "heads": heads,
        "length": spec.length,
        "prompt": spec.prompt,
        "seed": spec.seed,
        "prompt_hash": of_ids(ids),
        "first_row": FIRST_ROW,
        "candidates": [[entry.type, entry.vertical, entry.slash] for entry in CANDIDATES],
    }

    def write(sample: LayerFigures) -> dict[str, Any]:
        return {"layer": sample.index, "kept": sample.kept}

    def read(entry: Any) -> tuple[int, LayerFigures]:
        figures = tuple(tuple(float(figure) for figure in head) for head in entry["kept"])
        if [len(head) for head in figures] != [len(CANDIDATES)] * heads:
            raise ValueError("a layer of another shape")
        return int(entry["layer"]), LayerFigures(int(entry["layer"]), figures)

    return Partial(spec.output, "search", about, write, read)


class _HeadPatterns(Target[tuple[HeadPattern, ...], LayerFigures]):
    """The file that is written: what wins for each head, once all layers are weighed."""

    unit = "layer"

    def __init__(self, spec: SearchSpec, loaded: LoadedModel) -> None:
        self._spec = spec
        self._name = loaded.name
        self._partial = _partial(spec, loaded)
        self._layers = loaded.shape.layers
        every = SearchItem(title="reading the prompt", layers=loaded.shape.full)
        super().__init__("search", [every], {"": self._partial})

    def finish(self) -> Sequence[tuple[HeadPattern, ...]]:
        """Write the file; raises UserError where the model cannot be searched, RuntimeError where the search broke."""
        if self.failure is not None:
            kind, _, reason = self.failure.error.partition(": ")
            if kind == NotFiniteError.__name__:
                # What was kept was measured in a type that does not do for this model: nothing can go on from it.
                self._partial.clear()
            elif self.failure.status != OUT_OF_MEMORY:
                raise RuntimeError(self.failure.error)
            raise UserError(f"{self._name} cannot be searched: {reason}")
        choose = published_remapping if self._spec.remap else lambda head: head
        weighed = {layer.index: tuple(choose(best_pattern(head)) for head in layer.kept) for layer in self.in_order()}
        found = [weighed.get(layer, ()) for layer in range(self._layers)]
        self._partial.finish(head_patterns_json(found))
        return found
