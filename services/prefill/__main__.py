"""A prefill worker: computes prompts and writes their KV blocks into decode workers' pools."""

from __future__ import annotations

import sys

from services.decode.role import DECODE
from services.prefill.role import PREFILL
from services.worker.start import start

if __name__ == "__main__":
    sys.exit(start(PREFILL, DECODE, "prefill"))
