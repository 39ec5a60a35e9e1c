"""Who is let in to /v1 and to the dashboard's data."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.doorkeeper import Doorkeeper
from gateway.http.errors import error_response
from kvferry.errors import UnauthenticatedError

_GUARDED = ("/v1/", "/dashboard/")
_CHALLENGE = {"www-authenticate": "Bearer"}


class KeyCheck:
    """Middleware.  Puts the tenant into the scope's state.  Health and metrics are for the platform, which has no key;
    the dashboard's page holds no data."""

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper) -> None:
        self._app = app
        self._doorkeeper = doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(_GUARDED):
            try:
                scope["state"]["tenant"] = self._doorkeeper.admit(Headers(scope=scope).get("authorization"))
            except UnauthenticatedError as error:
                response = error_response(error)
                response.headers.update(_CHALLENGE)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
