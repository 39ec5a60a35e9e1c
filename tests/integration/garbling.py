"""A prefill worker that does on request what a fault in the transport, in memory or in our own code would do.

Where a request's id says "garbled", each chunk's blocks arrive in reverse order.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from services.decode.role import DECODE
from services.engine.ready import Ready
from services.prefill.ferry import Write
from services.prefill.passage import Passage
from services.prefill.role import PREFILL
from services.worker.start import start

_write = Passage._write


async def _write_garbled(passage: Passage, write: Write, ready: Ready | None) -> None:
    target = passage.target
    if "garbled" in passage.ticket.request_id:
        first = (write.first_token - target.first_token) // target.layout.block_size
        before, chunk, behind = (
            target.blocks[:first],
            target.blocks[first : first + write.num_blocks],
            target.blocks[first + write.num_blocks :],
        )
        passage.target = replace(target, blocks=[*before, *reversed(chunk), *behind])
    await _write(passage, write, ready)


if __name__ == "__main__":
    Passage._write = _write_garbled  # type: ignore[method-assign]
    sys.exit(start(PREFILL, DECODE, "prefill"))
