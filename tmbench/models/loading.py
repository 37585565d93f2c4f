"""Models by name: the embedded ``tiny``, a preset, a Hugging Face id, or a checkpoint folder.

With the weights of the checkpoint, with random ones, or with structured ones (see ``tmbench.models.structured``). A preset
has no checkpoint, and a folder of its name comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from tmbench.errors import UserError, shortened
from tmbench.methods.layer_kinds import CONVOLUTION, LINEAR, kind_words, layer_kinds
from tmbench.models import fingerprint, parallel, sharding, structured
from tmbench.models.checkpoint import NOT_RUN, TINY, TRUST, check_place, has_vocabulary, loading
from tmbench.models.context import check_split, split_prompts
from tmbench.models.devices import AUTO, check_device, check_dtype, default_device, saved_dtype
from tmbench.models.gguf import GgufFile, joined, read_options, types_of
from tmbench.models.loaded import LoadedModel as LoadedModel
from tmbench.models.loaded import Weights as Weights
from tmbench.models.own_code import code_hash
from tmbench.models.presets import preset_names, read_preset
from tmbench.models.quantization import prepare
from tmbench.models.rope_scaling import RopeScaling
from tmbench.models.weights import check_loaded, check_planned
from tmbench.results.files import readable

RANDOM_SEED = 0
KERNELS = {"flash-linear-attention": "fla", "mamba-ssm": "mamba_ssm", "causal-conv1d": "causal_conv1d"}
"""Packages whose kernels transformers takes for linear and recurrent layers and convolutions, and the modules they bring."""


@dataclass(frozen=True)
class Reading:
    """How transformers is to read a checkpoint."""

    revision: str | None = None
    trusted: bool = False
    """Whether code that it brings may run."""
    gguf_file: str | None = None
    """The one file that it is."""

    @property
    def options(self) -> dict[str, Any]:
        """As ``from_pretrained`` takes it, of configs and tokenizers."""
        given = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {"trust_remote_code": self.trusted, **{name: value for name, value in given.items() if value is not None}}

    @property
    def weight_options(self) -> dict[str, Any]:
        """The same of weights."""
        return self.options | ({} if self.gguf_file is None else read_options(self.gguf_file))

    def brings(self, family: Any, config: Any) -> bool:
        """Whether a checkpoint's own code is to stand for this class."""
        return self.trusted and family.__name__ in (getattr(config, "auto_map", None) or {})


AS_IT_IS = Reading()


def model_path(name: str) -> str:
    """Where a model of this name is loaded from: the package's folder for ``tiny``, that of a file, or the name itself."""
    if name == TINY:
        return str(Path(__file__).parent / TINY)
    if (gguf := GgufFile.of(name)) is not None:
        return gguf.place
    return str(Path(name).expanduser()) if name.startswith("~") else name


def load(
    name: str = TINY,
    *,
    weights: Weights = "checkpoint",
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    rope_scaling: str | None = None,
    quantization: str | None = None,
    context_parallel: bool = False,
    plan_only: bool = False,
) -> LoadedModel:
    """Load a model for measuring, in evaluation mode on one device; with ``plan_only`` its geometry, and no weights.

    ``revision`` is a branch, tag or commit of a Hugging Face id, and ``dtype`` may be "auto", the type that the config says.
    ``trust_remote_code`` lets code run that the checkpoint brings; ``gguf_file`` is a file in the folder of the name; and
    ``rope_scaling`` is read by ``tmbench.models.rope_scaling``. ``quantization`` is for a plan of what is loaded elsewhere,
    and says how weights are held there.

    Where several ranks share the model, all of them call this, and each holds its part alone on a device of its own; with
    ``context_parallel`` the whole, and prompts are split instead.

    Raises UserError where the name is no checkpoint that can be reached, the device is absent or the type unknown, for the
    weights of a preset, for a family that structured weights are not made for, for rotary embeddings that cannot be scaled,
    for quantised weights that cannot be loaded here, and for what the ranks cannot split.
    """
    name = joined(name, gguf_file)
    gguf = GgufFile.of(name)
    preset = is_preset(name)
    if preset and weights == "checkpoint":
        fields = read_preset(name)
        kinds = "--weights random" + " or --weights structured" * (fields["model_type"] in structured.FAMILIES)
        raise UserError(
            f"--model {name} is a preset, a config without weights: add {kinds}, or give the real checkpoint, "
            f"{fields['_name_or_path']} or a folder"
        )
    _check_revision(name, revision)
    reading = Reading(revision, trust_remote_code, None if gguf is None else gguf.file)
    scaling = None if rope_scaling is None else RopeScaling.parse(rope_scaling)
    place = parallel.device(check_device(device or default_device()))
    kind = check_dtype(None if dtype == AUTO else dtype, place)
    path = model_path(name)
    disable_progress_bar()
    if gguf is not None:
        gguf.check(name)
    elif not preset:
        check_place(path if name == TINY else name, weights=weights == "checkpoint", trusted=trust_remote_code)
    with loading(name):
        config = load_config(name, reading)
        family = _family(name, config, reading)
        commit = _commit(name, config, revision)
        kind = saved_dtype(name, config) if dtype == AUTO else kind
        if scaling is not None:
            scaling = scaling.apply(name, config)
        if weights == "structured":
            structured.check_family(config)
        if context_parallel:
            check_split(name, _drawn(family, config, torch.device("meta"), kind, reading))
        held = "" if weights != "checkpoint" else quantization
        if held is None:
            held = prepare(name, config, place, kind) if gguf is None else _types(gguf, commit)
        split = parallel.size() > 1 and not context_parallel
        if split and held:
            raise UserError(
                f"--model {name} has quantised weights ({held}), which are not split over GPUs: leave torchrun out"
            )
        if plan_only:
            model = _drawn(family, config, torch.device("meta"), kind, reading)
            folder = None if gguf is not None else _folder(name, commit)
            if weights == "checkpoint" and folder is not None and fingerprint.weight_files(folder):
                check_planned(name, model, folder)
        elif split:
            model = _split(name, family, config, weights, _folder(name, commit), place, kind, reading)
        elif weights != "checkpoint":
            model = _drawn(family, config, place, kind, reading)
        else:
            # Quantised weights are made for a device, and do not move.
            at = {"device_map": {"": str(place)}} if held and place.type != "cpu" else {}
            model, info = family.from_pretrained(
                path,
                config=config,
                dtype=kind,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **reading.weight_options,
                **at,
            )
            check_loaded(name, model, info)
            model = model if at else model.to(place)
        if weights == "structured" and not plan_only and not split:
            structured.fill(model, RANDOM_SEED)
        if scaling is not None:
            scaling.check_heeded(name, model)
    model.eval()
    if context_parallel:
        split_prompts(model)
    tokenizer = None if preset else _tokenizer(name, required=weights == "checkpoint", reading=reading)
    code = code_hash(model, config, *([] if tokenizer is None else [tokenizer]))
    changes = ([] if scaling is None else [str(scaling)]) + [f"code {code}"] * bool(code)
    return LoadedModel(
        name=name.rstrip("/"),
        model=model,
        tokenizer=tokenizer,
        weights=weights,
        revision=commit,
        model_hash=content_hash(name, weights, commit, changes),
        planned_for=place if plan_only else None,
        tensor_parallel_size=parallel.size() if split else 1,
        context_parallel_size=parallel.size() if context_parallel else 1,
        rope_scaling="" if scaling is None else str(scaling),
        remote_code=bool(code),
        quantization=held,
        notes=tuple(filter(None, (_code_note(name, config, code), kernels_note(name, config, place)))),
    )


def _types(gguf: GgufFile, commit: str) -> str:
    """How a GGUF file holds its weights, and that they become ordinary ones."""
    file = gguf.path(commit)
    assert file is not None, "its config was read from it"
    return f"{types_of(file)}, dequantized"


def _commit(name: str, config: Any, revision: str | None) -> str:
    """The commit of a Hub checkpoint; "" for what is none."""
    if is_preset(name) or Path(model_path(name)).is_dir():
        return ""
    if (gguf := GgufFile.of(name)) is not None:
        return gguf.commit(revision or "")
    known = getattr(config, "_commit_hash", None)
    kept = None if known else fingerprint.snapshot(model_path(name), revision or "")
    return str(known or (kept.name if kept is not None else ""))


def _check_revision(name: str, revision: str | None) -> None:
    if revision is None:
        return
    here = "the embedded model" if name == TINY else "a preset" if is_preset(name) else ""
    if Path(model_path(name)).is_dir():
        here = here or ("a folder" if GgufFile.of(name) is None else "a file of this machine")
    if here:
        raise UserError(
            f"--revision {shortened(revision)} is of a Hugging Face id, but --model {name} is {here}: leave it out"
        )


def _code_note(name: str, config: Any, code: str) -> str:
    if not hasattr(config, "auto_map") or code:
        return ""
    return f"{name} brings {NOT_RUN}: its family is transformers' own, and {TRUST}"


def kernels_note(name: str, config: Any, device: torch.device) -> str:
    """A sentence where layers that stay the model's own run on a GPU without the kernels that are made for them, or ""."""
    own = [kind for kind in layer_kinds(config) if kind in (LINEAR, CONVOLUTION)]
    missing = [package for package, module in KERNELS.items() if find_spec(module) is None]
    if not own or not missing or device.type != "cuda":
        return ""
    return (
        f"{name} has layers of {kind_words(own)}, which transformers computes by reference code where {', '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} missing, as here: it is right, but slow"
    )


def load_tokenizer(name: str, reading: Reading = AS_IT_IS) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone; raises UserError where there is none."""
    check_has_tokenizer(name, "counting tokens")
    if (gguf := GgufFile.of(name)) is not None:
        gguf.check(name)
        reading = replace(reading, gguf_file=gguf.file)
    else:
        check_place(model_path(name), weights=False, config=False)
    tokenizer = _tokenizer(name, required=True, reading=reading)
    assert tokenizer is not None
    return tokenizer


def is_preset(name: str) -> bool:
    """Whether this name stands for a preset's config."""
    return name in preset_names() and not Path(name).is_dir()


def check_has_tokenizer(name: str, wish: str) -> None:
    """Raise UserError for a preset, which has no tokenizer; whether another model has one shows when it is loaded."""
    if is_preset(name):
        raise UserError(
            f"--model {name} is a preset, a config without a tokenizer, which {wish} needs: give the real checkpoint, "
            f"{read_preset(name)['_name_or_path']} or a folder"
        )


def load_config(name: str, reading: Reading = AS_IT_IS) -> Any:
    """The config of a model of this name; a preset's is named after the model that it was published for."""
    if not is_preset(name):
        return AutoConfig.from_pretrained(model_path(name), **reading.options)
    fields = read_preset(name)
    config = AutoConfig.for_model(**fields)
    config._name_or_path = fields["_name_or_path"]
    return config


def content_hash(name: str, weights: Weights, revision: str = "", changes: Sequence[str] = ()) -> str:
    """A hash of what a model of this name is made from, config, tokenizer and weights: see ``tmbench.models.fingerprint``.

    Nothing is loaded for it. Of a Hub checkpoint it covers the files that are on this machine, at a commit or the newest.
    ``changes`` are what options have changed of that, in words.
    """
    drawn = "" if weights == "checkpoint" else f"{weights} weights, seed {RANDOM_SEED}"
    if is_preset(name):
        found = fingerprint.of_preset(read_preset(name), drawn)
    elif gguf := GgufFile.of(name):
        file = gguf.path(revision)
        assert file is not None, "it was loaded"
        with readable(file):
            found = fingerprint.of_file(file, drawn)
    elif folder := _folder(name, revision):
        with readable(folder):
            found = fingerprint.of_folder(folder, drawn)
    else:
        return ""
    return fingerprint.of_changed(found, changes) if changes else found


def _folder(name: str, revision: str) -> Path | None:
    """Where the files of a model of this name are on this machine; None where they are not."""
    place = Path(model_path(name))
    return place if place.is_dir() else fingerprint.snapshot(name, revision)


def _family(name: str, config: Any, reading: Reading) -> Any:
    """The class that builds a model of this config: a decoder, or one that reads images too, of which the text is used."""
    for family in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in family._model_mapping or reading.brings(family, config):
            return family
    raise UserError(
        f"--model {name} is of the family {config.model_type}, for which transformers has no model that continues a text: "
        "give a decoder-only model"
    )


def _drawn(family: Any, config: Any, device: torch.device, dtype: torch.dtype, reading: Reading) -> Any:
    """The checkpoint's exact geometry with random weights, made on the device itself; none on the meta device."""
    at = {"code_revision": reading.revision} if reading.revision and reading.brings(family, config) else {}
    torch.manual_seed(RANDOM_SEED)
    with device:
        return family.from_config(config, dtype=dtype, trust_remote_code=reading.trusted, **at)


def _split(
    name: str,
    family: Any,
    config: Any,
    weights: Weights,
    folder: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    reading: Reading,
) -> Any:
    """The part of the model that this rank has, with the weights that the model would have on one device."""
    model = _drawn(family, config, torch.device("meta"), dtype, reading)
    plan = sharding.plan_of(name, model, parallel.size())
    if weights == "checkpoint":
        if folder is not None and fingerprint.weight_files(folder):
            check_planned(name, model, folder)
        sharding.read(name, model, plan, folder, device)
    elif weights == "random":
        sharding.draw(model, plan, device, RANDOM_SEED)
    else:
        begin = partial(sharding.make_real, model, device=device)
        structured.fill(model, RANDOM_SEED, begin, end=partial(sharding.split, model, plan))
        model.tie_weights()
    return model


def _tokenizer(name: str, *, required: bool, reading: Reading) -> PreTrainedTokenizerBase | None:
    path = model_path(name)
    if reading.gguf_file is None and Path(path).is_dir() and not has_vocabulary(Path(path)):
        if required:
            raise UserError(f"--model {name} has no tokenizer files: add them, or use --weights random --prompt random")
        return None
    try:
        with loading(name, "the tokenizer of "):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **reading.options)
            # Of files that it does not know transformers makes an empty one, which turns any text into nothing.
            if not tokenizer("A text of 12 words.", add_special_tokens=False)["input_ids"]:
                raise ValueError("it knows no word")
    except UserError:
        # Of an id of the Hub it cannot be told whether there is none.
        if required or Path(path).is_dir():
            raise
        return None
    # Prompts longer than a tokenizer's own limit are the point here; it would only print a warning.
    tokenizer.model_max_length = 10**9
    return tokenizer
