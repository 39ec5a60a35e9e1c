"""Why a service could not start."""

from __future__ import annotations


class StartupError(Exception):
    """A service cannot start, for a reason that its operator can remove.  The message is one sentence that says what
    failed, on what, and what to do; it is shown without a traceback."""
