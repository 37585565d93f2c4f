"""The options that commands share, and what their texts mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ruler_tasks.errors import RulerError
from tmbench.cli.screen import say
from tmbench.errors import UserError, shortened
from tmbench.methods.layers import RESULTS as RESULTS
from tmbench.methods.table import DEFAULT_METHODS, METHODS
from tmbench.models.presets import preset_names
from tmbench.results.words import UNITS
from tmbench_kernels.parameters import LARGEST_COUNT

if TYPE_CHECKING:
    from tmbench.engine.chunks import Chunks
    from tmbench.models.loading import LoadedModel
    from tmbench.results.shards import Shard
    from tmbench.suites.prompts import Kind


def parse_length(text: str) -> int:
    """Tokens from a text such as 32768, 32K or 1M (K is 1024)."""
    number, unit = text.strip().upper(), 1
    if number[-1:] in UNITS:
        number, unit = number[:-1], UNITS[number[-1:]]
    try:
        length = float(number) * unit
    except ValueError:
        length = 0
    if not math.isfinite(length) or length < 1 or length != int(length):
        raise typer.BadParameter(f"{shortened(text)!r} is no number of tokens: give for instance 32768 or 32K")
    if length > LARGEST_COUNT:
        raise typer.BadParameter(f"{shortened(text)!r} is more tokens than any prompt has: give for instance 32768 or 32K")
    return int(length)


MEASURED, SERVED, MACHINE, WORKERS, OUTPUT, PROMPTS = (
    "What is measured",
    "As engines serve it",
    "Model and machine",
    "Several GPUs",
    "Output",
    "Prompts",
)

MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method", metavar="METHOD",
        help=f"A method; repeat for several, or for several settings of one. One of {', '.join(METHODS)}. "
        "Parameters may follow, as in xattention:stride=8.",
        rich_help_panel=MEASURED,
        show_default=" ".join(DEFAULT_METHODS),
    ),
]  # fmt: skip


def length_option(default: str) -> Any:
    """The option ``--length`` of a command, with what its help says of no length."""
    return typer.Option(
        "--length", parser=parse_length, metavar="TOKENS", help="Tokens, such as 32768 or 32K; repeat for several.",
        rich_help_panel=MEASURED, show_default=default,
    )  # fmt: skip


LengthOption = Annotated[list[int] | None, length_option("what fits the model")]
PromptFileOption = Annotated[
    Path | None,
    typer.Option(
        "--prompt-file", metavar="FILE.jsonl", rich_help_panel=MEASURED,
        help="Prompts of your own: a JSON object a line, with prompt, and where you like question, answer and id.",
    ),
]  # fmt: skip
ChunkOption = Annotated[
    int | None,
    typer.Option(
        "--chunk", parser=parse_length, metavar="TOKENS", rich_help_panel=SERVED, show_default="in one piece",
        help="Feed prompts in chunks of so many tokens, as serving engines do: 2048 or 8K.",
    ),
]  # fmt: skip
PromptLengthOption = Annotated[
    Literal["known", "unknown"] | None,
    typer.Option(
        "--prompt-length", rich_help_panel=SERVED, show_default="known",
        help="Whether attention knows in a chunk how long the prompt is; if not, every chunk's last rows count as last.",
    ),
]  # fmt: skip
# For commands with no room left in their help: that of tmbench ttft has it.
UnlistedPromptLengthOption = Annotated[Literal["known", "unknown"] | None, typer.Option("--prompt-length", hidden=True)]
AskLaterOption = Annotated[
    bool,
    typer.Option(
        "--ask-later", rich_help_panel=SERVED,
        help="Have the method read the context without the question, which is then read densely over the kept cache.",
    ),
]  # fmt: skip
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the prompts.", rich_help_panel=MEASURED)]
ModelOption = Annotated[
    str,
    typer.Option(
        help="tiny (embedded), a Hugging Face id, a checkpoint folder, or with synthetic weights "
        f"{', '.join(preset_names())}.",
        rich_help_panel=MACHINE,
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=64,
        help="How many answers decode together at most. Prompts are read one by one, by the method.",
        rich_help_panel=MACHINE,
        show_default="what memory holds, up to 64; 1 on a CPU",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="A torch device.", rich_help_panel=MACHINE, show_default="cuda if there is one")
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"] | None,
    typer.Option(
        help="The model's type; auto is that of the checkpoint.",
        rich_help_panel=MACHINE,
        show_default="bfloat16 on a GPU, else float32",
    ),
]
WeightsOption = Annotated[
    Literal["checkpoint", "random", "structured"],
    typer.Option(
        help="Synthetic weights need only the config: random, for which dynamic methods cost more, or structured, whose "
        "attention has bands, slashes, sinks and columns as trained heads have.",
        rich_help_panel=MACHINE,
    ),
]
ContextParallelOption = Annotated[
    bool,
    typer.Option(
        "--context-parallel", rich_help_panel=MACHINE,
        help="Under torchrun, split each prompt over the GPUs and not the model, which each of them then holds.",
    ),
]  # fmt: skip
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile", help="Compile the decoder layers.", rich_help_panel=MACHINE,
        show_default="on a GPU with a C compiler",
    ),
]  # fmt: skip
OutputDirOption = Annotated[Path, typer.Option(help="Folder of the result files.", rich_help_panel=OUTPUT)]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Measure again what is there already.", rich_help_panel=OUTPUT)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.", rich_help_panel=OUTPUT)]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="K/N", rich_help_panel=OUTPUT, show_default=False,
        help="Measure the K-th of N parts of the samples, from 1, for tmbench merge to make rows of.",
    ),
]  # fmt: skip
ExecutorOption = Annotated[
    Literal["processes", "ray"] | None,
    typer.Option(
        "--executor", rich_help_panel=WORKERS, show_default="this process",
        help="Spread samples over workers, one for each GPU: processes of this machine, or Ray's actors.",
    ),
]  # fmt: skip
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="How many workers --executor has.", rich_help_panel=WORKERS,
        show_default="one for each GPU, or one on the CPU",
    ),
]  # fmt: skip
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", help="The Ray cluster of --executor ray, such as auto or host:port.", rich_help_panel=WORKERS,
        show_default="RAY_ADDRESS, else this machine alone",
    ),
]  # fmt: skip
PlanOption = Annotated[
    bool,
    typer.Option(
        "--plan", "--dry-run", rich_help_panel=OUTPUT,
        help="Print what would be measured, what is there and how long the rest will take, and stop.",
    ),
]  # fmt: skip


@contextmanager
def naming(option: str, kind: type[RulerError]) -> Iterator[None]:
    """Have such an error of ``ruler_tasks``, which knows no command line, name the option that it is about."""
    try:
        yield
    except kind as error:
        raise UserError(f"{option}: {error}") from error


def refuse(given: Mapping[str, Any], why: str) -> None:
    """Raise UserError for the first of these options, by name, that was given: whose value is neither None nor False."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise UserError(f"--{name} {why}: leave it out")


def chunks_of(size: int | None, prompt_length: str | None, native: bool = False) -> Chunks | None:
    """How prompts are to be fed; raises UserError for a length's being known beside no chunks, and for ``--attn-native``."""
    from tmbench.engine.chunks import Chunks

    if size is None:
        refuse({"prompt-length": prompt_length}, "is about prompts in chunks and needs --chunk")
        return None
    refuse({"attn-native": native}, "shows attention over whole prompts and does not go with --chunk")
    return Chunks(size, known=prompt_length != "unknown")


def check_ask_later(ask_later: bool, native: bool) -> None:
    """Raise UserError for ``--attn-native`` beside it."""
    if ask_later:
        refuse({"attn-native": native}, "shows attention over whole prompts and does not go with --ask-later")


def prompts_of(texts: Iterable[str], file: Path | None, option: str = "--prompt") -> list[Kind]:
    """What prompts are to be made of, each once; raises UserError for what there is none of, and for both options."""
    from tmbench.suites.prompt_files import PromptFile
    from tmbench.suites.prompts import kind_of

    given = list(dict.fromkeys(texts))
    if file is not None:
        refuse({option.removeprefix("--"): given or None}, "does not go with --prompt-file, which has the prompts")
        return [PromptFile.of(file, "jsonl")]
    return [kind_of(text, option) for text in given]


def lengths_of(prompts: Kind | None, loaded: LoadedModel, *, answered: bool = False) -> tuple[int, ...]:
    """The length that serves every prompt of a JSONL file, where none is given; nothing for other prompts.

    It is that of the shortest, which all are cut to, or of the longest with its answer, where answers follow.
    """
    from tmbench.suites.prompt_files import PromptFile

    if not isinstance(prompts, PromptFile):
        return ()
    length = prompts.longest(loaded) if answered else prompts.shortest(loaded)
    return () if length is None else (length,)


def shard_of(text: str | None, overwrite: bool = False) -> Shard | None:
    """The shard of ``--shard``; raises UserError for a text that is none, and beside ``--overwrite``."""
    from tmbench.results.shards import Shard

    if text is None:
        return None
    if overwrite:
        raise UserError(
            "--overwrite does not go with --shard, as all shards would have to be measured again: give another --output-dir"
        )
    return Shard.parse(text)


def check_plot(path: Path | None) -> None:
    """Raise UserError for a ``--plot`` that is no PNG file's name."""
    if path is not None and path.suffix.lower() != ".png":
        raise UserError(f"--plot {path} must be the name of a PNG file: let it end in .png")


def lengths_for(
    loaded: LoadedModel, given: list[int] | None, wanted: tuple[int, ...], *, longest_first: bool = False
) -> list[int]:
    """The given lengths, each once; without any, those of the wanted ones that fit the model, or the longest that does.

    With ``longest_first`` in that order: the fewer workers a run's end keeps busy, the shorter its last samples should be.

    Raises UserError for a given length that the model cannot read.
    """
    for note in loaded.notes:
        say(note)
    limit = loaded.longest
    fitting = [length for length in wanted if limit is None or length <= limit]
    lengths = list(dict.fromkeys(given or fitting or [limit or wanted[0]]))
    for length in lengths:
        loaded.check_length(length)
    return sorted(lengths, reverse=True) if longest_first else lengths
