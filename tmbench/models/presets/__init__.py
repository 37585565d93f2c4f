"""Published model configurations, to be timed with synthetic weights: each file is one, its publisher's config.json.

A preset costs what the real model costs wherever the data does not decide, and nothing is downloaded. Its name is that of
its file, where ``_name_or_path`` is the checkpoint that it is the configuration of. Of a model that fits no single GPU there
may be the first layers alone: ``_published_layers`` then says how many it has. Of one that reads images too it is the text
part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def preset_names() -> tuple[str, ...]:
    """What ``--model`` takes for a preset."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def read_preset(name: str) -> dict[str, Any]:
    """The fields of a preset's config.json."""
    fields: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return fields
