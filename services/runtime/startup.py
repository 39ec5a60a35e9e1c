"""Why a service could not start, or had to end."""

from __future__ import annotations

import errno
import os
import socket


class StartupError(Exception):
    """A service cannot start, for a reason that its operator can remove, or cannot go on, for a process of its own has
    ended.  The message is one sentence that says what
    failed, on what, and what to do; it is shown without a traceback."""


def cannot_listen(error: OSError, address: str, flag: str) -> StartupError:
    """Why a socket could not be had at ``address``, with ``flag`` as the remedy."""
    if isinstance(error, socket.gaierror):
        return StartupError(f"cannot resolve the host of {address}; choose another with {flag}")
    if error.errno == errno.EADDRINUSE:
        return StartupError(f"address {address} is in use by another process; choose another with {flag}")
    return StartupError(f"cannot listen on {address}: {os.strerror(error.errno or 0)}; choose another with {flag}")
