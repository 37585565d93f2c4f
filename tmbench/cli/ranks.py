"""A command under ``torchrun``: rank 0 runs it, and the other ranks share its model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from tmbench.errors import UserError
from tmbench.models import parallel

COMMANDS = ("ttft", "ruler", "suite", "agree")
"""Those that measure a model on several GPUs."""


def check_command(arguments: Sequence[str]) -> None:
    """Raise UserError for a command that has nothing to do for several ranks."""
    command = next(iter(arguments), "")
    if parallel.size() > 1 and command not in COMMANDS and not command.startswith("-"):
        raise UserError(
            f"torchrun is for tmbench {', '.join(COMMANDS)}, which measure a model on several GPUs, not for "
            f"{command or 'none'}: leave torchrun out"
        )


def across(run: Callable[[], None]) -> None:
    """Meet the other ranks, then run the command, or follow rank 0 and end with its exit code."""
    from tmbench.executors.ranks import Stop, follow

    parallel.start()
    code = 1
    try:
        if parallel.rank() > 0:
            sys.exit(follow())
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        # A rank that is gone can be told nothing, and torchrun ends the rest.
        with suppress(RuntimeError):
            if parallel.rank() == 0:
                parallel.send(Stop(code))
            parallel.stop()
