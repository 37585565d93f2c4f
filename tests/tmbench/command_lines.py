"""Command lines that several tests run, and the program as a process of its own."""

from __future__ import annotations

import sys

# A shell that runs the tests in the background has them ignore SIGINT, and children would inherit that.
PROGRAM = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from tmbench.cli import main; main()",
]
FAST_TTFT = ("ttft", "--length", "256", "--repeats", "1", "--device", "cpu")
SEARCH = ("patterns", "search", "--length", "2600", "--device", "cpu", "--output", "found.json")
