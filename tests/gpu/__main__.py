"""`make test-gpu`: all that only a device can prove.  Ends with 1 and a sentence where there is none to prove it on.

What compiles comes last, each test with a line before it begins: a run that is cut short has told something.
"""

from __future__ import annotations

import sys

from tests.gpu.needs import missing_tools, why_not

TIMEOUT_S = 3600  # for one test; a kernel's first call compiles it, which takes minutes


def main() -> int:
    if reason := missing_tools() or why_not():
        sys.exit(f"make test-gpu: {reason}")
    import pytest

    # Warnings of torch, FlashInfer and what they compile with are not this project's.
    quiet = ("-W", "default", "-o", f"timeout={TIMEOUT_S}")
    return pytest.main([*quiet, "-v", "-m", "gpu", "tests/gpu", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
