"""When a call is made again: after which errors, how long after, and until when."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import tenacity

from kvferry import errors

INITIAL_BACKOFF_S = 0.2
MAX_BACKOFF_S = 2.0

T = TypeVar("T")


class Deadline:
    """A point in time, ``timeout_s`` from now; shared by all attempts of one call."""

    __slots__ = ("_at",)

    def __init__(self, timeout_s: float) -> None:
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise errors.InvalidRequestError(f"timeout must be a positive number of seconds, not {timeout_s}")
        self._at = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """At least a millisecond, so that a call made too late fails with the server's own words for that."""
        return max(self._at - time.monotonic(), 0.001)


def is_transient(error: BaseException) -> bool:
    """For calls that change nothing: whoever should have answered was not there."""
    return isinstance(error, errors.UnavailableError)


def was_refused(error: BaseException) -> bool:
    """For an answer of which nothing has arrived yet.  Overload counts when the other side said when to come back."""
    return is_transient(error) or (isinstance(error, errors.OverloadedError) and error.retry_after_s is not None)


def blocking(
    attempt: Callable[[], T],
    deadline: Deadline,
    max_attempts: int,
    retry_on: Callable[[BaseException], bool],
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Its result, or the last error."""
    stop = _stop(deadline, max_attempts)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(retry_on), wait=_wait, stop=stop, sleep=sleep, reraise=True
    )
    try:
        return retrying(attempt)
    finally:
        _forget(retrying)


async def asynchronous(
    attempt: Callable[[], Awaitable[T]],
    deadline: Deadline,
    max_attempts: int,
    retry_on: Callable[[BaseException], bool],
) -> T:
    """As ``blocking``."""
    stop = _stop(deadline, max_attempts)
    retrying = tenacity.AsyncRetrying(retry=tenacity.retry_if_exception(retry_on), wait=_wait, stop=stop, reraise=True)
    try:
        return await retrying(attempt)
    finally:
        _forget(retrying)


def _forget(retrying: tenacity.BaseRetrying) -> None:
    """It refers to what refers to it: of thousands of calls all would wait for a look for garbage."""
    retrying.iter_state.reset()


def _wait(state: tenacity.RetryCallState) -> float:
    """The hint of the other side, plus an exponential backoff of which half is drawn: clients that were refused
    together do not come back together."""
    backoff_s = min(INITIAL_BACKOFF_S * 2.0 ** (state.attempt_number - 1), MAX_BACKOFF_S)
    error = state.outcome.exception() if state.outcome is not None else None
    hint_s = error.retry_after_s if isinstance(error, errors.Error) and error.retry_after_s is not None else 0.0
    return hint_s + random.uniform(backoff_s / 2, backoff_s)


def _stop(deadline: Deadline, max_attempts: int) -> Callable[[tenacity.RetryCallState], bool]:
    """Stops also when the next attempt could only begin after the deadline: then the last refusal says more than
    a deadline error would."""

    def stop(state: tenacity.RetryCallState) -> bool:
        return state.attempt_number >= max_attempts or state.upcoming_sleep >= deadline.remaining_s()

    return stop
