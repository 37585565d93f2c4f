"""Scores with the answers that make them beside the rows, for tests of what is read of single samples."""

from __future__ import annotations

import json

import made_rows
from report_rows import COMMON, OWN, RULER
from tmbench.results.rows import RulerRow
from tmbench.results.tables import append


def add_answers(root, method, task, scores, answers=None, *, length=4096, more=None, **changes):
    """A row with its predictions: scores and texts of samples in their order; ``more`` is what each line has beside."""
    told = "".join(str(changes.get(column, "")) for column in ("n_local", "chunk", "ask_later"))
    name = f"predictions/{method}/{task}-{length}-{told}.jsonl"
    about = COMMON | RULER | OWN.get(method, {}) | {"method": method, "task": task, "length": length}
    about |= {"samples": len(scores), "score": round(100 * sum(scores) / len(scores), 2), "predictions": name} | changes
    path = root / about["device"] / "ruler" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for index, score in enumerate(scores):
            text = f"{method} says {score}" if answers is None else answers[index]
            line = {"index": index, "prediction": text, "outputs": [f"{task} {index}"], "score": score, "seconds": 0.1}
            line |= {"prompt_tokens": length - 100, "new_tokens": 5, **({} if more is None else more[index])}
            file.write(json.dumps(line) + "\n")
    append(root, RulerRow(**made_rows.columns(about)))
