"""What one connection of a client may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_headers_nbytes``: of one request; beyond it the connection ends, as its headers can then not be told apart any
    more.  ``max_buffered_nbytes``: of requests that are not whole.  ``max_unread_nbytes``: of answers to what is no call,
    such as pings.  More than ``max_resets`` streams that the client gives up within ``resets_within_s`` end the
    connection: each costs more to begin than to give up (CVE-2023-44487).  ``last_words_s``: how long a client that has
    taken a part of a message may take for the rest of it, once its call has ended."""

    max_message_nbytes: int
    max_streams: int = 10_000
    max_headers_nbytes: int = 64 * 1024
    max_buffered_nbytes: int = 64 * 1024 * 1024
    max_unread_nbytes: int = 4 * 1024 * 1024
    max_resets: int = 2000
    resets_within_s: float = 10.0
    window_nbytes: int = 1024 * 1024
    preface_timeout_s: float = 10.0
    last_words_s: float = 30.0
    ping_interval_s: float = 10.0
    ping_timeout_s: float = 5.0
