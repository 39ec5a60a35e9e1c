"""Everything kvferry raises, and the one place where gRPC statuses become exceptions and back.

Error
├── InvalidRequestError      the request can never be served; the message names the field   INVALID_ARGUMENT
├── NotFoundError            unknown model or worker                                        NOT_FOUND
├── UnauthenticatedError     no valid credentials                                           UNAUTHENTICATED
├── PermissionDeniedError    valid credentials, not for this                                PERMISSION_DENIED
├── OverloadedError          too much in flight; retry_after_s says when to try again       RESOURCE_EXHAUSTED
├── UnavailableError         nobody could serve it, or whoever did was lost                 UNAVAILABLE
├── DeadlineError            the deadline passed first                                      DEADLINE_EXCEEDED
├── CancelledError           the call was cancelled                                         CANCELLED
├── ConflictError            the other side is in no state for this                         FAILED_PRECONDITION
├── AbortedError             given up half-way; starting over can help                      ABORTED
└── InternalError            a bug on the serving side                                      INTERNAL, UNKNOWN, others
"""

from __future__ import annotations

from typing import ClassVar, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "kvferry"


class Error(Exception):
    """Root of all errors.  ``reason`` is a stable word for programs (ErrorInfo.reason), ``retry_after_s`` a hint in
    seconds, or None when trying again cannot be advised."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str, *, reason: str | None = None, retry_after_s: float | None = None,
                 metadata: dict[str, str] | None = None) -> None:  # fmt: skip
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.retry_after_s = retry_after_s
        self.metadata = metadata or {}


class InvalidRequestError(Error):
    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_REQUEST"


class NotFoundError(Error):
    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class UnauthenticatedError(Error):
    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(Error):
    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class OverloadedError(Error):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "OVERLOADED"


class UnavailableError(Error):
    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DeadlineError(Error):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class CancelledError(Error):
    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class ConflictError(Error):
    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "CONFLICT"


class AbortedError(Error):
    code = grpc.StatusCode.ABORTED
    default_reason = "ABORTED"


class InternalError(Error):
    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


_BY_CODE: dict[grpc.StatusCode, type[Error]] = {
    cls.code: cls
    for cls in (
        InvalidRequestError,
        NotFoundError,
        UnauthenticatedError,
        PermissionDeniedError,
        OverloadedError,
        UnavailableError,
        DeadlineError,
        CancelledError,
        ConflictError,
        AbortedError,
        InternalError,
    )
}
_BY_NUMBER = {code.value[0]: cls for code, cls in _BY_CODE.items()}


def to_status(error: Error) -> rpc_status._Status:
    """The gRPC status that carries ``error``, for ``context.abort_with_status``."""
    details = []
    for detail in (
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata),
        None
        if error.retry_after_s is None
        else error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after_s)),
    ):
        if detail is not None:
            packed = any_pb2.Any()
            packed.Pack(detail)
            details.append(packed)
    status = status_pb2.Status(code=error.code.value[0], message=error.message, details=details)
    return rpc_status.to_status(status)


def from_code(code: int, message: str, *, reason: str | None = None, retry_after_s: float | None = None,
              metadata: dict[str, str] | None = None) -> Error:  # fmt: skip
    """The exception for a google.rpc.Code; InternalError for one that stands for none of ours."""
    cls = _BY_NUMBER.get(code, InternalError)
    return cls(message, reason=reason, retry_after_s=retry_after_s, metadata=metadata)


def from_rpc_error(error: grpc.RpcError) -> Error:
    """The exception for a failed call, with the details that the other side attached."""
    call = cast(grpc.Call, error)  # gRPC raises errors that are calls as well
    code, message = call.code(), call.details() or ""
    reason, retry_after_s, metadata = None, None, {}
    for key, value in call.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status.FromString(value)
        for detail in status.details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return from_code(code.value[0], message or code.name, reason=reason, retry_after_s=retry_after_s, metadata=metadata)


def _duration(seconds: float) -> duration_pb2.Duration:
    whole = int(seconds)
    return duration_pb2.Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))
