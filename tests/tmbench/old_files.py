"""Result files as tmbench wrote them before its present schema."""

from __future__ import annotations

import csv
from pathlib import Path

from tmbench.results import schema_1
from tmbench.results.values import field_text


def old_columns(row):
    """A row's columns as schema 1 had them, as values."""
    own = dict(row.settings)
    layers = str(own.pop("layers", ""))
    if layers.endswith("-"):
        own["starting_layer"] = int(layers[:-1])
    else:
        own["layers"] = f"{layers}-{layers}" if layers.isdecimal() else layers
    told = {**vars(row), "starting_layer_source": row.layers_source, "schema_version": 1, **own}
    return {name: told.get(name) for name in schema_1.columns(row.kind)}


def write_schema_1(path: Path, *rows, lacking=()):
    """A file of schema 1 with these rows of one kind; ``lacking`` are columns that it was made before."""
    names = [name for name in schema_1.columns(rows[0].kind) if name not in lacking]
    lines = [[field_text(old_columns(row)[name], name) for name in names] for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *lines])
    return path
