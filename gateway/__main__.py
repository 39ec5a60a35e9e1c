"""The gateway: python -m gateway"""

from __future__ import annotations

import sys

from gateway.config import GatewayConfig
from services.runtime import logs, tracing
from services.runtime.config import load
from services.runtime.server import run_until_stopped

PROG = "python -m gateway"


def main() -> int:
    config = load(GatewayConfig, sys.argv[1:], PROG)
    logs.configure("gateway", level=config.log_level.value)
    if config.processes > 1:
        # What serves is not the parent's to load.
        from gateway.parent import run_processes

        return run_until_stopped(run_processes(config, sys.argv[1:]), prog=PROG)
    from gateway.serving import run_gateway

    tracing.configure("gateway")
    return run_until_stopped(run_gateway(config), prog=PROG)


if __name__ == "__main__":
    sys.exit(main())
