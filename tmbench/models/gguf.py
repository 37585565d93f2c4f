"""GGUF files, which transformers' own reader turns into a model of ordinary weights.

Such a file is config, tokenizer and weights in one. A model's name is its path, or "owner/name/file.gguf" for a file of a
Hugging Face repository.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tmbench.errors import UserError, shortened

SUFFIX = ".gguf"
MAGIC = b"GGUF"
PACKAGES = ("gguf", "accelerate")
"""What transformers' reader needs."""


@dataclass(frozen=True)
class GgufFile:
    """Where a file is: in a folder, or in a repository of the Hub."""

    place: str
    file: str
    local: bool

    @classmethod
    def of(cls, name: str) -> GgufFile | None:
        """The file that a model's name stands for; None for a model that is not one file."""
        if not name.endswith(SUFFIX):
            return None
        path = Path(name).expanduser()
        owner, _, rest = name.partition("/")
        repository, _, file = rest.partition("/")
        if file and not path.parent.is_dir() and not name.startswith((".", "/", "~")):
            return cls(f"{owner}/{repository}", file, local=False)
        return cls(str(path.parent), path.name, local=True)

    def path(self, revision: str) -> Path | None:
        """The file on this machine, at a commit or the newest; None where it is not here."""
        from huggingface_hub import try_to_load_from_cache

        if self.local:
            return Path(self.place) / self.file
        kept = try_to_load_from_cache(self.place, self.file, revision=revision or "main")
        return Path(kept) if isinstance(kept, str) else None

    def commit(self, revision: str) -> str:
        """The commit that a revision of the Hub stands for, by where the file lies on this machine; "" for a local file."""
        kept = None if self.local else self.path(revision)
        return "" if kept is None else kept.parents[len(Path(self.file).parts) - 1].name

    def check(self, name: str) -> None:
        """Raise UserError for a file that is not there or no GGUF file, and where it cannot be read here."""
        if missing := [package for package in PACKAGES if find_spec(package) is None]:
            raise UserError(
                f"--model {name} is a GGUF file, which is read by {' and '.join(PACKAGES)}, and {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not installed: pip install 'tmbench[gguf]'"
            )
        if not self.local:
            return
        try:
            with (Path(self.place) / self.file).open("rb") as file:
                head = file.read(len(MAGIC))
        except OSError as error:
            raise UserError(f"--model {shortened(name)} cannot be loaded: {error.strerror}; check the path") from error
        if head != MAGIC:
            raise UserError(f"--model {name} is no GGUF file, whatever its name: download it again")


def joined(name: str, file: str | None) -> str:
    """A model's name with the ``--gguf-file`` in it; raises UserError for what is no such file."""
    if file is None:
        return name
    if name.endswith(SUFFIX):
        raise UserError(
            f"--gguf-file {file} is in the folder or repository of --model, and {name} is a file itself: leave it out"
        )
    if not file.endswith(SUFFIX):
        raise UserError(f"--gguf-file {shortened(file)} is not the name of a GGUF file, which ends in {SUFFIX}")
    return f"{name.rstrip('/')}/{file}"


def read_options(file: str) -> dict[str, Any]:
    """What ``from_pretrained`` is told to make ordinary weights of a file."""
    try:
        from transformers import GgufConfig
    except ImportError:
        # Older releases make nothing else of it.
        return {"gguf_file": file}
    return {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}


def types_of(path: Path) -> str:
    """How a file holds its matrices, in words: the types by their share of the weights, such as "gguf Q4_K+Q6_K"."""
    from gguf import GGUFReader

    found: Counter[str] = Counter()
    for tensor in GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            found[tensor.tensor_type.name] += int(tensor.n_elements)
    return f"gguf {'+'.join(name for name, _ in found.most_common())}"
