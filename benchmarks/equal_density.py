"""Asks one method RULER tasks at a setting whose density is a given one; rows are those of ``tmbench ruler``.

    python benchmarks/equal_density.py METHOD --output-dir FOLDER [--target 0.3] [--samples 50] [--layers 6-]

A density is the share of the causal pairs that are computed, over all layers and heads. One parameter of the method is
searched by bisection until the mean density of each task's first prompt is nearest to the target: of those prompts
``tmbench ruler`` counts the density. Settings that follow the method's name, as in streaming:delta=64, stay as they are.
All else has its default, but for these:

- tri_mix has triangle attention in every layer, unless --layers says otherwise;
- minference has the heads of --patterns, or the published budget in every head, each budget times one factor;
- flexprefill has min_budget 128, so that gamma decides: its own keeps 1024 columns and as many diagonals in any case;
- methods with a deep pattern have the default one there, and are searched in their shallow layers;
- skip_softmax computes the logits of every pair, which count half. The target is then the share of its tiles whose values
  are read, as near as a threshold comes to it; its density is higher;
- oracle_blocks holds a share of the attention, or with --like as many key blocks as another method, which is searched.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accuracy_rows import DYNAMIC, TASKS
from torch import Tensor

from tmbench.engine.density import PairCounter
from tmbench.engine.prefill import PLAIN
from tmbench.engine.session import running
from tmbench.errors import UserError
from tmbench.measure.spec import ModelSource
from tmbench.methods.spec import MethodSpec
from tmbench.models.loading import LoadedModel
from tmbench.suites.ruler import Ruler
from tmbench_kernels import HeadPattern, head_patterns_json, load_head_patterns

SEED = 42
STEPS = 12
NEAR = 0.001
"""A density so near to the target is taken at once."""
DEEP = "tri_mix_"
LIKE = DYNAMIC
"""The methods of whole key blocks, whose number of blocks an oracle can take."""


@dataclass(frozen=True)
class Search:
    """The parameter of a method that is searched, between two values of which the first has the lower density."""

    name: str
    fewest: float
    most: float
    fixed: str = ""
    """What else follows the method's name."""
    logarithmic: bool = False
    whole: bool = False

    def value(self, place: float) -> float:
        """The value at a place from 0 to 1, with as many digits as are told apart."""
        if self.logarithmic:
            found = self.fewest * (self.most / self.fewest) ** place
        else:
            found = self.fewest + (self.most - self.fewest) * place
        return round(found) if self.whole else float(f"{found:.4g}")


@dataclass(frozen=True)
class Setting:
    """A method as the command line takes it, and what it computes."""

    method: str
    density: float
    told: float
    """What is held against the target: the density, or of skip_softmax the share of tiles whose values are read."""


def search_of(method: str, length: int, like: str | None = None) -> Search:
    """What is searched in a method, or in the one that an oracle is ``like``; raises UserError where nothing can be."""
    if like is not None:
        if method.removeprefix(DEEP) != "oracle_blocks" or like not in LIKE:
            raise UserError(f"--like {like} is for an oracle: give it one of {', '.join(LIKE)}")
        other = search_of(like, length)
        fixed = f":{other.fixed}" if other.fixed else ""
        return replace(other, name=f"like={like}{fixed}:{other.name}", fixed="")
    searches = {
        "tri_mix": Search("n_local", 1, length, whole=True),
        "streaming": Search("n_local", 1, length, whole=True),
        "minference": Search("patterns", 0.001, 1),
        "flexprefill": Search("gamma", 0.001, 1, fixed="min_budget=128"),
        "xattention": Search("threshold", 0.001, 1),
        "flashprefill": Search("alpha", 1, 1e-5, logarithmic=True),
        "pbs": Search("score", 0.001, 1),
        "skip_softmax": Search("threshold", 1, 1e-8, logarithmic=True),
        "oracle_blocks": Search("p", 0.001, 1),
    }
    found = searches.get(method.removeprefix(DEEP))
    if found is None:
        known = [*searches, *(f"{DEEP}{name}" for name in searches if name not in ("tri_mix", "streaming"))]
        raise UserError(f"the density of {method} is not searched: give dense, {', '.join(known)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", help="a name that tmbench list has, and its settings; dense is asked as it is")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--target", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--length", type=int, default=4096, help="tokens")
    parser.add_argument("--layers", help="the deep layers, as tmbench ruler takes them")
    parser.add_argument("--like", help="of an oracle: the method whose number of key blocks it takes")
    parser.add_argument("--patterns", type=Path, help="MInference's patterns, whose budgets are scaled")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data-dir", type=Path, default=Path("texts"))
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    if not 0 < options.target <= 1:
        parser.error(f"--target {options.target:g} is a share: give more than 0 and at most 1")
    options.method, _, options.given = options.method.partition(":")
    if options.method == "tri_mix" and options.layers is None:
        options.layers = "0-"
    try:
        method = options.method if options.method == "dense" and not options.given else found(options)
    except UserError as error:
        parser.error(str(error))
    asked = ["ruler", "--method", method, "--output-dir", str(options.output_dir), "--samples", str(options.samples)]
    asked += ["--length", str(options.length), "--model", options.model, "--dtype", options.dtype, "--seed", str(SEED)]
    asked += ["--batch-size", str(options.batch_size), "--offline", "--data-dir", str(options.data_dir)]
    asked += [word for task in TASKS for word in ("--task", task)]
    asked += [] if options.layers is None else ["--layers", options.layers]
    sys.exit(subprocess.run([sys.executable, "-m", "tmbench", *asked], check=False).returncode)


def found(options: argparse.Namespace) -> str:
    """The method at the target, as ``--method`` takes it; says what was found."""
    search = search_of(options.method, options.length, options.like)
    settings = [setting for setting in (search.fixed, options.given) if setting]
    loaded = ModelSource(options.model, dtype=options.dtype).load()
    suite = Ruler(data_dir=options.data_dir, offline=True)
    suite.check(TASKS, [options.length], 1, SEED, loaded.need_tokenizer(suite.title))
    prompts = [
        torch.tensor([sample.ids], device=loaded.device)
        for task in TASKS
        for sample in suite.samples(task, options.length, [0], SEED, loaded.need_tokenizer(suite.title))
    ]
    with tempfile.TemporaryDirectory() as folder:
        scaled = patterns_of(loaded, options.patterns)

        def measure(value: float) -> Setting:
            given = f"{search.name}={value:.10g}"
            if search.name == "patterns":
                given = f"patterns={write_scaled(scaled, value, Path(folder))}"
            setting = measured(loaded, options, ",".join([*settings, given]), prompts)
            print(f"{setting.method}: {setting.told:.2%}", flush=True)
            return setting

        best, value = bisected(search, measure, options.target)
    if search.name == "patterns":
        kept = write_scaled(scaled, value, options.output_dir / "patterns")
        best = replace(best, method=f"{options.method}:{','.join([*settings, f'patterns={kept}'])}")
    layers = "" if options.layers is None else f" --layers {options.layers}"
    print(f"{best.method}{layers}: density {best.density:.2%}, {len(prompts)} prompts of {options.length} tokens")
    if "skip_softmax" in options.method:
        print(f"the values of {best.told:.2%} of its tiles are read, and the logits of all pairs are computed")
    if abs(best.told - options.target) > 10 * NEAR:
        print(f"no {search.name} comes nearer to {options.target:.2%}")
    return best.method


def bisected(search: Search, measure: Callable[[float], Setting], target: float) -> tuple[Setting, float]:
    """The setting nearest to the target of those that a bisection meets, and its value."""
    low, high = 0.0, 1.0
    seen: dict[float, Setting] = {}
    for _ in range(STEPS):
        place = (low + high) / 2
        value = search.value(place)
        if value not in seen:
            seen[value] = measure(value)
        if abs(seen[value].told - target) < NEAR:
            break
        low, high = (place, high) if seen[value].told < target else (low, place)
    best = min(seen, key=lambda value: abs(seen[value].told - target))
    return seen[best], best


def measured(loaded: LoadedModel, options: argparse.Namespace, given: str, prompts: Sequence[Tensor]) -> Setting:
    """What a method with such parameters computes of prompts ``[1, tokens]``, their mean."""
    text = f"{options.method}:{given}"
    plan = MethodSpec.of(text).with_layers(loaded.shape, options.layers).plan(loaded.shape)
    counts = []
    with torch.inference_mode(), running(loaded.model, plan, PLAIN) as session:
        for ids in prompts:
            counts.append(PairCounter())
            session.applied.observer = counts[-1]
            with session.prefill() as prefill:
                prefill(ids)
        session.applied.check_complete()
    density = statistics.fmean(mean_of(one.density for one in counts))
    if "skip_softmax" in options.method:
        return Setting(text, density, 1 - statistics.fmean(mean_of(one.skipped_share for one in counts)))
    return Setting(text, density, density)


def mean_of(shares: Iterator[float | None]) -> list[float]:
    """The shares, all of which were counted."""
    return [share for share in shares if share is not None]


def patterns_of(loaded: LoadedModel, path: Path | None) -> Sequence[Sequence[HeadPattern]]:
    """MInference's head patterns of each layer: those of a file, or the published budget everywhere."""
    layers, heads = loaded.shape.layers, loaded.shape.heads
    if path is None:
        return [[HeadPattern()] * heads] * layers
    try:
        return load_head_patterns(path, layers=layers, heads=heads)
    except (OSError, ValueError) as error:
        raise UserError(f"--patterns: {error}") from error


def write_scaled(layers: Sequence[Sequence[HeadPattern]], factor: float, folder: Path) -> Path:
    """A file of the patterns with every budget times a factor, called by that."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"times-{factor:.4g}.json"
    scaled = [
        [replace(head, vertical=round(head.vertical * factor), slash=round(head.slash * factor)) for head in heads]
        for heads in layers
    ]
    path.write_text(head_patterns_json(scaled), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
