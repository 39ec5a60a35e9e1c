"""A worker whose transport's thread has ended, or stands still, is told so while everything else of it goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from services.worker.pulse import Pulse
from tests import tracing
from tests.tracing import CannotTraceError

WATCHED = """
import sys, time, transport
from services.worker.pulse import watched

def say(why):
    print(why, flush=True)

with transport.create("ucx") as ours, watched(ours.pulse, say, every_s=float(sys.argv[1]), num_looks=2):
    print("watched", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WATCHED, request.param]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watched\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("process", ["0.6"], indirect=True)
def test_a_thread_that_stands_still(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    try:
        with tracing.held(tracing.thread_of(process.pid, "kvferry-ferry")):
            assert process.stdout.readline() == "the transport's thread has stood still for 1.2 s\n"
    except CannotTraceError as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("process", ["0.1"], indirect=True)
def test_a_thread_that_has_ended(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    try:
        with tracing.held(tracing.thread_of(process.pid, "kvferry-ferry")) as thread:
            thread.end()
    except CannotTraceError as why:
        pytest.skip(str(why))
    assert process.stdout.readline() == "the transport's thread has ended\n"


@pytest.mark.parametrize("process", ["0.6"], indirect=True)
def test_a_thread_with_nothing_to_do_is_well(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with closing(process.stdin), pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.0)
    assert process.stdout.read() == ""


def test_looks_are_counted_from_where_it_stopped() -> None:
    pulse = Pulse(3)
    assert [pulse.stopped(now) for now in (1, 1, 1, 2, 2, 2, 2, 2)] == [False] * 6 + [True, True]
