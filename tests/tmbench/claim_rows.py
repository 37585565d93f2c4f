"""Rows of a model under the name of SmolLM2, as its runs leave them, for what is rendered from such rows."""

from __future__ import annotations

import json

import made_rows
from tmbench.results.rows import LossRow, ProbeRow, RulerRow
from tmbench.results.tables import append

COMMON = made_rows.COMMON | {"model": "smollm2", "length": 4096}
ASKED = COMMON | {"task": "vt", "samples": 3, "wording_hash": "f00d", "source": "noise"}
RULER = {"wording": "own", "wording_hash": "f00d", "source": "noise", "chat_template": False}
TASKS = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "vt", "qa_1", "fwe")
SAMPLES = 60
SHAPE = {"n_init": 8, "n_local": 512, "last_n": 128}


def keep(root, kind, name, entries):
    """A file of samples."""
    path = root / "some-gpu" / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def ask(root, wrong, method="dense", tasks=TASKS, source="", **parameters):
    """Rows of a method that answers the first ``wrong`` samples of each task wrongly."""
    for task in tasks:
        name = f"predictions/{method}/{task}-{source}{'-'.join(map(str, parameters.values()))}.jsonl"
        scores = [float(index >= wrong) for index in range(SAMPLES)]
        keep(root, "ruler", name, ({"index": i, "score": s, "outputs": [task]} for i, s in enumerate(scores)))
        about = {"task": task, "samples": SAMPLES, "score": round(100 * sum(scores) / SAMPLES, 2), "predictions": name}
        given = COMMON | RULER | about | {"method": method, "layers_source": source, **parameters}
        append(root, RulerRow(**made_rows.columns(given)))


def probe(root, deep):
    """A probe of three prompts; the deep half of the layers has ``deep`` times the shallow half's gradient, by prompt."""
    # One head a layer; the middle's derivative is the first of the second section.
    shallow = [[[[9.0], [1.0], [9.0]]]] * 15
    keep(
        root,
        "probe",
        "one.jsonl",
        ({"index": index, "means": shallow + [[[[9.0], [value], [9.0]]]] * 15} for index, value in enumerate(deep)),
    )
    of = ASKED | SHAPE | {"method": "dense", "middle_logits": 1.0, "sample_files": "one.jsonl"}
    append(root, *(ProbeRow(**made_rows.columns(of | {"layer": layer})) for layer in range(30)))


def lose(root, made):
    """Losses of three prompts in the prompt and of the answer, by the layers with a triangle; dense has none."""
    for layers, (prompt, answer) in made.items():
        method, file = ("tri_mix" if layers else "dense"), f"samples{layers}.jsonl"
        rest = {"prompt_tokens": 9, "answer_tokens": 9, "source": "noise", "backends": "dense:sdpa", "seconds": 1.0}
        losses = [{"nll_prompt": prompt + n / 1000, "nll_answer": answer, "nll_first": answer} for n in (1, 2, 3)]
        keep(root, "loss", file, (rest | own | {"index": index} for index, own in enumerate(losses)))
        own = losses[1] | {"method": method, "sample_files": file} | (SHAPE | {"layers": layers} if layers else {})
        append(root, LossRow(**made_rows.columns(ASKED | own)))
