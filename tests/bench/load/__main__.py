"""make bench-load: kvferry bench itself, with thousands of streams open, against workers that compute nothing.

It must not be what it measures: one core holds them all, its event loop is never late for long, and it says nothing of
being the bottleneck.  Directory, workers and gateway are processes of their own on this machine, and can hold it up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from kvferry.cli import ports
from kvferry.cli.figures import BUSY_CORES, LATE_S
from tests.bench.gateway.run import LOGS, MODEL, ROOT, hear, started, wait_until_listening
from tests.bench.terminal import say
from tests.bench.transport.report import table, write_json
from tests.bench.transport.rows import Row, more_is_better, within

OUT = ROOT / "build" / "bench" / "load.json"
STREAMS_GOAL = 2000
STEP_S = 0.5


def main() -> None:
    options = parse()
    console = Console()
    found = [measure(options) for _ in range(options.rounds)]
    for each in found:
        say(console, f"{each['max_open']} streams, {each['output_tokens_per_s']:.0f} tokens/s, {each['cores']:.2f} cores, "
                     f"loop at most {1e3 * each['loop_lag_s']:.0f} ms late, failed: {each['errors'] or 'none'} "
                     f"{each['said'] or ''}; "
                     f"{'; '.join(each['bottleneck']) or 'no bottleneck told'}")  # fmt: skip
    rows = rows_of(found)
    console.print(table(rows))
    write_json(rows, OUT)
    say(console, f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; wrote {OUT.relative_to(ROOT)}")


def rows_of(found: list[dict[str, Any]]) -> list[Row]:
    count = len(found)
    sent = [float(each["num_requests"]) for each in found]
    return [
        more_is_better("streams open at once / goal", [each["max_open"] for each in found], [STREAMS_GOAL] * count, 1.0,
                       "streams"),
        more_is_better("answers / requests", [float(each["num_completed"]) for each in found], sent, 1.0, "requests"),
        within("its own cores / allowed", [each["cores"] for each in found], BUSY_CORES, "cores"),
        within("its event loop's longest delay / allowed", [each["loop_lag_s"] for each in found], LATE_S, "s"),
    ]  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What kvferry bench wrote.  Raises RuntimeError when a process ends early."""
    directory, grpc_address, http_address = (ports.join(ports.LOOPBACK, port) for port in ports.pick_free(3, avoid=()))
    with (
        started("directory", "services.directory", "--listen", directory),
        started("null-workers", "tests.bench.gateway.null_workers", directory, MODEL, str(options.workers)) as null,
    ):
        hear(null, "ready")
        flags = ("--listen", grpc_address, "--http-listen", http_address, "--directory", directory)
        with started("gateway", "gateway", *flags, "--max-requests", str(2 * options.streams)) as gateway:
            wait_until_listening(gateway)
            assert null.stdin is not None
            null.stdin.write(f"{STEP_S}\n")
            null.stdin.flush()
            return bench(
                ("--http", f"http://{http_address}/v1") if options.http else ("--address", grpc_address), options
            )


def bench(door: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    out = LOGS / "load.json"
    answer_s = options.tokens * STEP_S
    asked = (
        "--rate", str(options.streams / answer_s), "--burstiness", "0", "--prompt-tokens", "16", "--output-tokens",
        str(options.tokens), "--warmup", str(answer_s), "--duration", str(options.seconds), "--json", str(out),
    )  # fmt: skip
    command = [sys.executable, "-m", "kvferry.cli", "bench", *door, *asked]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if ended.returncode:
        raise RuntimeError(f"kvferry bench ended with {ended.returncode}: {ended.stderr}")
    found: dict[str, Any] = json.loads(Path(out).read_text())
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-load", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="that count (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=2200, help="that would be open (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=40, help="of an answer, one each half second (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=16, help="that the streams are spread over (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="measured in a round (default: %(default)s)")
    parser.add_argument("--http", action="store_true", help="by the OpenAI door instead of gRPC")
    return parser.parse_args()


if __name__ == "__main__":
    main()
