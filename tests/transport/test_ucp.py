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

import pytest

import transport
from tests.transport.exchange import exchange
from tests.transport.peer import InProcessPeer, ProcessPeer
from transport import BackendUnavailable, Op, OutOfBounds, TransferCancelled, Transport, TransportClosed, ucp

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
TCP = {"UCX_TLS": "tcp,self"}


WRITER = """
    import sys, transport
    with transport.create("ucx") as t, t.allocate(1 << 20) as local:
        remote = t.open(bytes.fromhex(sys.stdin.readline()))
        transfers = [t.post(transport.Op[sys.argv[1]], local, remote, [0] * 65536, [0] * 65536, 1 << 20) for _ in range(3)]
        print(remote.path.name, flush=True)
        transfers[0].wait(60)
    """


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


def test_a_mapped_pool_is_written_while_its_owner_hangs(ours: Transport) -> None:
    with closing(ProcessPeer("ucx")) as peer, ours.allocate(MIB) as local:
        local.view[:] = b"\x07" * MIB
        descriptor = peer.allocate(MIB)
        peer.stop()
        with ours.open(descriptor) as remote:
            ours.post(Op.WRITE, local, remote, [0], [0], MIB).wait(5)
        peer.process.send_signal(signal.SIGCONT)
        assert peer.read(MIB - 2, 2) == b"\x07\x07"


def test_memcpy_moves_what_it_is_told_to(ours: Transport) -> None:
    with ours.allocate(64) as source, ours.allocate(32) as to:
        source.view[:] = bytes(range(64))
        ucp.memcpy(to, source, [8, 0], [48, 16], 8)
        assert bytes(to.view) == bytes(range(16, 24)) + bytes(range(48, 56)) + bytes(16)
        for offsets in ([32], [0]), ([0], [60]):
            with pytest.raises(OutOfBounds):
                ucp.memcpy(to, source, *offsets, 8)


def test_ucx_tells_which_way_it_takes() -> None:
    """As tests/gpu asks it; what is mapped UCX does not carry."""
    assert exchange(None, None) == {}
    ways = exchange(None, None, **TCP)
    assert ways.keys() == {("write", "host"), ("read", "host")}
    assert all(taken.startswith("tcp/") for taken in ways.values())


def test_opening_over_tcp_to_a_peer_that_hangs_ends_and_holds_up_nobody() -> None:
    code = """
        import threading, time, transport
        from tests.transport.peer import ProcessPeer
        hung, fine, t = ProcessPeer("ucx"), ProcessPeer("ucx"), transport.create("ucx")
        to_hung, to_fine = hung.allocate(1 << 20), fine.allocate(1 << 20)
        hung.stop()
        def open_hung():
            try:
                t.open(to_hung)
            except transport.PeerLost as e:
                print(e, 1.5 < time.monotonic() - started < 4)
        started = time.monotonic()
        thread = threading.Thread(target=open_hung)
        thread.start()
        time.sleep(0.2)
        with t.open(to_fine) as remote:
            print(remote.path.name, remote.why_not_mapped, time.monotonic() - started < 1)
        thread.join()
        t.close()
        hung.process.kill()
        hung.close()
        fine.close()
        """
    done = run_python(code, **TCP)
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.split("\n")
    assert first == "RMA the owner's UCX_TLS allows no shared memory, or its pool is a GPU's True"
    assert second.startswith("the region's owner cannot be reached")
    assert second.endswith("True")


def test_a_write_over_tcp_to_an_owner_that_hangs_fails_in_time() -> None:
    """Its kernel answers, so no connection breaks."""
    code = """
        import time, transport, transport.ucp
        from tests.transport.peer import ProcessPeer
        transport.ucp.STALL_TIMEOUT_MS = 1000
        hung, fine, t = ProcessPeer("ucx"), ProcessPeer("ucx"), transport.create("ucx")
        with t.allocate(1 << 20) as local, t.open(fine.allocate(1 << 20)) as bystander:
            with t.open(hung.allocate(1 << 20)) as remote:
                hung.stop()
                transfer = t.post(transport.Op.WRITE, local, remote, [0] * 512, [0] * 512, 1 << 20)
                started = time.monotonic()
                try:
                    transfer.wait(10)
                except transport.PeerLost:
                    print(0.9 < time.monotonic() - started < 5)
            print(t.post(transport.Op.WRITE, local, bystander, [0], [0], 1 << 20).wait(5).nbytes)
        t.close()
        hung.process.kill()
        hung.close()
        fine.close()
        """
    done = run_python(code, **TCP)
    assert (done.returncode, done.stdout) == (0, f"True\n{MIB}\n"), done.stderr


def test_behind_a_fence_a_dead_writers_bytes_have_all_come() -> None:
    code = """
        import sys, time, transport
        with transport.create("ucx") as t, t.allocate(1 << 20) as region:
            print(region.descriptor.hex(), flush=True)
            sys.stdin.readline()
            assert t.fence(5)
            region.view[:] = bytes(1 << 20)
            time.sleep(0.5)
            print(bytes(region.view) == bytes(1 << 20))
        """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("UCX_")} | TCP
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=clean,
    )  # fmt: skip
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), "WRITE"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=clean,
    )  # fmt: skip
    with owner, writer:
        assert owner.stdin is not None
        assert owner.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(owner.stdout.readline())
        writer.stdin.flush()
        assert writer.stdout.readline().strip() == "RMA"
        time.sleep(0.1)
        writer.kill()
        writer.wait(5)
        owner.stdin.write("it is dead\n")
        owner.stdin.flush()
        assert owner.stdout.readline().strip() == "True"


def test_closing_over_tcp_does_not_wait_for_a_peer_that_hangs() -> None:
    code = """
        import sys, time, transport
        from tests.transport.peer import ProcessPeer

        def outcome_known(transfer, timeout_s):
            try:
                transfer.wait(timeout_s)
            except TimeoutError:
                return False
            return True

        peer, t = ProcessPeer("ucx"), transport.create("ucx")
        try:
            with t.allocate(1 << 20) as local:
                remote = t.open(peer.allocate(1 << 20))
                peer.stop()
                transfer = t.post(transport.Op.WRITE, local, remote, [0] * 512, [0] * 512, 1 << 20)
                print("before", outcome_known(transfer, 1))  # what has not begun could be cancelled with proof
                started = time.monotonic()
                transfer.cancel()
                print("after", outcome_known(transfer, 0.2))
                t.close()
                print(type(transfer.future.exception(0)).__name__, time.monotonic() - started < 4)
        finally:
            peer.process.kill()
            peer.close()
        """
    done = run_python(code, **TCP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["before False", "after False", "TransportClosed True"]


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
