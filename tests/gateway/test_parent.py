"""The parent of a gateway's processes, with children that a test plays."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.parent import Crew, _claimed, meeting_place
from gateway.seat import Seat
from services.runtime.config import load
from services.runtime.startup import StartupError

# Says its pid, listens, and ends when it is told to; what it is called with besides says otherwise.
CHILD = """
import os, signal, sys
number, folder, ready = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if "fail" in sys.argv:
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else lambda *_: sys.exit(0))
with open(f"{folder}/{number}.pids", "a") as pids:
    pids.write(f"{os.getpid()}\\n")
os.write(ready, b"x")
while True:
    signal.pause()
"""


def crew(folder: Path, count: int, *options: str) -> Crew:
    (folder / "metrics").mkdir(exist_ok=True)
    seats = [Seat(number, count, folder) for number in range(count)]
    return Crew((sys.executable, "-I", "-S", "-c", CHILD), options, seats)


def pids(folder: Path, number: int) -> list[int]:
    path = folder / f"{number}.pids"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_whoever_ends_is_started_again_and_the_others_go_on(tmp_path: Path) -> None:
    some = crew(tmp_path, 3)
    running = asyncio.create_task(some.run())
    try:
        await until(lambda: all(len(pids(tmp_path, number)) == 1 for number in range(3)))
        before = [pids(tmp_path, number) for number in range(3)]
        os.kill(before[1][0], signal.SIGKILL)
        await until(lambda: len(pids(tmp_path, 1)) == 2)
        assert [pids(tmp_path, number) for number in (0, 2)] == [before[0], before[2]]
        assert all(is_alive(pid) for pid in (before[0][0], before[2][0], pids(tmp_path, 1)[1]))
    finally:
        running.cancel()
        await some.stop(60)
    assert not any(is_alive(pid) for number in range(3) for pid in pids(tmp_path, number))


async def test_when_the_first_cannot_start_none_is_left(tmp_path: Path) -> None:
    some = crew(tmp_path, 3, "fail")
    with pytest.raises(StartupError, match="status 3"):
        await some.run()
    await some.stop(60)
    assert not any(pids(tmp_path, number) for number in range(3))


async def test_who_does_not_end_in_time_is_killed(tmp_path: Path) -> None:
    some = crew(tmp_path, 2, "deaf")
    running = asyncio.create_task(some.run())
    await until(lambda: all(pids(tmp_path, number) for number in range(2)))
    running.cancel()
    await some.stop(0.1)
    assert not any(is_alive(pids(tmp_path, number)[0]) for number in range(2))


async def test_they_die_with_their_parent(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    code = f"""
import asyncio, sys
from pathlib import Path
from gateway.parent import Crew
from gateway.seat import Seat
command = (sys.executable, "-I", "-S", "-c", {CHILD!r})
asyncio.run(Crew(command, (), [Seat(number, 2, Path({str(tmp_path)!r})) for number in range(2)]).run())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    await until(lambda: all(pids(tmp_path, number) for number in range(2)))
    children = [pids(tmp_path, number)[0] for number in range(2)]
    assert all(map(is_alive, children))
    parent.kill()
    await parent.wait()
    await until(lambda: not any(map(is_alive, children)))


def test_an_address_is_one_gateways() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            _claimed(address, "--listen"),  # held, but nobody listens
            pytest.raises(StartupError, match="another gateway; choose another with --listen"),
            _claimed(address, "--listen"),
        ):
            pass
        listener.listen()
        with pytest.raises(StartupError, match="in use by another process"), _claimed(address, "--listen"):
            pass


def test_what_a_killed_parent_left_is_removed_and_what_another_uses_is_not() -> None:
    with meeting_place(2) as in_use:
        abandoned = in_use.with_name(f"{in_use.name}-abandoned")
        (abandoned / "metrics").mkdir(parents=True)
        (abandoned / "lock").touch()
        with meeting_place(2) as mine:
            assert in_use.exists()
            assert not abandoned.exists()
            assert mine.stat().st_mode & 0o777 == 0o700
    assert not in_use.exists()
    assert not mine.exists()


def test_ports_to_share_have_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    from gateway.config import GatewayConfig

    with pytest.raises(SystemExit):
        load(GatewayConfig, ["--processes", "2", "--listen", "127.0.0.1:0"], "prog", environ={})
    assert "to share ports they must be named" in capsys.readouterr().err
