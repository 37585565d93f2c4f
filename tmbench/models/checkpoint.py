"""What lies in a checkpoint folder, and one sentence for what cannot be loaded from it.

transformers, safetensors and tokenizers raise what they like for a damaged file, and some they pass over. The sentences
here name the file and the remedy where the fault can be seen, and pass on the library's own words where it cannot.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, __version__
from transformers.utils import logging

from tmbench.errors import UserError, shortened
from tmbench.models import fingerprint
from tmbench.models.gguf import SUFFIX
from tmbench.models.presets import preset_names
from tmbench.results.failures import is_out_of_memory

TINY = "tiny"
"""The name of the embedded model."""
POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS left in place of a large one."""
NAMES_SHOWN = 3
LARGEST_HEADER = 100_000_008
"""Bytes, of a safetensors file: what its format allows."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".model")
VOCABULARIES = ("tokenizer.json", "vocab*", "merges*.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json")
"""What a tokenizer's words are in; without any of them there is none, whatever its config says."""
RELEASE = f"transformers {__version__}"
NOT_RUN = "code of its own (auto_map), which tmbench does not run"
TRUST = "--trust-remote-code runs it"


def check_place(name: str, *, weights: bool, config: bool = True, trusted: bool = False) -> Path | None:
    """The folder that a model of this name is loaded from; None for an id of the Hub.

    Args:
        weights: whether the weights of the checkpoint are wanted, and not only its config and tokenizer.
        config: whether its config is.
        trusted: whether code that it brings may run.

    Raises:
        UserError: a path to no checkpoint folder, or to one with a file that cannot be what its name says.
    """
    path = Path(name).expanduser()
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
        found = [file.name for file in path.iterdir()] if is_folder else []
    except OSError as error:
        raise UserError(
            f"--model {shortened(name)} cannot be loaded: it cannot be looked into ({error.strerror}); check the path"
        ) from error
    if not name.strip():
        raise UserError("--model is empty: give tiny, a Hugging Face id or a checkpoint folder")
    if is_file:
        raise UserError(f"--model {name} is a file: give the folder of the checkpoint, {path.parent}")
    if not is_folder:
        if _looks_like_a_path(name):
            raise UserError(f"--model {shortened(name)} cannot be loaded: there is no such folder; check the path")
        return None
    if config:
        _check_config(name, path, found, trusted)
    _check_files(name, path, weights=weights)
    if weights:
        _check_weights(name, path, found)
    return path


def _looks_like_a_path(name: str) -> bool:
    """Whether a name cannot be an id of the Hub, which is one word or owner/name, or its owner is a folder here."""
    if name.startswith((".", "/", "~")) or name.endswith(FILES) or not HUB_ID.fullmatch(name):
        return True
    return Path(name).is_symlink() or ("/" in name and Path(name).parent.is_dir())


def _check_config(name: str, folder: Path, found: list[str], trusted: bool) -> None:
    if "config.json" not in found:
        if "adapter_config.json" in found:
            raise UserError(
                f"--model {name} is an adapter, not a whole model: merge it into its base model "
                "(peft: merge_and_unload, save_pretrained), and give that folder"
            )
        if files := sorted(file for file in found if file.endswith(SUFFIX)):
            raise UserError(f"--model {name} is no checkpoint but holds a GGUF file: add --gguf-file {files[0]}")
        raise UserError(
            f"--model {name} has no config.json, so it is no checkpoint: give the folder that save_pretrained wrote"
        )
    if fault := _file_fault(folder / "config.json"):
        raise UserError(f"--model {name} cannot be loaded: {fault}")
    config = json.loads((folder / "config.json").read_bytes())
    family = config.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        if "auto_map" in config and trusted:
            return
        if "auto_map" in config:
            raise UserError(f"--model {name} brings {NOT_RUN}: give a model whose family transformers has, or {TRUST}")
        if family is None:
            raise UserError(
                f"--model {name} cannot be loaded: its config.json has no model_type, which says its family: add it"
            )
        raise UserError(
            f"--model {name} cannot be loaded: {RELEASE} knows no model_type {family!r}, as its config.json has it; "
            "correct it, or install a newer transformers"
        )


def _check_files(name: str, folder: Path, *, weights: bool) -> None:
    """Raise UserError for a file that would be read and is a pointer, empty, no JSON, or a piece."""
    read = fingerprint.files_read(folder, weights=weights)
    for file in read:
        # A tokenizer's older form is not read beside its newer one.
        if file.endswith(".model") and "tokenizer.json" in read:
            continue
        if fault := _file_fault(folder / file):
            whose = "the tokenizer of " if any(Path(file).match(form) for form in fingerprint.TOKENIZER) else ""
            raise UserError(f"{whose}--model {name} cannot be loaded: {fault}")


def _check_weights(name: str, folder: Path, found: list[str]) -> None:
    files = fingerprint.weight_files(folder)
    if not files:
        if files := sorted(file for file in found if file.endswith(SUFFIX)):
            raise UserError(f"--model {name} holds its weights as a GGUF file: add --gguf-file {files[0]}")
        others = sorted(file for file in found if file.endswith((".safetensors", ".bin", ".pth", ".pt", ".h5", ".msgpack")))
        there = f"; {some(others)} {'are' if len(others) > 1 else 'is'} not what transformers loads" if others else ""
        raise UserError(
            f"--model {name} cannot be loaded: there are no weights in the folder (model.safetensors, or its index and "
            f"shards){there}: add them, or use --weights random"
        )
    if missing := [file for file in files if not (folder / file).is_file()]:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"--model {name} cannot be loaded: {len(missing)} of its shards {verb} missing: {some(missing)}; "
            "download the checkpoint again"
        )
    if "adapter_config.json" in found and find_spec("peft") is None:
        raise UserError(
            f"--model {name} holds an adapter beside its weights, which is not applied as peft is not installed: install "
            "it, or move adapter_config.json away to measure the model without it"
        )


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer's words could be in."""
    return any(path.is_file() for form in VOCABULARIES for path in folder.glob(form))


@contextmanager
def loading(name: str, what: str = "") -> Iterator[None]:
    """Turn whatever a library raises while it loads a checkpoint's part into one sentence, and keep its own reports back.

    Args:
        what: the part, as the sentence names it, such as "the tokenizer of "; "" for the model.
    """
    spoken = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            free = re.search(r"GPU \d+ has a total capacity of [^,]*? free(?=\.)", str(error))
            about = "" if free is None else f" ({free[0]})"
            more = ", or several GPUs by torchrun" if isinstance(error, torch.OutOfMemoryError) else ""
            raise UserError(f"{what}--model {name} does not fit in memory{about}: try a smaller --dtype{more}") from error
        raise UserError(f"{what}--model {name} {_why(name, error)}") from error
    finally:
        logging.set_verbosity(spoken)


def _why(name: str, error: Exception) -> str:
    """What became of loading, and what to do."""
    words = " ".join(str(error).split())
    if "custom code" in words or "trust_remote_code" in words:
        return f"brings {NOT_RUN}: give a model whose family and tokenizer transformers has, or {TRUST}"
    reason = first_sentence(error).rstrip(".")
    if name in (TINY, *preset_names()):
        return f"cannot be made: {reason}"
    if not Path(name).expanduser().is_dir():
        return (
            f"cannot be loaded: there is no folder of that name, and the Hub did not give it ({reason}); check the name, "
            "the network and your access, or give a folder"
        )
    return (
        f"cannot be loaded: {reason}; download it again, or use the release of transformers that it is for "
        f"(here {__version__})"
    )


def first_sentence(error: BaseException) -> str:
    """An error's own first sentence, with its type where it says nothing else."""
    text = " ".join(str(error).split())
    end = text.find(". ")
    sentence = text if end < 0 else text[: end + 1]
    return sentence if len(sentence) > 20 else f"{type(error).__name__}: {sentence}".rstrip(": ")


def _file_fault(path: Path) -> str:
    """What is wrong with one file, and what to do; "" where nothing shows."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(max(len(POINTER), 8))
        if head.startswith(POINTER):
            return f"{path.name} is a pointer of Git LFS, not the file itself: run git lfs pull, or download it"
        if size == 0 and path.suffix not in (".txt", ".jinja"):
            return f"{path.name} is empty: download it again"
        if path.suffix == ".json":
            return _json_fault(path)
        if path.suffix == ".safetensors" and tensor_shapes(path) is None:
            return f"{path.name} is damaged or incomplete: download it again"
        if path.suffix == ".jinja":
            path.read_text(encoding="utf-8")
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror or error}): check its permissions"
    except UnicodeDecodeError:
        return f"{path.name} is no text: download it again"
    return ""


def _json_fault(path: Path) -> str:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return f"{path.name} is not JSON: download it again"
    if not isinstance(content, dict):
        return f"{path.name} holds no JSON object, so it is no config: download it again"
    if path.name.endswith(".index.json"):
        shards = content.get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
            return f"{path.name} names no file for each weight (weight_map): download it again"
    return ""


def tensor_shapes(path: Path) -> dict[str, torch.Size] | None:
    """The tensors that a safetensors file holds, by its header; None where the file is not all that the header describes."""
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if start > min(size, LARGEST_HEADER) or start == 8:
                return None
            header = json.loads(file.read(start - 8))
        tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        shapes = {key: torch.Size(entry["shape"]) for key, entry in tensors.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return shapes if start + end == size else None


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
