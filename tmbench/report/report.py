"""All that a results folder holds, in sections of comparable rows: made from result files alone.

A speed-up never stands without a figure of what the method kept, or the words that none was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from tmbench.errors import UserError
from tmbench.report.agreement import AgreeSection, agree_section
from tmbench.report.comparable import comparable
from tmbench.report.intervals import MARGIN
from tmbench.report.lm_eval import LmEvalSection, lm_eval_section, place_of
from tmbench.report.loss import LossSection, loss_section
from tmbench.report.probe import ProbeSection, probe_section
from tmbench.report.ruler import RulerSection, ruler_section
from tmbench.report.served import with_served
from tmbench.report.settings import (
    AgreeSetting,
    LmEvalSetting,
    LossSetting,
    ProbeSetting,
    RulerSetting,
    TtftSetting,
    TuneSetting,
)
from tmbench.report.tradeoff import TradeOff, trade_offs
from tmbench.report.ttft import TtftSection, ttft_section
from tmbench.report.tune import TuneSection, tune_section
from tmbench.results.choices import choices_of
from tmbench.results.lm_eval_rows import LmEvalRow, document_likelihoods, document_scores
from tmbench.results.loss_samples import losses_of
from tmbench.results.rows import AgreeRow, LossRow, ProbeRow, Row, RulerRow, TtftRow
from tmbench.results.sample_scores import read_samples
from tmbench.results.suite_rows import SUITE_ROWS
from tmbench.results.tables import read_all
from tmbench.results.tune_rows import TuneRow

AnySection = TtftSection | RulerSection | LmEvalSection | AgreeSection | TradeOff | LossSection | ProbeSection | TuneSection
R = TypeVar("R", bound=Row)
Tell = Callable[[int, int], None]
"""Who is told how far something is: how much is done, and how much there is."""


def nobody(done: int, total: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Report:
    """Sections of each kind."""

    ttft: Sequence[TtftSection]
    ruler: Sequence[RulerSection]
    agree: Sequence[AgreeSection] = ()
    losses: Sequence[LossSection] = ()
    probes: Sequence[ProbeSection] = ()
    margin: float = MARGIN
    """The non-inferiority margin in points."""
    tunes: Sequence[TuneSection] = ()
    suites: Sequence[RulerSection] = ()
    """Scores of suites other than RULER, suite by suite. No time is held against these."""
    lm_eval: Sequence[LmEvalSection] = ()
    """Of tasks of lm-evaluation-harness."""

    @property
    def scores(self) -> list[RulerSection]:
        """Those of all suites, RULER's first."""
        return [*self.ruler, *self.suites]

    @cached_property
    def trade_offs(self) -> list[TradeOff]:
        """What both TTFT and RULER were measured of, at one length."""
        return trade_offs(self.ttft, self.ruler)

    @property
    def sections(self) -> list[AnySection]:
        """All sections, in the order in which they are shown."""
        accuracy: list[AnySection] = [*self.scores, *self.lm_eval, *self.agree]
        return [*self.ttft, *accuracy, *self.trade_offs, *self.losses, *self.probes, *self.tunes]


def build(root: Path, margin: float = MARGIN, tell: Tell = nobody) -> Report:
    """The report on all rows under a results folder; ``margin`` is the non-inferiority margin in points.

    ``tell`` is told how many of the rows are done, section by section, and how many there are. Raises
    UserError where there are no rows, or a file is not ours.
    """
    ttft, agree = _rows(root, TtftRow), _rows(root, AgreeRow)
    harness = _rows(root, LmEvalRow)
    losses, probes, tuned = _rows(root, LossRow), _rows(root, ProbeRow), _rows(root, TuneRow)
    kinds: tuple[type[RulerRow], ...] = (RulerRow, *SUITE_ROWS)
    asked = {kind: _rows(root, kind) for kind in kinds}
    total = len(ttft) + sum(map(len, asked.values())) + len(harness) + len(agree) + len(losses) + len(probes) + len(tuned)
    done = 0
    if not total:
        raise UserError(f"no results under {root}: run tmbench ttft or tmbench ruler first")

    def told(placed: Sequence[object]) -> None:
        nonlocal done
        done += len(placed)
        tell(done, total)

    scores: dict[type[RulerRow], list[RulerSection]] = {kind: [] for kind in asked}
    for kind, own in asked.items():
        for about, placed in comparable(own, RulerSetting.of):
            samples = {(one.label, one.row.task): read_samples(root, vars(one.row), kind.kind) for one in placed}
            scores[kind].append(ruler_section(about, placed, samples, margin))
            told(placed)
        scores[kind] = with_served(scores[kind])
    ruler, suites = scores.pop(RulerRow), [section for own in scores.values() for section in own]
    tasks = []
    for asked_so, given in comparable(harness, LmEvalSetting.of):
        scored = {(one.label, place_of(one.row)): document_scores(root, one.row) for one in given}
        likely = {(one.label, place_of(one.row)): document_likelihoods(root, one.row) for one in given}
        tasks.append(lm_eval_section(asked_so, given, scored, likely, margin))
        told(given)
    agreement = []
    for answered, found in comparable(agree, AgreeSetting.of):
        choices = {(one.label, one.row.length): choices_of(root, vars(one.row)) for one in found}
        agreement.append(agree_section(answered, found, choices, margin))
        told(found)
    times = with_served([ttft_section(setting, rows, ruler) for setting, rows in comparable(ttft, TtftSetting.of)])
    lost = []
    for setting, rows in comparable(losses, LossSetting.of):
        single = {(one.label, one.row.task, one.row.length): losses_of(root, one.row) for one in rows}
        lost.append(loss_section(setting, rows, single))
        told(rows)
    probed = [probe_section(setting, rows, lost) for setting, rows in comparable(probes, ProbeSetting.of)]
    tunes = [tune_section(setting, rows) for setting, rows in comparable(tuned, TuneSetting.of)]
    tell(total, total)
    return Report(times, ruler, with_served(agreement), with_served(lost), probed, margin, tunes, suites, tasks)


def _rows(root: Path, kind: type[R]) -> list[R]:
    return [row for row in read_all(root, kind) if isinstance(row, kind)]
