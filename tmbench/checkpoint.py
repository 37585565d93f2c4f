"""What lies in a checkpoint folder, and one sentence for what cannot be loaded from it.

transformers, safetensors and tokenizers raise what they like for a damaged file. The sentences here name the file and the
remedy where the fault can be seen, and pass on the library's own words where it cannot.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tmbench.errors import UserError

POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS left in place of a large one."""
WEIGHTS = ("*.safetensors", "*.bin")
NAMES_SHOWN = 3
LAYER = re.compile(r"(^|\.)(layers|h|blocks|block)\.\d+\.")
"""The name of a weight within a decoder layer."""


def check_place(name: str) -> None:
    """Raise UserError for a name that is a path but not a folder that transformers can read a checkpoint from."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            raise UserError(f"--model {name} is a GGUF file, which is not served: give a folder with its safetensors")
        raise UserError(f"--model {name} is a file: give the folder of the checkpoint, {path.parent}")
    if not path.is_dir():
        if _looks_like_a_path(name):
            raise UserError(f"--model {name} cannot be loaded: there is no such folder; check the path")
        return
    if (path / "config.json").exists():
        _check_config(name, path / "config.json")
        return
    if (path / "adapter_config.json").exists():
        raise UserError(
            f"--model {name} is an adapter, not a whole model: merge it into its base model "
            "(peft: merge_and_unload, save_pretrained), and give that folder"
        )
    if any(path.glob("*.gguf")):
        raise UserError(f"--model {name} holds a GGUF file, which is not served: give a folder with its safetensors")
    raise UserError(f"--model {name} has no config.json, so it is no checkpoint: give the folder that save_pretrained wrote")


def _looks_like_a_path(name: str) -> bool:
    """Whether a name cannot be an id of the Hub, which is one word or owner/name."""
    return name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1 or name.endswith(("/", ".json", ".gguf", ".bin"))


def _check_config(name: str, path: Path) -> None:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--model {name} cannot be loaded: {_file_fault(path) or f'{path} is not JSON'}") from error
    if not isinstance(config, dict):
        raise UserError(f"--model {name} cannot be loaded: {path} holds no JSON object, so it is no config")
    if "auto_map" in config and not _known_type(config.get("model_type")):
        raise UserError(
            f"--model {name} brings code of its own (auto_map in its config), which tmbench does not run: "
            "give a model whose family transformers has"
        )
    if "model_type" not in config:
        raise UserError(f"--model {name} cannot be loaded: {path} has no model_type, so its family is unknown: add it")


def _known_type(model_type: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


@contextmanager
def loading(name: str, what: str = "") -> Iterator[None]:
    """Turn whatever a library raises while it loads a checkpoint's part into one sentence.

    Args:
        what: the part, as the sentence names it, such as "the tokenizer of "; "" for the model.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"{what}--model {name} does not fit in memory: try a smaller --dtype") from error
    except Exception as error:
        reason = _folder_fault(Path(name).expanduser()) or first_sentence(error)
        raise UserError(f"{what}--model {name} cannot be loaded: {reason}") from error


def first_sentence(error: BaseException) -> str:
    """An error's own first sentence, with its type where it says nothing else."""
    text = " ".join(str(error).split())
    end = text.find(". ")
    sentence = text if end < 0 else text[: end + 1]
    return sentence if len(sentence) > 20 else f"{type(error).__name__}: {sentence}".rstrip(": ")


def _folder_fault(folder: Path) -> str:
    """What is wrong with the files of a folder, as far as it shows from outside; "" where nothing does."""
    if not folder.is_dir():
        return ""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja") and (fault := _file_fault(path)):
            return fault
    index = folder / "model.safetensors.index.json"
    if index.exists():
        missing = sorted({file for file in _index_files(index) if not (folder / file).exists()})
        if missing:
            return f"{len(missing)} of its shards are missing: {_some(missing)}; download them again"
    elif not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        return "there are no weights in the folder: add them, or use --weights random"
    return ""


def _index_files(index: Path) -> list[str]:
    try:
        return [str(file) for file in json.loads(index.read_bytes())["weight_map"].values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def _file_fault(path: Path) -> str:
    """What is wrong with one file; "" where nothing shows."""
    try:
        if not path.is_file():
            return ""
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(max(len(POINTER), 8))
            if head.startswith(POINTER):
                return f"{path.name} is a pointer of Git LFS, not the file itself: run git lfs pull, or download it"
            if size == 0:
                return f"{path.name} is empty: download it again"
            if path.suffix == ".safetensors":
                return _tensors_fault(path, head, size)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror or error}): check its permissions"
    return ""


def _tensors_fault(path: Path, head: bytes, size: int) -> str:
    """A safetensors file whose header does not describe it, as one is that a download left unfinished."""
    damaged = f"{path.name} is damaged or incomplete: download it again"
    header = int.from_bytes(head[:8], "little")
    if len(head) < 8 or header > size - 8:
        return damaged
    try:
        with path.open("rb") as file:
            file.seek(8)
            tensors = json.loads(file.read(header))
        end = max((entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return damaged
    return "" if 8 + header + end == size else damaged


def check_loaded(name: str, info: Any) -> None:
    """Raise UserError where a checkpoint lacks weights of the model, or has some of its layers that the config has not.

    ``info`` is what ``from_pretrained(..., output_loading_info=True)`` returns.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"--model {name} lacks {_count(missing, 'weight')} of the model, which would be drawn at random: "
            f"{_some(missing)}; complete the checkpoint, or use --weights random"
        )
    if mismatched := sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"]):
        raise UserError(
            f"--model {name} has {_count(mismatched, 'weight')} of another shape than its config says: {_some(mismatched)}; "
            "give the config that belongs to the weights"
        )
    unused = sorted(key for key in info["unexpected_keys"] if LAYER.search(key))
    if unused:
        raise UserError(
            f"--model {name} has {_count(unused, 'weight')} of decoder layers that its config does not know: "
            f"{_some(unused)}; give the config that belongs to the weights"
        )


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) != 1)}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
