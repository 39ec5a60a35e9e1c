"""One HTTP exchange below its meaning: the body within bounds, and the client's going away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kvferry.errors import DeadlineError

T = TypeVar("T")

# How long a client that sends too much is listened to after it was told so.
_LINGER_S = 2.0


class ClientGoneError(Exception):
    """The client has hung up: nobody is left to answer."""


class BodyTooLargeError(Exception):
    """The body is larger than the limit; part of it may not have been read."""


async def read_body(receive: Receive, content_length: str | None, limit_nbytes: int) -> bytes:
    """The whole body.  Raises BodyTooLargeError as soon as its size is known to exceed the limit, which for an honest
    ``content_length`` (the header) is before anything was read, and ClientGoneError."""
    if content_length is not None and content_length.isdecimal() and int(content_length) > limit_nbytes:
        raise BodyTooLargeError
    parts: list[bytes] = []
    nbytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        nbytes += len(part)
        if nbytes > limit_nbytes:
            raise BodyTooLargeError
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def refuse_body(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends ``response`` while the client may still be sending, then closes the connection.

    Closing a socket with unread input resets it, which can cost the client the answer that it has not read yet.  So what
    still comes is thrown away until it ends or the client hangs up, for at most two seconds.
    """
    response.headers["connection"] = "close"

    async def send_but_not_the_end(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await response(scope, receive, send_but_not_the_end)
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Awaits ``work``, in a task of its own.  Call once the request's body is read.  When the client hangs up first,
    ``work`` is cancelled, and ClientGoneError is raised after it has ended."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_until_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def until(deadline_s: float) -> AsyncIterator[None]:
    """Ends the block with DeadlineError at ``deadline_s`` of the loop's clock."""
    scope = asyncio.timeout_at(deadline_s)
    try:
        async with scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise DeadlineError("the request's time ran out; ask for more in the header x-request-timeout") from None
