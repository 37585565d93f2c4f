"""``tmbench patterns search``, ``tmbench patterns show`` and ``tmbench patterns calibrate``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tmbench.cli import options as o
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.measuring import measure, opened
from tmbench.cli.option_sources import with_sources
from tmbench.cli.screen import console, say, table
from tmbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tmbench_kernels import HeadPattern

LENGTH = 30000
"""Tokens of the published searches' prompts, at most."""
TINY_LENGTH = 8192
CALIBRATION_LENGTHS = (4096, 8192, 16384, 32768)
TINY_LENGTHS = (1024, 2048, 4096)
CALIBRATION_PROMPTS = ("niah_multikey_2", "niah_multiquery", "vt", "fwe")
FEW_KINDS = 8
"""Up to so many kinds of heads have a column each."""

app = typer.Typer(
    help="What methods are to know of a model: find out, and look at what a file says.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command()
@with_sources("patterns search")
@with_checkpoint()
def search(
    output: Annotated[Path, typer.Option(help="The JSON file to write, for --patterns.", rich_help_panel=o.OUTPUT)],
    length: Annotated[
        int | None,
        typer.Option(
            parser=o.parse_length,
            metavar="TOKENS",
            help="Tokens of the prompt, such as 30000 or 8K.",
            rich_help_panel=o.MEASURED,
            show_default="30000, or what fits; 8K for tiny",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="kv (key-value retrieval, as published), a RULER task, or random.",
            rich_help_panel=o.MEASURED,
            show_default="kv, or random for a model without a tokenizer",
        ),
    ] = None,
    seed: o.SeedOption = 42,
    remap: Annotated[
        bool,
        typer.Option(
            "--remap",
            help="Write all heads as vertical-slash ones, as the published files do: streaming with the same numbers, "
            "block-sparse with 1000 columns and 6096 distances.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = False,
    model: o.ModelOption = "tiny",
    weights: o.WeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    checkpoint: Checkpoint = AS_IT_IS,
    dtype: o.DtypeOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Search again what is there already.", rich_help_panel=o.OUTPUT)
    ] = False,
) -> None:
    """MInference's offline search: the pattern that keeps most of each head's attention, on one long prompt.

    A search that is killed and started again goes on with the layer it was at.
    """
    from tmbench.measure.partial import check_output
    from tmbench.measure.search import SearchSpec
    from tmbench.measure.spec import ModelSource
    from tmbench.models.attention_modules import attention_modules
    from tmbench.suites.prompts import check_kind

    if prompt is not None:
        check_kind(prompt)
    # Whatever does not need the model is refused before it is loaded.
    check_output(output, "search", overwrite=overwrite)
    where, loaded = opened(ModelSource(model, weights, device, dtype, **checkpoint.given))
    attention_modules(loaded.model)
    for note in loaded.notes:
        say(note)
    prompt = prompt or ("kv" if loaded.tokenizer is not None else "random")
    wanted = TINY_LENGTH if model == "tiny" else LENGTH
    tokens = length or min(wanted, loaded.longest or wanted)
    loaded.check_length(tokens)
    spec = SearchSpec(
        model=where.ask(ModelSource.of),
        output=output,
        length=tokens,
        prompt=prompt,
        seed=seed,
        remap=remap,
        overwrite=overwrite,
    )
    found = measure(spec, where, _nothing)
    _show([dict(enumerate(layer)) for layer in found], str(output))
    say(f"wrote {output}: tmbench ttft --method minference --patterns {output} uses it")


@app.command()
@with_sources("patterns calibrate")
@with_checkpoint()
def calibrate(
    output: Annotated[
        Path, typer.Option(help="The JSON file to write, for skip_softmax:calibration=.", rich_help_panel=o.OUTPUT)
    ],
    length: Annotated[
        list[int] | None,
        typer.Option(
            parser=o.parse_length,
            metavar="TOKENS",
            help="Tokens of prompts, such as 16K; repeat for several.",
            rich_help_panel=o.MEASURED,
            show_default="4K, 8K, 16K and 32K, or what fits; 1K, 2K and 4K for tiny",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="A RULER task, kv (key-value retrieval), or random; repeat for several, which are taken in turn.",
            rich_help_panel=o.MEASURED,
            show_default=f"{', '.join(CALIBRATION_PROMPTS)}, or random for a model without a tokenizer",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each length.", rich_help_panel=o.MEASURED)] = 6,
    order: Annotated[
        str, typer.Option(help="How tiles follow each other: ascending or descending.", rich_help_panel=o.MEASURED)
    ] = "ascending",
    seed: o.SeedOption = 42,
    model: o.ModelOption = "tiny",
    weights: o.WeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    checkpoint: Checkpoint = AS_IT_IS,
    dtype: o.DtypeOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Calibrate again what is there already.", rich_help_panel=o.OUTPUT)
    ] = False,
) -> None:
    """Skip-softmax's threshold for a model: which one skips what share of tiles, fitted over prompts of several lengths.

    The file is in the form of NVIDIA's Model Optimizer. A run that is killed goes on with the prompt it was at.
    """
    from tmbench.measure.calibrate import CalibrateSpec
    from tmbench.measure.partial import check_output
    from tmbench.measure.spec import ModelSource
    from tmbench.models.attention_modules import attention_modules
    from tmbench.suites.prompts import check_kind
    from tmbench_kernels import SkipSoftmax

    for kind in prompt or ():
        check_kind(kind)
    try:
        SkipSoftmax(order=order)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    check_output(output, "calibrate", overwrite=overwrite)
    where, loaded = opened(ModelSource(model, weights, device, dtype, **checkpoint.given))
    attention_modules(loaded.model)
    for note in loaded.notes:
        say(note)
    lengths = sorted(set(length or [one for one in _usual(model) if one <= (loaded.longest or one)]))
    for tokens in lengths:
        loaded.check_length(tokens)
    spec = CalibrateSpec(
        model=where.ask(ModelSource.of),
        output=output,
        lengths=tuple(lengths),
        prompts=tuple(prompt or (CALIBRATION_PROMPTS if loaded.tokenizer is not None else ["random"])),
        samples=samples,
        order=order,
        seed=seed,
        overwrite=overwrite,
    )
    (found,) = measure(spec, where, lambda _: say("nothing was measured: all prompts are there already"))
    targets = [f"target {share:.0%}" for share in next(iter(found.shares.values()))]
    shown = table("Share of tiles that the fit skips", "length", *targets, right=("length", *targets))
    for tokens, shares in found.shares.items():
        shown.add_row(str(tokens), *(f"{share:.1%}" for share in shares.values()))
    console().print(shown)
    say(f"wrote {output}: tmbench ttft --method skip_softmax:calibration={output},target=0.5,order={order} uses it")


def _usual(model: str) -> tuple[int, ...]:
    return TINY_LENGTHS if model == "tiny" else CALIBRATION_LENGTHS


def _nothing(layers: int) -> None:
    say("nothing was measured: all layers are there already; --overwrite searches again")


@app.command()
@with_sources("patterns show")
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A JSON file in MInference's format.")],
    plot: Annotated[Path | None, typer.Option(help="Draw layers and heads into this PNG file too.")] = None,
) -> None:
    """What a file holds: how many heads of each layer have which type and budget."""
    from tmbench_kernels import read_head_patterns

    o.check_plot(plot)
    remedy = "give one that tmbench patterns search wrote, or a published one"
    try:
        layers = read_head_patterns(file)
    except OSError as error:
        raise UserError(f"FILE: {file} cannot be read: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"FILE: {error}; {remedy}") from error
    if not any(layers):
        raise UserError(f"FILE: {file} holds no heads; {remedy}")
    if plot is not None:
        from tmbench.report.pattern_plot import pattern_figure
        from tmbench.report.pictures import save
        from tmbench.results.files import writable

        with writable(plot, "--plot"):
            save(pattern_figure(layers), plot)
    _show(layers, file.name)
    if plot is not None:
        say(f"drew {plot}")


def _show(layers: Sequence[Mapping[int, HeadPattern]], name: str) -> None:
    kinds = Counter(_kind(head) for layer in layers for head in layer.values())
    by_budget = len(kinds) <= FEW_KINDS
    if not by_budget:
        kinds = Counter(head.type for layer in layers for head in layer.values())
    columns = [kind for kind, _ in kinds.most_common()]
    budgets = () if by_budget else ("columns", "distances")
    shown = table(name, "layer", *columns, *budgets, "mean score", right=("layer", *columns, *budgets, "mean score"))
    for number, layer in enumerate(layers):
        heads = list(layer.values())
        own = Counter(_kind(head) if by_budget else head.type for head in heads)
        ranges = () if by_budget else (_range([h.vertical for h in heads]), _range([h.slash for h in heads]))
        scores = f"{sum(head.score for head in heads) / len(heads):.3g}" if heads else ""
        shown.add_row(str(number), *(str(own[kind] or "") for kind in columns), *ranges, scores)
    shown.add_section()
    shown.add_row("all", *(str(kinds[kind]) for kind in columns), *(("",) * len(budgets)), "")
    console().print(shown)


def _kind(head: HeadPattern) -> str:
    """A head's type and budget; a block-sparse one has no budget."""
    return head.type if head.type == "block_sparse" else f"{head.type} {head.vertical}, {head.slash}"


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return ""
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}..{max(counts)}"
