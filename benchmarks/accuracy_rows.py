"""Makes the rows of a folder beside this file: python benchmarks/accuracy_rows.py FOLDER [--output-dir DIR] [--processes 8]

Folders are ``smollm2-135m``, ``served`` and ``equal-density``. Their commands run some at a time, on one GPU: the models are
small, and most of an answer is the time between kernels. CUDA's Multi-Process Service lets kernels of several processes run
at once. What a folder holds already of the same checkpoint is not measured again, so a run that was stopped is gone on with.
``--only`` takes the commands with a text in them, and ``--print`` shows them.

The checkpoint is ``smollm2``, where ``make smollm2`` puts it. Each command's output is in ``logs`` of the output folder.
Ends with 1 where a command failed.
"""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BENCHMARKS = Path(__file__).parent
SMOLLM2 = BENCHMARKS / "smollm2-135m"
PATTERNS = SMOLLM2 / "patterns.json"
DYNAMIC = ("flexprefill", "xattention", "flashprefill")
MORE = ("pbs", "skip_softmax")
DELTA = ("streaming:delta=64", "streaming:delta=64,mode=recompute", "tri_mix:delta=64")

RULER = "ruler --model smollm2 --dtype bfloat16 --batch-size 32 --offline --data-dir {texts}"
TASKS = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue")
"""Those of RULER on which SmolLM2 scores more than 20 under dense attention."""
LENGTHS = "--length 2K --length 4K --length 8K"


def methods(names: Sequence[str]) -> str:
    """As options."""
    return given("method", names)


def given(option: str, values: Sequence[str]) -> str:
    """An option that is repeated for each value."""
    return " ".join(f"--{option} {value}" for value in values)


def smollm2() -> list[str]:
    """RULER by length, layers and shape; gradients, losses, long answers, patterns, and layers by measurement."""
    asked = f"{RULER} {given('task', TASKS)} --samples 100"
    read = "probe --loss --model smollm2 --dtype bfloat16 --prompt text:{texts}/addresses.txt --samples 40"
    losses = f"{read} --length 4K"
    probe = "probe --model smollm2 --dtype bfloat16 --samples 8"
    found = [f"{RULER} {LENGTHS} --samples 100 --method dense{chat}" for chat in ("", " --apply-chat-template")]
    found += [
        f"{asked} {LENGTHS} {methods(names)}"
        for names in (("tri_mix", "streaming"), *((name, mixed(name)) for name in DYNAMIC))
    ]
    found += [f"{asked} {LENGTHS} --method {name} --patterns {PATTERNS}" for name in ("minference", "tri_mix_minference")]
    found += [f"{asked} --length 4K {methods((name, mixed(name)))}" for name in MORE]
    found += [f"{asked} --length 4K {methods(DELTA)}"]
    shapes = ("--layers random:15:1", "--layers random:15:2", "--last-n 0", "--last-n 0 --n-local 640")
    found += [f"{asked} --length 4K --method tri_mix {shape}" for shape in shapes]
    proposal = "{output}/proposal/*/probe/dense.csv"
    found += [
        f"{probe} --length 4K --task vt --task niah_multikey_2 --time-budget 0.65 --output-dir {{output}}/proposal && "
        f"{asked} --length 4K --method tri_mix --layers {proposal} && {losses} --method tri_mix --layers {proposal}"
    ]
    for task in ("vt", "niah_multikey_2", "qa_1", "text:{texts}/addresses.txt"):
        found += [f"{probe} --length {length} --task {task}" for length in ("2K", "4K", "8K")]
    found += [f"{losses} --method dense --method streaming --method tri_mix"]
    found += [f"{losses} --method tri_mix --layers {layers}" for layers in ("0-", "5-", "10-", "20-", "25-", "random:15:2")]
    # MInference's defaults leave no pair out of 2K: what differs from dense attention is rounding.
    found += [f"{read} --length 2K --method dense --method minference"]
    agree = "agree --model smollm2 --dtype bfloat16 --batch-size 32 --length 4K --samples 40 --new-tokens 256"
    four = methods(("dense", "tri_mix", "minference", "streaming"))
    found += [f"{agree} {four} --prompt {prompt}" for prompt in ("text:{texts}/addresses.txt", "kv")]
    found += [
        "tune --model smollm2 --dtype bfloat16 --length 4K --task niah_single_2 --task niah_multikey_1 "
        "--budget-prefills 800 --held-out-task niah_single_3 --held-out-length 2K --random 20 --compared-prompts 40"
    ]
    return found


def mixed(name: str) -> str:
    """A method with triangle attention in its deep layers."""
    return f"tri_mix_{name}"


def served() -> list[str]:
    """Every way in which a prompt is fed: in one piece, in chunks, with the question asked later."""
    asked = f"{RULER} {given('task', TASKS)}"
    every = methods(("dense", "tri_mix", "minference", *DYNAMIC, "streaming"))
    fed = ("", " --chunk 2K", " --ask-later")
    ways = [f"{every}{way}" for way in fed]
    ways += [f"{methods(('dense', 'tri_mix', 'flashprefill'))} --chunk 2K --prompt-length unknown"]
    patterns = f"--patterns {PATTERNS} {methods(('minference', 'tri_mix_minference'))}"
    rest = methods((*map(mixed, MORE), "streaming:delta=64", "tri_mix:delta=64"))
    others = [f"{some}{way}" for some in (methods((*map(mixed, DYNAMIC), *MORE)), patterns, rest) for way in fed]
    tiny = "ruler --model tiny --dtype bfloat16 --batch-size 32 --offline --samples 20"
    loss = "probe --loss --dtype bfloat16 --samples 60"
    agree = "agree --dtype bfloat16 --batch-size 16 --samples 32 --new-tokens 64"
    kinds = (
        f"{asked} --samples 100 --length 4K",
        f"{loss} --model smollm2 --length 4K --task niah_single_2 --task niah_multikey_1",
        f"{agree} --model smollm2 --length 4K --prompt niah_single_2",
        f"{tiny} --length 8K",
        f"{asked} --samples 50 --length 8K",
        f"{loss} --model tiny --length 8K --task vt --task niah_multikey_2",
        f"{agree} --model tiny --length 8K --prompt vt",
        f"{tiny} --length 16K",
    )
    found = [f"{kind} {way}" for kind in kinds for way in ways]
    found += [f"{asked} --samples 50 --length {length} {way}" for length in ("4K", "8K") for way in others]
    combined = methods((*map(mixed, ("minference", *DYNAMIC)), *MORE))
    found += [
        f"{tiny} --length {length} {some}{way}" for length in ("8K", "16K") for some in (combined, rest) for way in fed
    ]
    # A prompt of 2K tokens is one chunk.
    return found + [f"{asked} --samples 50 --length 2K {way}" for way in (*ways, *others) if "--chunk" not in way]


def equal_density() -> list[str]:
    """Every method at the setting nearest to one density; see equal_density.py."""
    names = ["dense", "oracle_blocks", "tri_mix_oracle_blocks", "streaming", "tri_mix", "tri_mix --layers 6-"]
    names += [f"{name}:delta=64" for name in ("streaming", "tri_mix")]
    names += [f"{kind} --patterns {PATTERNS}" for kind in ("minference", "tri_mix_minference")]
    for name in (*DYNAMIC, *MORE):
        names += [name, mixed(name)]
    names += [f"oracle_blocks --like {name}" for name in DYNAMIC]
    # Of the methods that do not come to 30 %.
    names += [f"oracle_blocks --target {density}" for density in (0.36, 0.52, 0.68)]
    return [f"{BENCHMARKS / 'equal_density.py'} {name} --samples 50 --data-dir {{texts}}" for name in names]


FOLDERS = {"smollm2-135m": smollm2, "served": served, "equal-density": equal_density}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", choices=FOLDERS)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--only", default="")
    parser.add_argument("--print", action="store_true", dest="shown")
    options = parser.parse_args()
    output = options.output_dir or BENCHMARKS / options.folder
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(SMOLLM2 / "texts.tar.xz") as texts:
            texts.extractall(folder, filter="data")
        commands = [one.replace("{texts}", folder).replace("{output}", str(output)) for one in FOLDERS[options.folder]()]
        commands = [one for one in commands if options.only in one]
        if options.shown:
            print(*commands, sep="\n")
            return 0
        with ThreadPoolExecutor(options.processes) as workers:
            ended = list(workers.map(lambda number: run(number, commands[number], output), range(len(commands))))
    return 1 if any(ended) else 0


def run(number: int, command: str, output: Path) -> int:
    """Run a command, or several one after the other; the exit status of the last that ran."""
    log = output / "logs" / f"{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start, status = time.monotonic(), 0
    with log.open("w") as file:
        for part in command.split(" && "):
            words = [each for word in shlex.split(part) for each in (sorted(glob.glob(word)) if "*" in word else [word])]
            program = words if words[0].endswith(".py") else ["-m", "tmbench", *words]
            where = [] if "--output-dir" in words else ["--output-dir", str(output)]
            # One thread compiles: with several processes the cores are taken.
            environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1"} | os.environ
            done = subprocess.run([sys.executable, *program, *where], stdout=file, stderr=file, env=environment, check=False)
            status = done.returncode
            if status:
                break
    print(f"{number}: exit {status}, {time.monotonic() - start:.0f} s: {command}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
