"""Waiting, in the event loop, for what a device computes."""

from __future__ import annotations

import asyncio

from services.engine.ready import Ready

POLL_S = 0.0002
TIMEOUT_S = 60.0


async def reached(ready: Ready, timeout_s: float = TIMEOUT_S) -> None:
    """Returns once it is in memory.  Raises TimeoutError, and what the device failed with.

    A CUDA event wakes no event loop and knows no deadline, so it is asked again and again; where there is no device there
    is no ``Ready`` to wait for."""
    async with asyncio.timeout(timeout_s):
        while not ready.done():  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
