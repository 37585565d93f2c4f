"""The table of suites."""

from __future__ import annotations

from collections.abc import Mapping

from tmbench.suites.aggregation import Aggregation
from tmbench.suites.drawn import DrawnSuite
from tmbench.suites.graphwalks import GraphWalks
from tmbench.suites.ruler import Ruler
from tmbench.suites.rulerv2 import RulerV2
from tmbench.suites.suite import Suite

DRAWN: Mapping[str, type[DrawnSuite]] = {suite.name: suite for suite in (GraphWalks, RulerV2, Aggregation)}
"""Those of ``tmbench suite`` by name."""
SUITES: Mapping[str, type[Suite]] = {Ruler.name: Ruler, **DRAWN}
"""Every suite by its name."""
