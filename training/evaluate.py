"""Accuracy of a model with dense attention on the generators' own prompts, scored as they score: one CSV line a task.

The seeds of these prompts (`--seed`, through `ruler_tasks`) share nothing with those of `data.py`.
"""

import argparse
import csv
import json
import multiprocessing as mp
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ruler_tasks import TASKS, examples


def prompts(job: tuple[str, str, int, int, int]) -> list[Any]:
    """The samples of one task at one length."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    tokenizer, task, length, samples, seed = job
    return list(examples(task, length, range(samples), tokenizer=AutoTokenizer.from_pretrained(tokenizer), seed=seed))


def main() -> None:
    """Evaluate and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="tmbench/models/tiny")
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--task", nargs="+", default=list(TASKS))
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--batch", type=int, default=0, help="samples at once (0: as many as 256K tokens allow)")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("training/accuracy.csv"))
    parser.add_argument("--predictions", type=Path, help="JSON lines of what the model wrote")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = [
        (options.model, task, length, options.samples, options.seed) for length in options.length for task in options.task
    ]
    rows, written = [], []
    with mp.get_context("spawn").Pool(options.workers) as pool:
        drawn = pool.imap(prompts, jobs)
        tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        )
        model.to(device).eval()
        for (_, task, length, _, _), samples in zip(jobs, drawn, strict=True):
            began = time.monotonic()
            scores = []
            size = options.batch or (max(1, 262144 // length) if device == "cuda" else 1)
            for at in range(0, len(samples), size):
                part = samples[at : at + size]
                inputs = tokenizer(
                    [sample.input + sample.answer_prefix for sample in part], return_tensors="pt", padding=True
                )
                inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
                with torch.inference_mode():
                    out = model.generate(**inputs, max_new_tokens=part[0].max_new_tokens, do_sample=False)
                texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                for sample, text in zip(part, texts, strict=True):
                    scores.append(TASKS[task].score(text, sample.outputs))
                    written.append(
                        {
                            "task": task,
                            "length": length,
                            "index": sample.index,
                            "score": scores[-1],
                            "prediction": text,
                            "outputs": sample.outputs,
                        }
                    )
            accuracy = 100 * sum(scores) / len(scores)
            rows.append([task, length, len(scores), samples[0].source, f"{accuracy:.2f}"])
            print(f"{task:16} {length:6} {accuracy:6.2f}  {time.monotonic() - began:.1f} s", flush=True)
    for length in options.length:
        mean = sum(float(row[-1]) for row in rows if row[1] == length) / sum(row[1] == length for row in rows)
        print(f"mean of {len(options.task)} tasks at {length}: {mean:.2f}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["task", "length", "samples", "source", "accuracy"])
        table.writerows(rows)
    if options.predictions:
        options.predictions.write_text("".join(json.dumps(line) + "\n" for line in written))


if __name__ == "__main__":
    main()
