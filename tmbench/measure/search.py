"""MInference's offline search on a whole model: which pattern each head of it takes, and a file that says so.

Jiang et al. 2024, arXiv 2407.02490, section 3.2. One prompt is read once, densely; every layer's heads are weighed while it
is being read (see ``tmbench_kernels.minference.search``). The released search writes every winner as a vertical-slash head;
the paper gives each head the pattern that won, and so does this search unless ``remap`` asks for the published habit.

Each layer's figures are appended to ``<file>.partial`` when it is done, so a search that is killed goes on with the layer
that it was at. The file itself is written once, at the end, and the partial one goes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmbench.engine.attention import applied_plan
from tmbench.engine.finite import check_logits, not_finite
from tmbench.engine.prefill import Prefill
from tmbench.errors import NotFiniteError, UserError
from tmbench.methods.table import METHODS, ModelShape, Settings
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results.files import append_line, read_lines, replace_file, writable
from tmbench.results.words import counted
from tmbench.suites.prompts import prompt_ids
from tmbench_kernels import HeadPattern, Pattern, head_patterns_json
from tmbench_kernels.minference.search import CANDIDATES, FIRST_ROW, best_pattern, kept_attention, published_remapping
from tmbench_kernels.pattern import default_scale

OPTION = "--output"
"""What names the file that is written."""
Advance = Callable[[str, float], None]
"""Told what is being done, and how many layers' worth of it are done since the last call."""


@dataclass(frozen=True)
class SearchJob:
    """What one ``tmbench patterns search`` does."""

    loaded: LoadedModel
    output: Path
    length: int
    prompt: str = "kv"
    seed: int = 42
    remap: bool = False
    """Whether streaming and block-sparse winners are written as vertical-slash heads, as the published files have them."""
    overwrite: bool = False

    @property
    def partial(self) -> Path:
        """Where finished layers are kept while the search runs."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def shape(self) -> ModelShape:
        return self.loaded.shape

    def identity(self) -> dict[str, Any]:
        """What the figures of a layer depend on: a search goes on only from those of the same."""
        return {
            **self.loaded.row_fields(),
            "layers": self.shape.layers,
            "heads": self.shape.heads,
            "length": self.length,
            "prompt": self.prompt,
            "seed": self.seed,
            "prompt_hash": of_ids(prompt_ids(self.prompt, self.length, self.loaded, self.seed)[0].tolist()),
            "first_row": FIRST_ROW,
            "candidates": [[entry.type, entry.vertical, entry.slash] for entry in CANDIDATES],
        }

    def check(self) -> None:
        """Raise UserError for a length that leaves nothing to weigh, and for a file that is there already."""
        if self.length <= FIRST_ROW:
            raise UserError(
                f"--length {self.length} leaves nothing to search: only queries from {FIRST_ROW} on count, so give more"
            )
        check_output(self.output, overwrite=self.overwrite)

    def finished(self) -> bool:
        """Whether an earlier run has measured all layers and only the file is to be written; raises as ``run`` does."""
        return self.partial.exists() and len(_read_partial(self)) == self.shape.layers


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise UserError for a file that is there already, unless it may be replaced, and for a path that cannot be one."""
    with writable(path, OPTION):
        try:
            path.stat()
        except FileNotFoundError:
            return
    if not overwrite:
        raise UserError(f"--output {path} is there already: name another file, or add --overwrite to search again")


def run(job: SearchJob, advance: Advance = lambda text, layers: None) -> list[list[HeadPattern]]:
    """Search, or go on searching, and write the file: for each layer the pattern of each head.

    Raises UserError for what ``SearchJob.check`` refuses, a partial file of another search, a folder that cannot be
    written to, in all of which what was measured before stays, and a model whose logits or attention are not finite.
    """
    job.check()
    if job.overwrite:
        with writable(job.partial, OPTION):
            job.partial.unlink(missing_ok=True)
    kept = _read_partial(job)
    advance(f"{counted(len(kept), 'layer')} measured before" if kept else "reading the prompt", float(len(kept)))
    if len(kept) < job.shape.layers:
        _measure(job, kept, advance)
    found = [[best_pattern(head) for head in kept[layer]] for layer in range(job.shape.layers)]
    if job.remap:
        found = [[published_remapping(head) for head in layer] for layer in found]
    with writable(job.output, OPTION):
        replace_file(job.output, head_patterns_json(found))
        job.partial.unlink(missing_ok=True)
    return found


def _measure(job: SearchJob, kept: dict[int, list[list[float]]], advance: Advance) -> None:
    """Read the prompt; weigh the heads of every layer that is not among ``kept``, and put them there."""
    model = job.loaded.model
    plan = METHODS["dense"].plan(job.shape, Settings())
    ids = prompt_ids(job.prompt, job.length, job.loaded, job.seed)
    if not kept:
        _append(job, {"search": job.identity()})

    def look(layer: int, pattern: Pattern, q: Tensor, k: Tensor, scale: float | None) -> None:
        if layer in kept:
            return
        kv_heads = k.shape[1]
        text = f"layer {layer + 1} of {job.shape.layers}"
        advance(text, 0.0)
        groups = q[0].unflatten(0, (kv_heads, -1))  # type: ignore[no-untyped-call]
        figures: list[list[float]] = []
        for keys, queries in zip(k[0], groups, strict=True):
            figures += kept_attention(
                queries,
                keys,
                scale=default_scale(q, scale),
                advance=lambda part: advance(text, part / kv_heads),
            ).tolist()
        if not all(math.isfinite(figure) for head in figures for figure in head):
            raise not_finite(f"the attention weights of layer {layer}", model)
        _append(job, {"layer": layer, "kept": figures})
        kept[layer] = figures

    try:
        with torch.inference_mode(), applied_plan(model, plan) as session:
            session.observer = look
            logits = Prefill(model)(ids)
            session.check_complete()
        check_logits(logits, model, "of the prompt's last token")
    except NotFiniteError as error:
        # What was kept was measured in a type that does not do for this model: nothing can go on from it.
        with writable(job.partial, OPTION):
            job.partial.unlink(missing_ok=True)
        raise UserError(f"{job.loaded.name} cannot be searched: {error}") from error


def _append(job: SearchJob, entry: dict[str, Any]) -> None:
    append_line(job.partial, json.dumps(entry), OPTION)


def _read_partial(job: SearchJob) -> dict[int, list[list[float]]]:
    """The layers that an earlier run of this search has finished; raises UserError for another's file."""
    remedy = "add --overwrite to begin anew, or name another --output"
    before: dict[str, Any] = {}
    kept: dict[int, list[list[float]]] = {}

    def take(entry: Any) -> None:
        if not before:
            before.update(entry["search"])
            return
        figures = [[float(figure) for figure in head] for head in entry["kept"]]
        if [len(head) for head in figures] != [len(CANDIDATES)] * job.shape.heads:
            raise ValueError("a layer of another shape")
        kept[int(entry["layer"])] = figures

    if not read_lines(job.partial, take, "of a search that was interrupted", remedy):
        return {}
    wanted = job.identity()
    differing = [name for name, value in wanted.items() if before.get(name) != value]
    if differing:
        name = differing[0]
        found = before.get(name, "not recorded")
        raise UserError(f"{job.partial} is of a search with another {name} ({found}, not {wanted[name]}): {remedy}")
    return kept
