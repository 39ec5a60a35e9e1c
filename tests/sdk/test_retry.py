"""What a call leaves behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable

import pytest

from kvferry import _retry


class Attempt:
    """Fails once."""

    num_left = 1

    def __call__(self) -> str:
        if self.num_left:
            self.num_left -= 1
            raise OSError
        return "done"

    async def later(self) -> str:
        return self()


def block(attempt: Attempt, retry_on: Callable[[BaseException], bool]) -> str:
    return _retry.blocking(attempt, _retry.Deadline(9.0), 3, retry_on)


def run(attempt: Attempt, retry_on: Callable[[BaseException], bool]) -> str:
    return asyncio.run(_retry.asynchronous(attempt.later, _retry.Deadline(9.0), 3, retry_on))


@pytest.mark.parametrize("call", [block, run])
def test_a_call_that_has_ended_waits_for_no_look_for_garbage(
    call: Callable[[Attempt, Callable[[BaseException], bool]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_retry, "INITIAL_BACKOFF_S", 0.01)

    def always(_: BaseException) -> bool:
        return True

    kept = weakref.ref(always)
    gc.disable()
    try:
        assert call(Attempt(), always) == "done"
        del always
        assert kept() is None
    finally:
        gc.enable()
