"""Who is let in to /v1."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.doorkeeper import Doorkeeper
from gateway.http.errors import error_response
from kvferry.errors import UnauthenticatedError

_CHALLENGE = {"www-authenticate": "Bearer"}


class KeyCheck:
    """Middleware.  Puts the tenant into the scope's state.  Health and metrics are for the platform, which has no key."""

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper) -> None:
        self._app = app
        self._doorkeeper = doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/v1/"):
            try:
                scope["state"]["tenant"] = self._doorkeeper.admit(Headers(scope=scope).get("authorization"))
            except UnauthenticatedError as error:
                response = error_response(error)
                response.headers.update(_CHALLENGE)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
