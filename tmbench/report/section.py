"""A section: cells of one setting, the tables made of them, and what must be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, Protocol, Self, TypeVar

from tmbench.methods.table import ATTN_NATIVE
from tmbench.report.comparable import parameters_text, task_of
from tmbench.report.settings import Setting
from tmbench.report.table import Table
from tmbench.results.rows import FAILED, OK, OUT_OF_MEMORY, AgreeRow, Row, TtftRow
from tmbench.results.words import counted, length_name

STATUS_WORDS = {OUT_OF_MEMORY: "out of memory", FAILED: "failed"}
FEW_SAMPLES = 20
R = TypeVar("R", bound=Row, covariant=True)
S = TypeVar("S", bound=Setting, covariant=True)


@dataclass(frozen=True)
class Cell(Generic[R]):
    """A row among those that it may be held against; what follows from these are its properties."""

    row: R
    label: str
    """The method, with the parameters that tell its variants here apart."""

    @property
    def figure(self) -> float | None:
        """The figure that is compared with dense's."""
        raise NotImplementedError

    @property
    def known(self) -> bool:
        """Whether the row came out well."""
        return self.row.status == OK and self.figure is not None

    @property
    def parameters(self) -> str:
        """What decides which pairs the method computes, in words."""
        return parameters_text(self.row)

    @property
    def place(self) -> str:
        """The task, or the length, in words."""
        return task_of(self.row) or length_name(self.row.length)


C = TypeVar("C", bound=Cell[Row], covariant=True)


class Part(Protocol):
    """What a report is made of: a heading, tables below it, and notes."""

    @property
    def title(self) -> str: ...

    def tables(self) -> list[Table]:
        """The tables, empty ones among them, which writers leave out."""

    def notes(self) -> list[str]:
        """What a reader must know before using the figures: sentences, only those that apply."""


@dataclass(frozen=True)
class Section(Generic[S, C]):
    """Cells that may be held against each other: they agree in ``setting`` and differ in method, length or task."""

    setting: S
    cells: Sequence[C]
    """Dense first."""
    served: Sequence[Self] = field(default=(), kw_only=True)
    """Of prompts in one piece: the same, fed in chunks or asked later."""

    @property
    def title(self) -> str:
        raise NotImplementedError

    def tables(self) -> list[Table]:
        raise NotImplementedError

    @property
    def labels(self) -> list[str]:
        """The methods, with the parameters that tell variants of one method apart."""
        return list(dict.fromkeys(cell.label for cell in self.cells))

    @cached_property
    def label_of(self) -> dict[tuple[str, str], str]:
        """The label of a method with these parameters; the first where several differ in dense attention's backend."""
        return {(cell.row.method, cell.parameters): cell.label for cell in reversed(self.cells)}

    def measured(self, label: str | None = None) -> list[C]:
        """The cells that came out well: of one label, shortest length or first task first, or of all."""
        return [cell for cell in self.cells if cell.known and label in (None, cell.label)]

    def notes(self) -> list[str]:
        edited = sum(cell.row.dirty for cell in self.cells)
        rows = f"{edited} of {counted(len(self.cells), 'row')} {'comes' if edited == 1 else 'come'}"
        notes = [f"{rows} from an edited checkout: {'its' if edited == 1 else 'their'} commit does not say what ran."]
        native = sorted({cell.row.backends for cell in self.cells if cell.row.method == ATTN_NATIVE and cell.row.backends})
        own = f"{ATTN_NATIVE} is dense attention by transformers' own backend, as the model loads ({' and '.join(native)})."
        return (
            notes[: bool(edited)]
            + [own] * bool(native)
            + [
                f"{cell.label} failed at {cell.place}: {cell.row.error or 'reason unknown'}."
                for cell in self.cells
                if cell.row.status == FAILED
            ]
        )


def file_notes(cells: Sequence[Cell[TtftRow | AgreeRow]]) -> list[str]:
    """Which file the prompts are from, where they are the user's own."""
    names = sorted({cell.row.prompt_file for cell in cells} - {""})
    return [f"The prompts are of the file {' and '.join(names)}; their name is a hash of its contents."] * bool(names)


def status_text(cell: Cell[Row]) -> str:
    """What stands in place of a figure that is not there."""
    return STATUS_WORDS.get(cell.row.status, "-")


def places_text(cells: Sequence[Cell[Row]], whole: Sequence[Cell[Row]]) -> str:
    """Methods and lengths of cells, in words."""
    if len(cells) == len(whole):
        return "all rows"
    lengths: dict[str, list[str]] = {}
    for cell in cells:
        lengths.setdefault(cell.label, []).append(length_name(cell.row.length))
    return "; ".join(f"{label} at {', '.join(names)}" for label, names in lengths.items())
