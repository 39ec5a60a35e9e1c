"""What a request's head may hold."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.http.errors import head_too_large
from gateway.http.limits import MAX_HEAD_NBYTES, MAX_HEADERS

# Around each header in the head: a colon, a space and the end of the line.
_AROUND_NBYTES = 4


class HeadLimit:
    """Middleware, the outermost: nothing looks at the headers before they were counted.  The server ends a head that is
    incomplete and already too long; one that arrives whole is seen here first."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        nbytes = len(scope["raw_path"]) + len(scope["query_string"])
        nbytes += sum(len(name) + len(value) + _AROUND_NBYTES for name, value in headers)
        if len(headers) > MAX_HEADERS or nbytes > MAX_HEAD_NBYTES:
            await head_too_large()(scope, receive, send)
            return
        await self._app(scope, receive, send)
