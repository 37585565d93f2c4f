"""Work that may fail, where a failure is a measurement: on all ranks that share a model, or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tmbench.errors import UserError
from tmbench.models import parallel
from tmbench.results import failures
from tmbench.results.failures import Failure, describe, is_out_of_memory
from tmbench.results.rows import FAILED, OUT_OF_MEMORY

T = TypeVar("T")
_inside = 0
"""How many attempts this one is within."""


def attempt(work: Callable[[], T]) -> T | Failure:
    """What the work returns, or why it failed; raises UserError, which the user must mend, as it is.

    Memory is given back once the error is forgotten: its traceback holds on to what the failed work had allocated.
    Where several ranks share the model, all of them call this, and what failed on one has failed on all.
    """
    global _inside
    _inside += 1
    failure: Failure | None = None
    followed: Failure | None = None
    refused = ""
    try:
        done = work()
    except UserError as error:
        if parallel.size() == 1:
            raise
        refused = str(error)
    except parallel.OtherRankError as error:
        followed = Failure(FAILED, describe(error))
    except Exception as error:
        failure = Failure(OUT_OF_MEMORY if is_out_of_memory(error) else FAILED, describe(error))
    finally:
        _inside -= 1
    if failure is not None or followed is not None:
        failures.release_memory()
    if parallel.size() > 1:
        failure = _of_all(failure, refused) or followed
    return done if failure is None else failure


def _of_all(failure: Failure | None, refused: str) -> Failure | None:
    """What became of the work on all ranks; raises UserError where one of them did."""
    trouble = refused or (failure.error if failure else "")
    said = parallel.exchanged((_inside, failure, refused), trouble, ended=True)
    places, failed_as, refusals = zip(*said, strict=True)
    if len(set(places)) > 1:
        reasons = [refusal or (one.error if one else "") for refusal, one in zip(refusals, failed_as, strict=True)]
        early = places.index(min(places)), "its work ended early"
        rank, reason = next((one for one in enumerate(reasons) if one[1]), early)
        parallel.end(f"rank {rank} of {len(said)} failed where the others did not, {reason}")
    if refusal := next((one for one in enumerate(refusals) if one[1]), None):
        rank, sentence = refusal
        raise UserError(sentence if all(refusals) else f"on rank {rank} of {len(said)}: {sentence}")
    failed = {rank: one for rank, one in enumerate(failed_as) if one}
    if not failed:
        return None
    if len(failed) == len(said) and len({one.status for one in failed.values()}) == 1:
        return failure
    failures.release_memory()
    rank = next((rank for rank, one in failed.items() if one.status == OUT_OF_MEMORY), min(failed))
    return Failure(failed[rank].status, f"on rank {rank} of {len(said)}: {failed[rank].error}")
