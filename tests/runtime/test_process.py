from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from services.runtime import process
from services.runtime.process import ProcessIdentity, has_ended, this_process


def identity_of(pid: int) -> ProcessIdentity:
    return replace(this_process(), pid=pid, start_time_ticks=process._stat(pid)[1])


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def wait_for_zombie(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_this_process_runs_and_survives_the_wire() -> None:
    identity = this_process()
    assert identity.pid == os.getpid()
    assert ProcessIdentity.from_proto(identity.to_proto()) == identity
    assert has_ended(identity) is False


def test_a_living_child_has_not_ended(child: subprocess.Popen[bytes]) -> None:
    assert has_ended(identity_of(child.pid)) is False


def test_a_killed_child_has_ended_as_zombie_and_when_reaped(child: subprocess.Popen[bytes]) -> None:
    identity = identity_of(child.pid)
    child.send_signal(signal.SIGKILL)
    wait_for_zombie(child.pid)
    assert process._stat(child.pid)[0] == "Z"
    assert has_ended(identity) is True
    child.wait(timeout=5)
    assert has_ended(identity) is True


def test_a_stopped_child_has_not_ended(child: subprocess.Popen[bytes]) -> None:
    identity = identity_of(child.pid)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert has_ended(identity) is False


def test_another_start_time_is_another_process(child: subprocess.Popen[bytes]) -> None:
    identity = identity_of(child.pid)
    assert has_ended(replace(identity, start_time_ticks=identity.start_time_ticks - 1)) is True


def test_a_process_whose_first_thread_has_ended_still_runs() -> None:
    # The kernel shows such a process as a zombie, though its other threads can go on writing.
    code = (
        "import ctypes, sys, threading\n"
        "def hold():\n"
        "    while process_is_not_zombie(): pass\n"
        "    sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()\n"
        "def process_is_not_zombie():\n"
        "    return open('/proc/self/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'\n"
        "threading.Thread(target=hold).start()\n"
        "ctypes.PyDLL(None).syscall(60, 0)\n"
    )
    # exit(2) ends one thread only; its number is 60 on x86-64 and 93 on arm64.
    code = code.replace("60", "93" if os.uname().machine == "aarch64" else "60")
    code = code.replace("PyDLL", "CDLL")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            identity = identity_of(child.pid)
            assert process._stat(child.pid)[0] == "Z"
            assert has_ended(identity) is False
        finally:
            child.kill()
    assert has_ended(identity) is True


@pytest.mark.parametrize(
    "changes",
    [{"boot_id": "another-boot"}, {"pid_namespace": 1}, {"boot_id": ""}, {"pid": 0}],
    ids=lambda c: next(iter(c)),
)
def test_what_cannot_be_known_from_here(changes: dict[str, object]) -> None:
    assert has_ended(replace(this_process(), **changes)) is None  # type: ignore[arg-type]


def test_a_hidden_process_is_not_taken_for_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(_pid: int) -> tuple[str, int]:
        raise FileNotFoundError

    identity = this_process()
    monkeypatch.setattr(process, "_stat", hidden)
    assert has_ended(identity) is None


def test_the_command_name_may_be_anything() -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); open('/proc/self/comm', 'w').write('a) Z 1 (b')\n"
        "from services.runtime.process import this_process, has_ended; sys.exit(has_ended(this_process()) is not False)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=20, check=False).returncode == 0
