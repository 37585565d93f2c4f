"""Train the embedded model from random weights: `python training/train.py`, one GPU, ten minutes.

Short contexts first. When the model answers nearly without loss at the longest context it has met, that length doubles,
up to 16384 tokens; shorter ones stay in the mixture. The loss is the mean over all tokens plus the mean over the answers'
tokens. Matrices are updated with Muon, embeddings and norms with AdamW; the learning rate falls to zero by the clock.
"""

import argparse
import csv
import multiprocessing as mp
import os
import queue
import random
import time
from collections import defaultdict
from math import isnan
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, TextIO

import data
import torch
from model import Stream, config
from optimizers import Muon
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from writing import Writer

REPORT = 50  # steps between lines of the log
WARM_UP = 100  # steps
FALL = 0.65  # the share of the time in which the learning rate falls to zero
GATES = ("niah_multikey_2", "niah_multikey_1")  # the tasks whose answers decide when the length doubles


def supply(seed: int, tokens: int, level: "Synchronized[int]", batches: "mp.Queue[Any]", tokenizer: str) -> None:
    """A worker: batches of `tokens` tokens, at lengths up to the current level, for ever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    writer = Writer(AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer)
    draw = random.Random(f"tmbench training {seed}")
    while True:
        length = data.choose_length(draw, level.value)
        batches.put((length, *data.batch(draw, writer, length, tokens // length)))


class Log:
    """Mean losses by length and kind of task: a line of CSV each `REPORT` steps, and what decides about the length."""

    def __init__(self, file: TextIO, device: torch.device) -> None:
        self.file, self.table = file, csv.writer(file, lineterminator="\n")
        self.table.writerow(["step", "seconds", "tokens", "top", "rate", "length", "text", *data.KINDS])
        self.tallies: dict[int, Tensor] = defaultdict(lambda: torch.zeros(len(data.KINDS) + 1, 2, device=device))

    @torch.no_grad()
    def count(self, length: int, losses: Tensor, answers: Tensor, read: Tensor, kinds: Tensor) -> None:
        """Add one batch, without waiting for the GPU."""
        tally = self.tallies[length]
        rows = [(losses * answers).view(-1, length).sum(1), answers.view(-1, length).sum(1)]
        tally.index_add_(0, kinds.long(), torch.stack(rows, 1))
        tally[-1] += torch.stack([losses.sum(), read.sum()])

    def report(self, step: int, seconds: float, tokens: int, top: int, rate: float) -> dict[str, float]:
        """Write what was counted since the last report; the means at length `top`."""
        at_top: dict[str, float] = {}
        for length, tally in sorted(self.tallies.items()):
            means = dict(zip([*data.KINDS, "text"], (tally[:, 0] / tally[:, 1]).tolist(), strict=True))
            cells = ["" if isnan(means[name]) else f"{means[name]:.4f}" for name in ("text", *data.KINDS)]
            self.table.writerow([step, f"{seconds:.1f}", tokens, top, f"{rate:.3f}", length, *cells])
            if length == top:
                at_top = means
        self.tallies.clear()
        self.file.flush()
        return at_top


def parsed() -> argparse.Namespace:
    """The options; their defaults are those of the model in the repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=430, help="time for training, compilation not counted")
    parser.add_argument("--output", type=Path, default=Path("tmbench/models/tiny"))
    parser.add_argument("--log", type=Path, default=Path("training/log.csv"))
    parser.add_argument("--tokenizer", default="tmbench/models/tiny")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens of one step")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--matrix-rate", type=float, default=0.007)
    parser.add_argument("--vector-rate", type=float, default=3e-3)
    parser.add_argument("--adam", action="store_true", help="AdamW for the matrices too, at --vector-rate")
    parser.add_argument("--text-weight", type=float, default=0.5, help="weight of the mean over all tokens")
    parser.add_argument("--first-weight", type=float, default=3.0, help="weight of the first tokens of an answer")
    parser.add_argument("--gate", type=float, default=0.25, help="answer loss at which the length doubles")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: by the clock alone)")
    return parser.parse_args()


def optimizers_for(model: LlamaForCausalLM, options: argparse.Namespace, cuda: bool) -> list[torch.optim.Optimizer]:
    """AdamW for embeddings and norms, Muon for the matrices (or AdamW for all)."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and not options.adam]
    others = [p for _, p in named if not any(p is matrix for matrix in matrices)]
    adam = torch.optim.AdamW(others, lr=options.vector_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda)
    return [adam, Muon(matrices, lr=options.matrix_rate)] if matrices else [adam]


def next_batch(batches: "mp.Queue[Any]", workers: list[mp.Process]) -> Any:
    """The next batch, or an error if no worker is left to make one."""
    while True:
        try:
            return batches.get(timeout=30)
        except queue.Empty:
            if not all(worker.is_alive() for worker in workers):
                raise RuntimeError("A worker that makes the data has died.") from None


def main() -> None:
    """Train, write the log as it grows, save the model."""
    options = parsed()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    level = mp.Value("i", 0)
    batches: mp.Queue[Any] = mp.Queue(maxsize=2 * options.workers)
    workers = []
    for number in range(options.workers):
        seed = options.seed * 1000 + number
        arguments = (seed, options.tokens, level, batches, options.tokenizer)
        workers.append(mp.Process(target=supply, args=arguments, daemon=True))
        workers[-1].start()

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    vocabulary = -(-len(tokenizer) // 64) * 64
    setting = config(vocabulary, tokenizer.bos_token_id, tokenizer.eos_token_id, num_hidden_layers=options.layers)
    model = LlamaForCausalLM(setting).float().to(device)
    optimizers = optimizers_for(model, options, cuda)
    full_rates = [optimizer.defaults["lr"] for optimizer in optimizers]
    stream = Stream(model, compiled=cuda, dtype=torch.bfloat16 if cuda else torch.float32)

    options.log.parent.mkdir(parents=True, exist_ok=True)
    with options.log.open("w", newline="") as file:
        log = Log(file, device)
        step, began = 0, time.monotonic()
        while (elapsed := time.monotonic() - began) < options.seconds and not 0 < options.steps <= step:
            length, *arrays = next_batch(batches, workers)
            ids, targets, answers, kinds = (torch.from_numpy(part).to(device, non_blocking=True) for part in arrays)
            rate = min(1.0, (step + 1) / WARM_UP, (1 - elapsed / options.seconds) / FALL)
            for optimizer, full in zip(optimizers, full_rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = full * rate
            losses = stream.token_losses(ids.long(), targets.long(), length)
            read, asked = (targets != -100).float(), (answers > 0).float()
            weights = asked + (options.first_weight - 1) * (answers == 2).float()
            text, answer = losses.sum() / read.sum(), (losses * weights).sum() / weights.sum()
            (answer + options.text_weight * text).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            log.count(length, losses.detach(), asked, read, kinds)
            step += 1
            if step == 1:  # compilation is not training
                if cuda:
                    torch.cuda.synchronize()
                print(f"first step after {time.monotonic() - began:.0f} s", flush=True)
                began = time.monotonic()
            if step % REPORT == 0:
                elapsed, seen, top = time.monotonic() - began, step * options.tokens, data.LENGTHS[level.value]
                means = log.report(step, elapsed, seen, top, rate)
                shown = " ".join(f"{name.removeprefix('niah_')}:{loss:.2f}" for name, loss in means.items())
                print(f"{step} {elapsed:.0f}s {seen / 1e6:.0f}M tokens, at {top}: {shown}", flush=True)
                passed = means and max(means[name] for name in GATES) < options.gate
                if passed and level.value + 1 < len(data.LENGTHS):
                    level.value += 1
    for worker in workers:
        worker.terminate()
    save(model, options.output)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """The weights in bfloat16 and the configuration, where the tokenizer is."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
