"""What one HTTP request may take."""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEAD_NBYTES = 64 * 1024
MAX_HEADERS = 128


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """``default_timeout_s`` holds where a request names none in x-request-timeout; one above ``max_timeout_s`` is
    refused.  A request's time begins with its head's arrival and ends with the last byte of its answer.  A client that
    reads nothing of its stream for ``write_timeout_s`` loses it."""

    max_body_nbytes: int = 2 * 1024 * 1024
    default_timeout_s: float = 300.0
    max_timeout_s: float = 3600.0
    write_timeout_s: float = 30.0
