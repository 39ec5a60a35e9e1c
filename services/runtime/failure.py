"""Errors of requests that share a call: in a message, where a call of their own would have a status."""

from __future__ import annotations

from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import Error, from_code


def to_failure(error: Error) -> worker_pb2.Failure:
    return worker_pb2.Failure(
        code=error.code.value[0],
        message=error.message,
        reason=error.reason,
        metadata=error.metadata,
        retry_after_ms=None if error.retry_after_s is None else round(error.retry_after_s * 1000),
    )


def from_failure(failure: worker_pb2.Failure) -> Error:
    return from_code(
        failure.code,
        failure.message,
        reason=failure.reason,
        retry_after_s=failure.retry_after_ms / 1000 if failure.HasField("retry_after_ms") else None,
        metadata=dict(failure.metadata),
    )
