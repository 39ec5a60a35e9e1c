"""A prefill worker that does on request what a fault in the transport, in memory or in our own code would do.

Where a request's id says "garbled", each chunk's blocks arrive in reverse order.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from services.prefill.__main__ import ROLE
from services.prefill.ferries import Passage
from services.prefill.ferry import Write
from services.worker.start import start

_write = Passage._write


def _write_garbled(passage: Passage, write: Write) -> None:
    garbled = "garbled" in passage.ticket.request_id
    _write(passage, replace(write, target=write.target[::-1]) if garbled else write)


if __name__ == "__main__":
    Passage._write = _write_garbled  # type: ignore[method-assign]
    sys.exit(start(ROLE, "prefill"))
