"""``tmbench suite``."""

from __future__ import annotations

from typing import Annotated

import typer

from tmbench.cli import asking
from tmbench.cli import options as o
from tmbench.cli.attention import NO_ATTENTION, Attention, with_attention
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.planning import check_plan
from tmbench.errors import UserError
from tmbench.methods.table import DEFAULT_METHODS
from tmbench.results.suite_rows import SUITE_ROWS

NAMES = tuple(kind.kind for kind in SUITE_ROWS)


def _names(begun: str) -> list[str]:
    """The names that a shell completes."""
    return [name for name in NAMES if name.startswith(begun)]


@with_checkpoint()
@with_attention(hidden=("dense_backend", "attn_native"))
def suite(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help=f"One of {', '.join(NAMES)}.", autocompletion=_names, show_default=False)
    ],
    method: o.MethodOption = None,
    length: o.LengthOption = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="TASK", help="A task of the suite; repeat for several.", rich_help_panel=o.MEASURED,
            show_default="all",
        ),
    ] = None,
    samples: asking.SamplesOption = 20,
    chunk: o.ChunkOption = None,
    prompt_length: o.PromptLengthOption = None,
    ask_later: o.AskLaterOption = False,
    seed: o.SeedOption = 42,
    model: o.ModelOption = "tiny",
    weights: asking.UnlistedWeightsOption = "checkpoint",
    device: o.DeviceOption = None,
    checkpoint: Checkpoint = AS_IT_IS,
    dtype: o.DtypeOption = None,
    batch_size: o.BatchSizeOption = None,
    context_parallel: o.ContextParallelOption = False,
    executor: o.ExecutorOption = None,
    workers: o.WorkersOption = None,
    address: o.AddressOption = None,
    attention: Attention = NO_ATTENTION,
    apply_chat_template: asking.ChatOption = False,
    chat_template_kwargs: asking.ChatKwargsOption = None,
    output_dir: o.OutputDirOption = o.RESULTS,
    overwrite: o.OverwriteOption = False,
    shard: o.ShardOption = None,
    save_samples: asking.SaveSamplesOption = False,
    as_json: o.JsonOption = False,
    plan: o.PlanOption = False,
) -> None:  # fmt: skip
    """Accuracy on the tasks of another suite, drawn at random without any download.

    All methods answer the same samples. A length is the whole budget: prompt, special tokens and answer.

    Further options, as in tmbench ttft: --weights, --dense-backend and --attn-native.
    """
    check_plan(plan, as_json)
    if name not in NAMES:
        instead = "tmbench ruler is for that one" if name == "ruler" else f"choose from {', '.join(NAMES)}"
        raise UserError(f"tmbench suite {name} is unknown: {instead}")
    chosen = attention.once().specs(list(method or DEFAULT_METHODS))
    chunks = o.chunks_of(chunk, prompt_length, attention.native)
    o.check_ask_later(ask_later, attention.native)
    part = o.shard_of(shard, overwrite)

    from tmbench.measure.spec import ModelSource
    from tmbench.models import loading
    from tmbench.suites.table import DRAWN

    kind = DRAWN[name]
    tasks = list(dict.fromkeys(task or kind.tasks))
    for one in tasks:
        if one not in kind.tasks:
            raise UserError(f"--task {one} is unknown: {kind.title} has {', '.join(kind.tasks)}")
    if not plan:
        loading.check_has_tokenizer(model, kind.title)
    asking.ask(
        kind(chat_template_kwargs=asking.chat_text(chat_template_kwargs, apply_chat_template)),
        tasks,
        ModelSource(model, weights, device, dtype, context_parallel, **checkpoint.given),
        asking.Where(executor, workers, address),
        chosen,
        attention,
        length,
        output_dir,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        overwrite=overwrite,
        save_samples=save_samples,
        shard=part,
        chunks=chunks,
        ask_later=ask_later,
        as_json=as_json,
        plan=plan,
    )
