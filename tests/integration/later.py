"""A service as one of another version would be: python -m tests.integration.later MODULE OLDEST NEWEST FLAGS"""

from __future__ import annotations

import runpy
import sys

from services.runtime import protocol

if __name__ == "__main__":
    module, oldest, newest = sys.argv[1:4]
    del sys.argv[1:4]
    protocol.SPOKEN = protocol.Protocol(int(oldest), int(newest))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
