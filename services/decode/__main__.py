"""A decode worker: streams tokens from KV blocks that prefill workers write into its pool."""

from __future__ import annotations

import sys

from services.decode.role import DECODE
from services.prefill.role import PREFILL
from services.worker.start import start

if __name__ == "__main__":
    sys.exit(start(DECODE, PREFILL, "decode"))
