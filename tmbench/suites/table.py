"""The table of suites."""

from __future__ import annotations

from collections.abc import Mapping

from tmbench.suites.ruler import Ruler
from tmbench.suites.suite import Suite

SUITES: Mapping[str, type[Suite]] = {suite.name: suite for suite in (Ruler,)}
"""Every suite by its name."""
