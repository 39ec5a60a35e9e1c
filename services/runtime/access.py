"""Which service may ask what of which (ADR 23)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import grpc
import structlog

from kvferry._roles import CertificateRole as Role
from kvferry.errors import PermissionDeniedError
from services.runtime.handlers import rebuilt

_log = structlog.stdlib.get_logger(__name__)

_NAMES = "x509_subject_alternative_name"

_EVERY_ROLE = frozenset(Role)
_DIRECTORY = "/kvferry.api.directory.v1.DirectoryService/"
_PREFILL = "/kvferry.api.worker.v1.PrefillService/"
_DECODE = "/kvferry.api.worker.v1.DecodeService/"
_WORKER = "/kvferry.api.worker.v1.WorkerService/"
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/"

# What is not here is forbidden.
ALLOWED: Mapping[str, frozenset[Role]] = {
    _DIRECTORY + "Register": frozenset({Role.WORKER}),
    _DIRECTORY + "KeepAlive": frozenset({Role.WORKER}),
    _DIRECTORY + "Deregister": frozenset({Role.WORKER}),
    _DIRECTORY + "PublishBlocks": frozenset({Role.WORKER}),
    _DIRECTORY + "Watch": frozenset({Role.GATEWAY, Role.OPERATOR}),
    _DIRECTORY + "Lookup": frozenset({Role.GATEWAY, Role.OPERATOR}),
    _PREFILL + "Prefill": frozenset({Role.GATEWAY}),
    _DECODE + "Decode": frozenset({Role.GATEWAY}),
    _DECODE + "CommitTransfer": frozenset({Role.WORKER}),
    _DECODE + "AbortTransfer": frozenset({Role.WORKER}),
    _WORKER + "StopTransfer": frozenset({Role.WORKER}),
    _WORKER + "PinBlocks": frozenset({Role.WORKER}),
    _WORKER + "ReleasePin": frozenset({Role.WORKER}),
    _WORKER + "Drain": frozenset({Role.OPERATOR}),
    _WORKER + "ChangeRole": frozenset({Role.OPERATOR}),
    _WORKER + "GetStats": frozenset({Role.OPERATOR}),
    "/grpc.health.v1.Health/Check": _EVERY_ROLE,
    "/grpc.health.v1.Health/Watch": _EVERY_ROLE,
    _REFLECTION + "ServerReflectionInfo": frozenset({Role.OPERATOR}),
}


def roles_of(names: Iterable[bytes]) -> frozenset[Role]:
    """Those that a certificate's subject alternative names give; other names mean nothing here."""
    by_name = {role.dns_name.encode(): role for role in Role}
    return frozenset(by_name[name] for name in names if name in by_name)


def require(method: str, roles: frozenset[Role]) -> None:
    """Raises PermissionDeniedError unless one of ``roles`` may call ``method``."""
    allowed = ALLOWED.get(method, frozenset())
    if roles & allowed:
        return
    who = " and ".join(sorted(role.value for role in roles))
    may = " or ".join(sorted(role.value for role in allowed)) or "nobody"
    has = f"has the role {who}" if roles else "names no role"
    raise PermissionDeniedError(
        f"{method} is for {may}, and the caller's certificate {has}", reason="ROLE_MAY_NOT_CALL",
        metadata={"method": method},
    )  # fmt: skip


class RoleInterceptor(grpc.aio.ServerInterceptor):
    """Lets through what ``ALLOWED`` says.  Inside of RequestInterceptor, which answers its refusals.  For servers that
    require a certificate of every client."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        return handler if handler is None else _guarded(handler, handler_call_details.method)


def _guarded(handler: Any, method: str) -> Any:
    def guard(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def handle(request: Any, context: Any) -> Any:
            roles = roles_of(context.auth_context().get(_NAMES, ()))
            try:
                require(method, roles)
            except PermissionDeniedError as refusal:
                _log.warning("call_refused", method=method, peer=context.peer(), error=refusal.message)
                raise
            return behaviour(request, context)

        return handle

    return rebuilt(handler, guard, guard)
