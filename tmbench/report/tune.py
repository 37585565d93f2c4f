"""A search for layers: which sets were tried, which was chosen, and whether it saves more than other choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tmbench.methods.table import LAYERS
from tmbench.report.comparable import Placed
from tmbench.report.section import FEW_SAMPLES, Cell, Section, status_text
from tmbench.report.settings import TuneSetting, machine_words, prefill_words
from tmbench.report.table import Table, columns
from tmbench.report.words import NOTHING, figure_text, interval_text, percent_text, signed
from tmbench.results.rows import OK
from tmbench.results.tune_rows import CHECK, COMPARISON, HELD_OUT, SEARCH, STAGES, TuneRow
from tmbench.results.words import counted, length_name

DECIMALS = 4
REFUSED = "refused"
RANDOM = "random, "
"""How the rules of sets that were drawn at random begin."""
BASES = {"roofline": "the roofline", "ttft rows": "measured times to first token"}
CAPTIONS = {
    SEARCH: "The search. Its trials may err, and nothing rests on them",
    CHECK: "The check, on prompts that the search did not read, the largest set first",
    COMPARISON: "The chosen set and others, on the same prompts, which neither search nor check read",
    HELD_OUT: "The same sets on {place}, which neither search nor check read",
}


@dataclass(frozen=True)
class TuneCell(Cell[TuneRow]):
    """One trial."""

    @property
    def figure(self) -> float | None:
        return self.row.capped_vs_dense

    @property
    def layers(self) -> str:
        """The deep layers, as ``--layers`` takes them."""
        return str(self.row.settings.get(LAYERS, ""))

    @property
    def place(self) -> str:
        return place_of(self.row)

    @property
    def difference(self) -> str:
        """The mean capped difference with its interval."""
        mean, low, high = self.row.capped_vs_dense, self.row.capped_low_vs_dense, self.row.capped_high_vs_dense
        if mean is None or low is None or high is None:
            return status_text(self)
        return interval_text(mean, low, high, DECIMALS)

    @property
    def time(self) -> str:
        """How much more or less a prefill takes than dense attention's."""
        return figure_text(self.row.time_vs_dense, lambda share: percent_text(100 * share))

    @property
    def within(self) -> bool:
        """Whether the mean capped difference is no more than the margin, as it was measured."""
        mean = self.row.capped_vs_dense
        return mean is not None and mean <= self.row.margin

    @property
    def is_random(self) -> bool:
        return self.row.rule.startswith(RANDOM)


@dataclass(frozen=True)
class TuneSection(Section[TuneSetting, TuneCell]):
    """One search, its check, and what the chosen set was compared with."""

    @property
    def title(self) -> str:
        about, row = self.setting, self.cells[0].row
        machine = f"{prefill_words(about.prefill)}{machine_words(about.threads)}seed {about.seed}"
        limits = f"margin {row.margin:g} nats, cap {row.cap:g}, {100 * row.confidence:g} % confidence"
        return f"Layers by measurement: {about.subject}, {about.method} on {place_of(row)}, {limits}, {machine}"

    def stage(self, name: str) -> list[TuneCell]:
        """The trials of a stage in their order."""
        return sorted((cell for cell in self.cells if cell.row.stage == name), key=lambda cell: cell.row.trial)

    @cached_property
    def chosen(self) -> TuneCell | None:
        """The trial of the check that accepted a set."""
        return next((cell for cell in self.stage(CHECK) if cell.row.chosen), None)

    def tables(self) -> list[Table]:
        """One for each stage."""
        return [self._table(name) for name in STAGES]

    def _table(self, stage: str) -> Table:
        lines = []
        for cell in self.stage(stage):
            row = cell.row
            losses = [figure_text(value, f".{DECIMALS}f") for value in (row.nll_answer_dense, row.nll_answer)]
            plain = figure_text(row.nll_answer_vs_dense, lambda value: signed(value, DECIMALS))
            share = figure_text(row.capped_share, ".0%")
            rule = [row.rule] if stage != SEARCH else []
            told = [*losses, plain, cell.difference, share, str(row.samples), row.verdict or NOTHING, cell.time]
            lines.append([str(row.trial), *rule, cell.layers, *told])
        rule = ["set"] if stage != SEARCH else []
        names = [
            "trial", *rule, "layers", "dense", "loss", "difference", "capped difference", "at cap", "prompts", "in words",
            "time",
        ]  # fmt: skip
        place = next((cell.place for cell in self.stage(stage)), "other prompts")
        caption = f"{CAPTIONS[stage].format(place=place)}. Losses in nats per token, time against dense's:"
        return Table(caption, columns(*names, texts=("set", "layers", "in words")), lines)

    def conclusions(self) -> list[str]:
        """What was tried, what was chosen, and whether it saves more than others do: a sentence each."""
        search, check = self.stage(SEARCH), self.stage(CHECK)
        last = max((*search, *check, *self.cells[:1]), key=lambda cell: cell.row.prefills).row
        sets = counted(len(search), "set")
        found = [
            f"{sets} of layers tried in the order of {last.order}, {counted(len(check), 'set')} checked, with "
            f"{counted(last.prefills, 'prefill')} in {last.measured_s:.0f} s."
        ]
        if self.chosen is None:
            why = "the search accepted none" if not check else "the check accepted none"
            return [*found, f"No set of layers was chosen: {why} under this margin and budget."]
        row = self.chosen.row
        found.append(
            f"Chosen: layers {self.chosen.layers}. With {100 * row.confidence:g} % confidence the mean capped difference to "
            f"dense attention is below {row.margin:g} nats per token of the answer. A prefill's time is {self.chosen.time} "
            f"against dense attention's, by {BASES.get(row.time_from, row.time_from)}."
        )
        return [*found, *(words for stage in (COMPARISON, HELD_OUT) for words in self._compared(stage))]

    def _compared(self, stage: str) -> list[str]:
        """How the chosen set stands among the others of a stage."""
        cells = [cell for cell in self.stage(stage) if cell.row.time_vs_dense is not None and cell.figure is not None]
        own = next((cell for cell in cells if cell.row.chosen), None)
        if own is None or len(cells) < 2:
            return []
        where = f"On {own.place}, which was held out, over" if stage == HELD_OUT else "Over"
        prompts = f"{where} the same {counted(own.row.samples, 'prompt')}"
        others = [cell for cell in cells if cell is not own]
        _, _, same = own.row.rule.partition("; ")
        good = sorted((cell for cell in others if cell.within), key=_time)
        by = f"by {BASES.get(own.row.time_from, own.row.time_from)}"
        stays = "stays within" if own.within else "is above"
        found = [
            f"{prompts} the chosen set {stays} the margin as measured ({signed(own.figure or 0.0, DECIMALS)}); of "
            f"{counted(len(others), 'other choice')} {len(good)} stay within it, and "
            f"{sum(cell.row.verdict == REFUSED for cell in others)} are surely above it."
        ]
        if same:
            found.append(f"The same layers are those of: {same}.")
        if own.within and not good:
            found.append(
                f"It saves more than any of them at that loss: {own.time} of the time, {by}, and the others lose more."
            )
        elif own.within:
            best = good[0]
            apart = round(_time(own) - _time(best), 6)
            word = "more than" if apart < 0 else "as much as" if apart == 0 else "less than"
            found.append(
                f"At that loss it saves {word} the fastest of them, {best.row.rule} (layers {best.layers}): {own.time} of "
                f"the time against {best.time}, {by}."
            )
        if drawn := [cell for cell in others if cell.is_random]:
            as_good = sum((cell.figure or 0.0) <= (own.figure or 0.0) for cell in drawn)
            found.append(
                f"Of {counted(len(drawn), 'random set')} of its size {sum(cell.within for cell in drawn)} stay within the "
                f"margin, and {as_good} lose no more than it does."
            )
        return found

    def notes(self) -> list[str]:
        few = min((cell.row.samples for cell in (*self.stage(COMPARISON), *self.stage(HELD_OUT))), default=FEW_SAMPLES)
        notes = {
            f"The weights are {self.setting.weights}: the choice says nothing about a trained model.": (
                self.setting.weights != "checkpoint"
            ),
            f"Compared on {counted(few, 'prompt')} only: as fewer than {FEW_SAMPLES} say little, so does the place among "
            "others.": few < FEW_SAMPLES,
        }
        return [*self.conclusions(), *(note for note, applies in notes.items() if applies), *super().notes()]


def place_of(row: TuneRow) -> str:
    """The tasks and lengths of a row, in words."""
    return f"{row.task} at {' and '.join(map(length_name, row.stretches))}"


def _time(cell: TuneCell) -> float:
    assert cell.row.time_vs_dense is not None
    return cell.row.time_vs_dense


def tune_section(setting: TuneSetting, placed: Sequence[Placed[TuneRow]]) -> TuneSection:
    """The section of the rows of one search."""
    cells = [TuneCell(one.row, one.label) for one in placed]
    return TuneSection(setting, sorted(cells, key=lambda cell: (STAGES.index(cell.row.stage), cell.row.trial)))


def shows(section: TuneSection) -> bool:
    """Whether a picture has something to show."""
    return any(cell.row.status == OK for cell in section.stage(SEARCH))
