"""What a results folder holds as tables of pandas, for notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tmbench.report.records import FIGURES, records
from tmbench.report.report import build

if TYPE_CHECKING:
    import pandas as pd


def frame(root: Path | str, kind: str) -> pd.DataFrame:
    """The rows of one kind, such as "ttft", under a results folder, one a line, with the columns that the report's JSON has.

    Beside the columns of the row stand what follows from it: its label, what its time or its score is against dense's, the
    ends of the intervals, the words. Times are in seconds, scores from 0 to 100.

    Raises UserError where there are no rows, or a file is not ours, and ValueError for a kind that there is not.
    """
    import pandas as pd

    if kind not in FIGURES:
        raise ValueError(f"there are no rows of kind {kind!r}: choose from {', '.join(FIGURES)}")
    found = [record for section in build(Path(root)).sections for record in records(section)]
    return pd.DataFrame([record for record in found if record["kind"] == kind])
