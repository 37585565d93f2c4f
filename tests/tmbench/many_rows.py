"""A results folder of 10,000 rows and 50,000 samples, for tests of what a large one costs.

``python tests/tmbench/many_rows.py FOLDER`` makes one to look at.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import made_rows
from report_rows import COMMON, RULER, TRIANGLE, TTFT
from ruler_tasks import TASKS
from tmbench.results.rows import Row, RulerRow, TtftRow
from tmbench.results.tables import append

MODELS, LENGTHS, WINDOWS, SAMPLES = 5, 5, 30, 6
WORDS = ["the", "answer", "that", "was", "found", "in", "a", "long", "text", "is", "one", "of", "these", "words"]


def make_many(root: Path) -> tuple[int, int]:
    """Make the rows and samples of several models, lengths and variants of one method; how many there are of each."""
    drawn = random.Random(0)
    rows: dict[str, list[Row]] = {}
    written = 0
    for model in range(MODELS):
        for length in (4096 * 2**place for place in range(LENGTHS)):
            for window in range(WINDOWS):
                method = "tri_mix" if window else "dense"
                own = TRIANGLE | {"n_local": 32 * window} if window else {}
                about = COMMON | own | {"method": method, "model": f"a/model-{model}", "length": length}
                seconds = length / 4096 * (1 - window / 60)
                repeats = [seconds * (1 + drawn.random() / 20) for _ in range(3)]
                times = {"ttft_median_s": sorted(repeats)[1], "ttft_min_s": min(repeats), "ttft_max_s": max(repeats)}
                times |= {"samples_s": " ".join(map(str, repeats)), "coverage": 1 - window / 40, "floor_s": seconds / 2}
                rows.setdefault(f"ttft {method}", []).append(TtftRow(**made_rows.columns(about | TTFT | times)))
                for task in TASKS:
                    scores = [float(drawn.random() > window / 90) for _ in range(SAMPLES)]
                    name = f"predictions/{method}/{task}-{length}-{model}-{window}.jsonl"
                    _write(root / COMMON["device"] / "ruler" / name, task, scores, drawn)
                    found = {
                        "task": task,
                        "samples": SAMPLES,
                        "score": round(100 * sum(scores) / SAMPLES, 2),
                        "predictions": name,
                    }
                    rows.setdefault(f"ruler {method}", []).append(RulerRow(**made_rows.columns(about | RULER | found)))
                    written += SAMPLES
    for own_rows in rows.values():
        append(root, *own_rows)
    return sum(map(len, rows.values())), written


def _write(path: Path, task: str, scores: list[float], drawn: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "index": n,
            "prediction": " ".join(drawn.choices(WORDS, k=40)),
            "outputs": [f"{task} {n}"],
            "score": score,
            "seconds": 1,
        }
        for n, score in enumerate(scores)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    print(make_many(Path(sys.argv[1])))
