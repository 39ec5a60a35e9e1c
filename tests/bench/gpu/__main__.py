"""make bench-gpu: see bench.py, which needs torch."""

from __future__ import annotations

import signal
import sys

from tests.gpu.needs import no_torch

if __name__ == "__main__":
    if reason := no_torch():
        sys.exit(f"bench-gpu: {reason}")
    from tests.bench.gpu.bench import main

    # Whoever is cut short leaves neither processes nor a folder of 16 GB.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
