"""Compiles the fleet simulator into build/.  Run by `make setup`: python -m services.planner.build"""

from __future__ import annotations

import sys
from pathlib import Path

from services.runtime.shared_library import SharedLibrary

FLEET = SharedLibrary("fleet", "the fleet simulator", Path(__file__).with_name("fleet.c"), ("-lm",))

if __name__ == "__main__":
    try:
        print(f"fleet simulator: {FLEET.build().name}")
    except RuntimeError as e:
        sys.exit(f"kvferry: {e}")
