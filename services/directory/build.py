"""Compiles the block index into build/.  Run by `make setup`: python -m services.directory.build"""

from __future__ import annotations

import sys
from pathlib import Path

from services.runtime.shared_library import SharedLibrary

INDEX = SharedLibrary("index", "the block index", Path(__file__).with_name("index.c"))

if __name__ == "__main__":
    try:
        print(f"block index: {INDEX.build().name}")
    except RuntimeError as e:
        sys.exit(f"kvferry: {e}")
