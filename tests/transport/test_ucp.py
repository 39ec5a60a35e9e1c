"""What only the UCX backend has: settings, processes that hang or die badly, and the ways it can be missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

import transport
from tests.transport.peer import InProcessPeer, ProcessPeer
from transport import BackendUnavailable, Op, OutOfMemory, PeerLost, TransferCancelled, Transport, TransportClosed, ucp

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
TCP = {"UCX_TLS": "tcp,self"}


@pytest.fixture
def ours() -> Iterator[Transport]:
    with transport.create("ucx") as t:
        yield t


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("UCX_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_stopped_peer_holds_up_neither_open_nor_close(ours: Transport) -> None:
    with closing(ProcessPeer("ucx")) as peer:
        descriptor = peer.allocate(MIB)
        peer.stop()
        started = time.monotonic()
        with pytest.raises(PeerLost, match="cannot be reached"):
            ours.open(descriptor)
        assert 1.5 < time.monotonic() - started < 4


def test_closing_over_tcp_does_not_wait_for_a_peer_that_hangs() -> None:
    code = """
        import sys, time, transport
        from tests.transport.peer import ProcessPeer
        peer, t = ProcessPeer("ucx"), transport.create("ucx")
        with t.allocate(1 << 20) as local:
            remote = t.open(peer.allocate(1 << 20))
            peer.stop()
            transfer = t.post(transport.Op.WRITE, local, remote, [0] * 512, [0] * 512, 1 << 20)
            started = time.monotonic()
            transfer.cancel()
            try:
                transfer.wait(0.2)
            except TimeoutError:
                print("no proof, no outcome")
            t.close()
            print(type(transfer.future.exception(0)).__name__, time.monotonic() - started < 4)
        peer.process.kill()
        peer.close()
        """
    done = run_python(code, **TCP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["no proof, no outcome", "TransportClosed True"]


WRITER = """
    import sys, transport
    with transport.create("ucx") as t, t.allocate(1 << 20) as local:
        remote = t.open(bytes.fromhex(sys.stdin.readline()))
        transfers = [t.post(transport.Op[sys.argv[1]], local, remote, [0] * 65536, [0] * 65536, 1 << 20) for _ in range(3)]
        print(remote.path.name, flush=True)
        transfers[0].wait(60)
    """


# Not reads over tcp: UCX emulates those by answers of the owner, and aborts it when an answer meets a dead reader.
@pytest.mark.parametrize(
    ("op", "environment", "path"),
    [("WRITE", {}, "MAPPED"), ("READ", {}, "MAPPED"), ("WRITE", TCP, "RMA")],
    ids=["write", "read", "write-tcp"],
)
def test_owners_survive_the_death_of_those_who_use_them(op: str, environment: dict[str, str], path: str) -> None:
    with closing(ProcessPeer("ucx", **environment)) as owner:
        descriptor = owner.allocate(MIB)
        for delay_s in (0.0, 0.05):
            writer = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(WRITER), op],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, **environment},
            )
            with writer:
                assert writer.stdin is not None
                assert writer.stdout is not None
                writer.stdin.write(descriptor.hex() + "\n")
                writer.stdin.flush()
                assert writer.stdout.readline().strip() == path
                time.sleep(delay_s)
                writer.kill()
            assert writer.returncode == -signal.SIGKILL
            owner.fill(0, b"alive")
            assert owner.read(0, 5) == b"alive"


def test_a_first_read_may_overtake_a_big_write(ours: Transport) -> None:
    with closing(InProcessPeer("ucx")) as peer:
        local, remote = ours.allocate(MIB), ours.open(peer.allocate(MIB))
        big = ours.post(Op.WRITE, local, remote, [0] * 4096, [0] * 4096, MIB)
        small = ours.post(Op.READ, local, remote, [0], [0], 1)
        assert small.wait(5).queued_s < 0.1
        big.cancel()
        with pytest.raises(TransferCancelled):
            big.wait(5)


class Roomy(NamedTuple):
    f_bavail: int = 1 << 60
    f_frsize: int = 1


def test_a_pool_that_does_not_fit_says_what_to_do(ours: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemory, match=r"does not fit: /dev/shm has \d+ bytes left; .*--shm-size"):
        ours.allocate(1 << 59)
    monkeypatch.setattr(os, "statvfs", lambda _: Roomy())
    with pytest.raises(OutOfMemory, match=r"does not fit: \d+ bytes are free; make the region smaller"):
        ours.allocate(1 << 59)
    monkeypatch.undo()
    monkeypatch.setenv("UCX_POSIX_DIR", "/no/such/place")
    with pytest.raises(OutOfMemory, match="mount a tmpfs"):
        ours.allocate(4096)


def test_a_segment_that_fails_all_the_same_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_POSIX_DIR", "/proc")  # exists, and no file can be made there
    monkeypatch.setattr(os, "statvfs", lambda _: Roomy())
    with transport.create("ucx") as t, pytest.raises(OutOfMemory, match=r"could not allocate 4096 bytes: .*--shm-size"):
        t.allocate(4096)


def test_a_missing_ucx_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_UCX_HOME", "/no/such/place")
    with pytest.raises(BackendUnavailable, match=r"no libucp\.so\.0 under /no/such/place: point KVFERRY_UCX_HOME"):
        ucp._load.__wrapped__()


def test_an_old_ucx_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucp, "OLDEST_UCX", (99, 1))
    with pytest.raises(BackendUnavailable, match=r"UCX \d+\.\d+\.\d+ is too old, kvferry needs 99.1"):
        ucp._load.__wrapped__()


def test_transports_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="there are ucx and loopback"):
        transport.create("carrier-pigeon")
    done = run_python('import transport; transport.create("ucx")', UCX_TLS="pigeon")
    assert "BackendUnavailable: UCX could not start with UCX_TLS=pigeon" in done.stderr


def test_settings_of_the_user_win_and_the_exit_is_clean() -> None:
    code = """
        import os, transport
        with transport.create("ucx") as t:
            t.allocate(4096)
        print(os.environ["UCX_TLS"], os.environ["UCX_KEEPALIVE_INTERVAL"], os.environ["UCX_RNDV_THRESH"])
        """
    done = run_python(code, UCX_TLS="posix,tcp,self", UCX_KEEPALIVE_INTERVAL="7s")
    assert (done.returncode, done.stdout.split()) == (0, ["posix,tcp,self", "7s", "inf"])
    assert done.stderr == ""


def test_a_transport_that_nobody_closed_does_not_disturb_the_exit() -> None:
    done = run_python('import transport; t = transport.create("ucx"); r = t.allocate(4096); v = r.view')
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_it_is_light() -> None:
    heavy = {"torch", "grpc", "kvferry", "libucx", "services"}
    done = run_python("import transport, sys; transport.create('ucx').close(); print(*sys.modules)")
    assert heavy.isdisjoint(done.stdout.split())


def test_closed_is_closed(ours: Transport) -> None:
    ours.close()
    with pytest.raises(TransportClosed):
        ours.allocate(4096)
