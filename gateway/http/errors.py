"""kvferry's errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.http.encoding import encode
from gateway.http.limits import MAX_HEAD_NBYTES, MAX_HEADERS
from kvferry import errors

# Status and OpenAI's type of each error; what is not listed is a bug on our side.
_STATUS: dict[type[errors.Error], tuple[int, str]] = {
    errors.InvalidRequestError: (400, "invalid_request_error"),
    errors.UnauthenticatedError: (401, "authentication_error"),
    errors.PermissionDeniedError: (403, "permission_error"),
    errors.NotFoundError: (404, "invalid_request_error"),
    errors.ConflictError: (409, "invalid_request_error"),
    errors.OverloadedError: (429, "rate_limit_error"),
    errors.UnavailableError: (503, "server_error"),
    errors.AbortedError: (503, "server_error"),
    errors.CancelledError: (503, "server_error"),
    errors.DeadlineError: (504, "server_error"),
}
_INTERNAL = (500, "server_error")
# For a refusal that gives no hint of its own.
_DEFAULT_RETRY_AFTER_S = 1.0


def error_body(error: errors.Error) -> dict[str, Any]:
    """``code`` is the error's reason in lower case, ``param`` the field that its metadata names."""
    _, kind = _STATUS.get(type(error), _INTERNAL)
    return _body(error.message, kind, error.metadata.get("field"), error.reason.lower())


def error_response(error: errors.Error) -> Response:
    """Where trying again can help, Retry-After says when, in whole seconds, and retry-after-ms says it precisely."""
    status, _ = _STATUS.get(type(error), _INTERNAL)
    retry_after_s = error.retry_after_s
    if retry_after_s is None and isinstance(error, errors.OverloadedError):
        retry_after_s = _DEFAULT_RETRY_AFTER_S
    headers = {}
    if retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(retry_after_s))
        headers["retry-after-ms"] = str(math.ceil(retry_after_s * 1000))
    return json_response(error_body(error), status, headers)


def too_large(limit_nbytes: int) -> Response:
    message = f"the request body is larger than the limit of {limit_nbytes} bytes"
    return json_response(_body(message, "invalid_request_error", None, "request_too_large"), 413)


def head_too_large() -> Response:
    """The connection ends with it: what follows such a head is not looked at."""
    message = f"the request's head has more than {MAX_HEADERS} headers or {MAX_HEAD_NBYTES} bytes"
    body = _body(message, "invalid_request_error", None, "head_too_large")
    return json_response(body, 431, {"connection": "close"})


def internal_error(request_id: str) -> errors.InternalError:
    """For an exception that nobody foresaw: its text stays in the log, where the id leads to it."""
    return errors.InternalError(f"internal error; the service's log has the details under request_id {request_id}")


def json_response(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(content), status, headers, media_type="application/json")


async def on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, errors.Error)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Of the router: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        message, code = f"there is nothing at {path}", "unknown_url"
    elif error.status_code == 405:
        message, code = f"{path} does not take {request.method}", "method_not_allowed"
    else:
        message, code = str(error.detail), None
    body = _body(message, "invalid_request_error", None, code)
    return json_response(body, error.status_code, dict(error.headers or {}))


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
