"""A command under ``torchrun``: rank 0 runs it, and the other ranks share its model."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ruler_tasks.errors import RulerError
from tmbench.errors import UserError
from tmbench.models import parallel

if TYPE_CHECKING:
    from tmbench.executors.ranks import Stop

COMMANDS = ("ttft", "ruler", "suite", "agree")
"""Those that measure a model on several GPUs."""


def check_command(arguments: Sequence[str]) -> None:
    """Raise UserError for a command that has nothing to do for several ranks."""
    command = next(iter(arguments), "")
    if parallel.size() > 1 and command not in COMMANDS and not command.startswith("-"):
        raise UserError(
            f"torchrun is for tmbench {', '.join(COMMANDS)}, which measure a model on several GPUs, not for "
            f"{command or 'tmbench alone'}: leave torchrun out"
        )


def across(run: Callable[[], None]) -> None:
    """Meet the other ranks, then run the command, or follow rank 0 and end with its exit code."""
    from tmbench.executors.ranks import Stop

    parallel.start()
    stop = _ending(run)
    if parallel.rank() == 0 and stop.code == parallel.INTERRUPTED:
        # The others were interrupted too.
        parallel.end(stop.reason, stop.code)
    parallel.leaving(stop.code, stop.reason)
    # A rank that is gone can be told nothing, and torchrun ends the rest.
    with suppress(RuntimeError):
        if parallel.rank() == 0:
            parallel.send(Stop(stop.code, stop.reason))
        parallel.stop()
    sys.exit(stop.code)


def _ending(run: Callable[[], None]) -> Stop:
    """Do this rank's part, and how it ended; what nobody has said by then is said."""
    from tmbench.executors.ranks import Stop, follow
    from tmbench.results.failures import describe

    try:
        if parallel.rank() > 0:
            return follow()
        run()
    except SystemExit as end:
        said, refused = end.__cause__, getattr(end.__context__, "format_message", None)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == parallel.INTERRUPTED:
            return Stop(code, "the run was interrupted")
        if isinstance(said, (UserError, RulerError)):
            return Stop(code, str(said))
        # Of options that it does not know, or cannot read, Typer speaks by itself.
        return Stop(code, refused() if callable(refused) else "")
    except KeyboardInterrupt:
        return Stop(parallel.INTERRUPTED, "the run was interrupted")
    except parallel.GoneError as gone:
        if parallel.rank() == 0:
            parallel.end(str(gone))
        return Stop(1, str(gone))
    except Exception as error:
        traceback.print_exc()
        return Stop(1, describe(error))
    return Stop(0)
