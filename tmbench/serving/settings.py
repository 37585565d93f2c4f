"""The file that tells an engine's plug-in where triangle attention is, and of which shape."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from tmbench.errors import UserError, shortened
from tmbench.methods.layers import parse_layers
from tmbench_kernels.parameters import ParameterError
from tmbench_kernels.shared import LAST_N, N_INIT, N_LOCAL

if TYPE_CHECKING:
    from tmbench_kernels import Triangle

VARIABLE = "TMBENCH_SERVING"
"""The environment variable that names the file."""
SHAPE = {"n_init": N_INIT, "n_local": N_LOCAL, "last_n": LAST_N}


@dataclass(frozen=True)
class Settings:
    """Which layers of a model have triangle attention, and its shape. Raises UserError for what an engine cannot serve."""

    layers: str
    """As ``--layers`` takes a list: "16-" or "5,7,10-15"."""
    n_init: int = N_INIT.default
    n_local: int = N_LOCAL.default
    last_n: int = LAST_N.default

    def __post_init__(self) -> None:
        if not isinstance(self.layers, str):
            raise UserError(f'layers must be a text, such as "16-" or "5,7,10-15", not {shortened(str(self.layers))}')
        for name, declared in SHAPE.items():
            try:
                object.__setattr__(self, name, declared.value(name, getattr(self, name)))
            except ParameterError as error:
                raise UserError(str(error)) from error
        if not self.last_n:
            # Where decoding shares a batch with a prefill, a new token is a prompt's last row.
            raise UserError("last_n must be 1 or more: a token that is decoded in a prefill's batch sees all keys by it")
        if problem := self.pattern().useless():
            raise UserError(problem.format(n_init="n_init", n_local="n_local"))

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """What the file says that the environment names; raises UserError, naming it, where it says nothing of use."""
        place = environment.get(VARIABLE, "")
        if not place:
            raise UserError(f"{VARIABLE} names no file: set it to one that says which layers have triangle attention")
        try:
            return cls(**cls._known(tomllib.loads(Path(place).read_text(encoding="utf-8"))))
        except OSError as error:
            raise UserError(f"{VARIABLE}={place} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{VARIABLE}={place} is no TOML: {error}") from error
        except UserError as error:
            raise UserError(f"{VARIABLE}={place}: {error}") from error

    @classmethod
    def _known(cls, found: Mapping[str, Any]) -> Mapping[str, Any]:
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in found if name not in names]:
            raise UserError(f"{shortened(unknown[0])} is unknown: it may have {', '.join(names)}")
        if "layers" not in found:
            raise UserError('it has no layers: add a line such as layers = "16-"')
        return found

    def text(self, comment: str = "") -> str:
        """The file, with a line of comment before it."""
        return f"# {comment}\n" * bool(comment) + tomli_w.dumps(asdict(self))

    def pattern(self) -> Triangle:
        """The pattern of a whole prompt."""
        from tmbench_kernels import Triangle

        return Triangle(self.n_init, self.n_local, self.last_n)

    def chosen(self, count: int, native: Mapping[int, str]) -> tuple[int, ...]:
        """The layers, of a model with ``count``; ``native`` are those that triangle attention cannot be in, with the reason.

        Raises UserError where there are none, or others than the model has.
        """
        found = parse_layers(self.layers, count, native)
        if not found:
            raise UserError(f"layers {self.layers} are none of this model's: leave the plug-in out, or name some")
        return found
