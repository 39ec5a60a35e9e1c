from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAIN = """
import asyncio, sys
from services.runtime import logs
from services.runtime.server import StartupError, run_until_stopped

async def main(mode):
    if mode == "startup":
        raise StartupError("no weights; fetch them")
    if mode == "bug":
        raise ZeroDivisionError
    if mode == "done":
        return
    try:
        print("ready", flush=True)
        await asyncio.Event().wait()
    finally:
        print("closing", flush=True)
        if mode == "slow":
            await asyncio.sleep(60)

logs.configure("test", json=True)
sys.exit(run_until_stopped(main(sys.argv[1]), prog="prog"))
"""


@contextmanager
def started(mode: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", MAIN, mode]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_shuts_down(number: signal.Signals) -> None:
    with started("quick") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        out, _ = child.communicate(timeout=10)
        assert (out, child.returncode) == ("closing\n", 0)


def test_the_second_signal_ends_at_once() -> None:
    with started("slow") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "closing\n"
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=10)
        assert child.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("mode", "status", "says"),
    [("done", 0, ""), ("startup", 1, "prog: no weights; fetch them\n"), ("bug", 1, "ZeroDivisionError")],
)
def test_how_it_can_end_by_itself(mode: str, status: int, says: str) -> None:
    with started(mode) as child:
        _, err = child.communicate(timeout=10)
        assert child.returncode == status
        assert says in err
        assert ("Traceback" in err) == (mode == "bug")
