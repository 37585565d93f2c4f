"""A thousand rows are reported in a second or two: what is read is read once, and no comparison is made twice."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter

import pytest

import made_rows
from ruler_tasks import TASKS
from tmbench.methods.table import METHODS
from tmbench.report.report import build
from tmbench.report.writers import report_csv, report_json, report_markdown
from tmbench.results import sample_scores
from tmbench.results.rows import RulerRow, TtftRow
from tmbench.results.tables import append

LENGTHS = [2048 * 2**place for place in range(6)]
NAMES = list(METHODS)[:11]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """858 scores of 20 samples each, and 143 times."""
    root = tmp_path_factory.mktemp("thousand")
    for number, method in enumerate(NAMES):
        scores, times = [], []
        for length in LENGTHS:
            for task in TASKS:
                name = f"predictions/{method}/{task}-{length}.jsonl"
                path = root / "some-gpu" / "ruler" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                right = 20 - (task in ("vt", "cwe") and number in (1, 2))
                lines = ({"index": at, "score": float(at < right), "outputs": [f"{task} {at}"]} for at in range(20))
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
                about = {"length": length, "task": task, "samples": 20, "score": 5.0 * right, "predictions": name}
                about |= {"wording": "own", "wording_hash": "f00d", "source": "noise", "chat_template": False}
                scores.append(RulerRow(**made_rows.COMMON, method=method, **about))
        for place in range(1, 14):
            seconds = [place * (1 + (number * 7 + turn * 3) % 5 / 50) for turn in range(5)]
            about = {"length": 2048 * place, "prompt": "kv", "repeats": 5, "warmup": 1, "interleaved": " ".join(NAMES)}
            about |= {"ttft_median_s": sorted(seconds)[2], "ttft_min_s": min(seconds), "ttft_max_s": max(seconds)}
            times.append(TtftRow(**made_rows.COMMON, method=method, **about, samples_s=" ".join(map(str, seconds))))
        append(root, *scores)
        append(root, *times)
    return root


@pytest.mark.slow
def test_a_thousand_rows(thousand, monkeypatch):
    reads: Counter[str] = Counter()
    read_lines = sample_scores.read_lines

    def counting(path, *arguments):
        reads[path] += 1
        return read_lines(path, *arguments)

    monkeypatch.setattr(sample_scores, "read_lines", counting)
    start = time.process_time()
    report = build(thousand)
    texts = [report_markdown(report), report_csv(report), report_json(report)]
    seconds = time.process_time() - start
    assert all(texts)
    assert len(reads) == 858
    assert set(reads.values()) == {1}
    assert seconds < 6, "all three forms took a second and a half where this was written"


@pytest.mark.slow
def test_the_whole_command_takes_a_second_or_two_and_no_pandas(thousand):
    """Importing pandas alone takes longer than all tables of a thousand rows."""
    program = (
        "import sys; from tmbench.cli import main; sys.argv[1:] = ['report', '--results', sys.argv[1]]\n"
        "try:\n    main()\nfinally:\n"
        "    print(*sorted({'pandas', 'torch', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(thousand)], capture_output=True, text=True, check=True, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith("# tmbench report")
    assert done.stderr.split() == []
    assert after.ru_utime - before.ru_utime < 5, "it took 1.6 s where this was written"
