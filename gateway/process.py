"""One of a gateway's processes, as its parent starts it: python -m gateway.process NUMBER FOLDER READY [OPTION ...]

READY is a file descriptor, which it writes a byte to once it listens.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prometheus_client import values

from gateway.config import GatewayConfig
from gateway.seat import Seat
from services.runtime import logs, tracing
from services.runtime.config import load
from services.runtime.server import run_until_stopped

PROG = "python -m gateway"


def main() -> int:
    number, folder, ready = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    config = load(GatewayConfig, sys.argv[4:], PROG)
    seat = Seat(number, config.processes, folder)
    share_metrics(seat)
    # Metrics are where that said only if they are made after it.
    from gateway.serving import run_gateway

    logs.configure(f"gateway-{number}", level=config.log_level.value)
    tracing.configure("gateway")

    def on_listening() -> None:
        os.write(ready, b"\n")
        os.close(ready)

    return run_until_stopped(run_gateway(config, seat, on_listening), prog=PROG)


def share_metrics(seat: Seat) -> None:
    """From here on metrics are kept in files that all of the processes read.  By number and not by pid, so that a successor
    goes on counting in its predecessor's."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(seat.metrics)  # as prometheus_client wants it
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: seat.number)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.exit(main())
