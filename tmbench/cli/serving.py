"""``tmbench serving``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tmbench.cli import options as o
from tmbench.cli.attention import NO_ATTENTION, Attention, with_attention
from tmbench.cli.checkpoint import AS_IT_IS, Checkpoint, with_checkpoint
from tmbench.cli.screen import console, say


@with_checkpoint()
@with_attention(without=("starting_layer", "patterns", "dense_backend", "attn_native"))
def serving(
    output: Annotated[Path, typer.Option(help="The TOML file to write.", rich_help_panel=o.OUTPUT)],
    model: o.ModelOption = "tiny",
    checkpoint: Checkpoint = AS_IT_IS,
    attention: Attention = NO_ATTENTION,
    output_dir: o.OutputDirOption = o.RESULTS,
) -> None:
    """Write the file that says to a serving engine's plug-in which layers of a model have triangle attention.

    No weight is loaded. docs/sglang.md says what the plug-in serves.
    """
    from tmbench import __version__
    from tmbench.measure.spec import ModelSource
    from tmbench.methods.layers import layers_text
    from tmbench.methods.plan import default_layers
    from tmbench.models import loading
    from tmbench.results.files import writable, write_whole
    from tmbench.serving.settings import VARIABLE, Settings
    from tmbench.serving.sglang import NAME

    loading.check_has_tokenizer(model, "a serving engine")
    loaded = ModelSource(model, **checkpoint.given).load(plan_only=True)
    shape = loaded.shape
    chosen = next(iter(attention.once().deep_layers(loaded, (), output_dir)), default_layers(shape))
    settings = Settings(layers_text(chosen.layers, shape.layers), **attention.parameters)
    settings.chosen(shape.layers, shape.native)
    about = f"tmbench {__version__}: triangle attention in {model}, layers by this choice: {chosen.source}"
    with writable(output, "--output"):
        write_whole(output, settings.text(" ".join(about.split())))
    say(f"wrote {output}: layers {settings.layers}")
    console().print(
        f"{VARIABLE}={output} sglang serve --model-path {model} --prefill-attention-backend {NAME} "
        "--decode-attention-backend fa3",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
