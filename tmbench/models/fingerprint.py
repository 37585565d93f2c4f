"""Which contents a name stood for: hashes that rows and kept samples carry, so that nothing old is taken for something new.

A checkpoint is known by the bytes of the files that it is loaded from, before its weights are: the configs, the tokenizer
with its chat templates, and the weights. Other files, names of folders and times do not count, so a fresh copy is the same
model. Of synthetic weights the kind and the seed stand in place of the files of weights, and of the generation config.

Files count whole, but for weights that take more than ``WHOLE`` bytes together. Of a safetensors file of those its size and
its header count, and of every tensor ``BLOCKS`` evenly spaced blocks, its first and its last bytes among them: a change of
one tensor shows, though one of few numbers in its midst may not. Of a file of another format its size counts, as many
blocks as 512 tensors would have, and its end, where torch's format has a checksum of every tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

WHOLE = 2**29
BLOCKS, BLOCK = 8, 4096
OTHER_BLOCKS, END = 512 * BLOCKS, 2**20
DIGITS = 12
CONFIGS = ("config.json", "config.[0-9]*.json")
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer.[0-9]*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab*.json", "vocab*.txt", "merges*.txt", "*.model", "*.model.v[0-9]*", "*.spm", "*.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What tokenizers of transformers are read from, templates included."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Read too, where PEFT is installed."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The first of these that is there is loaded, and the files that an index names."""


def of_ids(ids: Iterable[int]) -> str:
    """A hash of token ids: what a kept sample knows its prompt by."""
    return _hex(hashlib.sha256(" ".join(map(str, ids)).encode()))


def of_preset(fields: Mapping[str, Any], drawn: str) -> str:
    """A hash of a config that weights are drawn for; ``drawn`` says how."""
    return _hex(hashlib.sha256(f"{drawn}\0{json.dumps(fields, sort_keys=True)}".encode()))


def of_file(path: Path, drawn: str = "") -> str:
    """A hash of a model that is one file, as ``of_folder`` has it of several; raises OSError."""
    return _hex(hashlib.sha256(f"{drawn}\0".encode() + _digest(path, whole=path.stat().st_size <= WHOLE)))


def of_changed(found: str, changes: Iterable[str]) -> str:
    """The hash of a model that was changed, of what it was and what was changed, in words."""
    return _hex(hashlib.sha256("\0".join([found, *changes]).encode()))


def of_folder(folder: Path, drawn: str = "") -> str:
    """A hash of the checkpoint in a folder.

    Args:
        drawn: how the weights are drawn, in words; "" for those of the checkpoint.

    Raises:
        OSError: a file cannot be read.
    """
    found = hashlib.sha256(drawn.encode())
    weights = [] if drawn else [name for name in weight_files(folder) if (folder / name).is_file()]
    large = sum((folder / name).stat().st_size for name in weights) > WHOLE
    for name in files_read(folder, weights=not drawn):
        sampled = large and name in weights and not name.endswith(".json")
        found.update(f"\0{name}\0".encode() + _digest(folder / name, whole=not sampled))
    return _hex(found)


def files_read(folder: Path, *, weights: bool = True) -> list[str]:
    """The files of a checkpoint that decide what it does, as paths in its folder; ``weights`` are the checkpoint's own."""
    patterns = (*CONFIGS, *TOKENIZER, *((GENERATION_CONFIG, *ADAPTER) if weights else ()))
    found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    found |= set(weight_files(folder) if weights else ())
    return sorted(name for name in found if (folder / name).is_file())


def snapshot(repository: str, commit: str) -> Path | None:
    """The folder in which a Hugging Face model's files are kept on this machine; None where they are not."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json", revision=commit or "main")
    return Path(config).parent if isinstance(config, str) else None


def weight_files(folder: Path) -> list[str]:
    """The files that transformers loads weights from."""
    named = _json(folder / "config.json").get("transformers_weights")
    for name in [named] if isinstance(named, str) else WEIGHTS:
        if (folder / name).is_file():
            shards = _json(folder / name).get("weight_map") if name.endswith(".index.json") else None
            return [name, *(sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else ())]
    return []


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, which whoever loads the checkpoint will say."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _digest(path: Path, *, whole: bool) -> bytes:
    with path.open("rb") as file:
        if whole:
            return hashlib.file_digest(file, "sha256").digest()
        size = path.stat().st_size
        found = hashlib.sha256(f"parts of {size}".encode())
        for begin, end in _parts(file, size):
            file.seek(begin)
            found.update(file.read(end - begin))
        return found.digest()


def _parts(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Where the bytes are that stand for a file of weights."""
    start = 8 + int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(start - 8)) if start < min(size, WHOLE) else {}
        tensors = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        spans = [(start + int(begin), start + int(end)) for begin, end in tensors]
    except (ValueError, LookupError, TypeError, AttributeError):
        spans = []
    if not spans:
        yield from _spaced(0, size, OTHER_BLOCKS)
        yield max(size - END, 0), size
        return
    yield 0, start
    for begin, end in spans:
        yield from _spaced(begin, end, BLOCKS)


def _spaced(begin: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """So many blocks of a span, its first and last bytes among them; all of a short one."""
    if end - begin <= count * BLOCK:
        yield begin, end
        return
    for number in range(count):
        at = begin + (end - begin - BLOCK) * number // (count - 1)
        yield at, at + BLOCK


def _hex(found: Any) -> str:
    return str(found.hexdigest()[:DIGITS])
