"""What every backend promises.  test_variants.py runs this file once more over other UCX transports and versions."""

from __future__ import annotations

import asyncio
import gc
import operator
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

import transport
from tests.transport.peer import Peer, ProcessPeer
from transport import (
    Op,
    OutOfBounds,
    Path,
    PeerLost,
    Region,
    RegionBusy,
    RemoteRegion,
    TransferCancelled,
    Transport,
    TransportClosed,
)

BLOCK = 4096
NUM_BLOCKS = 64
MIB = 1 << 20


def fill(region: Region, seed: int) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, region.nbytes, np.uint8).tobytes()
    region.view[:] = data
    return data


def endless(num_pieces: int = 8192) -> tuple[list[int], list[int], int]:
    """The same MiB again and again: far more bytes than a test would wait for."""
    return [0] * num_pieces, [0] * num_pieces, MIB


def test_scattered_blocks_arrive_where_they_belong_and_nowhere_else(ours: Transport, peer: Peer) -> None:
    remote_bytes = NUM_BLOCKS * BLOCK
    with ours.allocate(remote_bytes) as local, ours.open(peer.allocate(remote_bytes)) as remote:
        data = fill(local, 1)
        rng = np.random.default_rng(2)
        here, there = rng.permutation(NUM_BLOCKS)[:40] * BLOCK, rng.permutation(NUM_BLOCKS)[:40] * BLOCK
        result = ours.post(Op.WRITE, local, remote, here, there, BLOCK).wait(5)
        expected = bytearray(remote_bytes)
        for h, t in zip(here, there, strict=True):
            expected[t : t + BLOCK] = data[h : h + BLOCK]
        assert peer.read(0, remote_bytes) == bytes(expected)
        assert (result.nbytes, result.num_blocks) == (40 * BLOCK, 40)
        assert bytes(local.view) == data


def test_reads_bring_scattered_blocks_of_unequal_sizes(ours: Transport, peer: Peer) -> None:
    theirs = bytes(range(256)) * 64
    with ours.allocate(len(theirs)) as local, ours.open(peer.allocate(len(theirs))) as remote:
        peer.fill(0, theirs)
        result = ours.post(Op.READ, local, remote, [0, 9000, 5000], [1000, 0, 16000], [777, 1, 384]).wait(5)
        expected = bytearray(len(theirs))
        expected[0:777] = theirs[1000:1777]
        expected[9000:9001] = theirs[0:1]
        expected[5000:5384] = theirs[16000:16384]
        assert bytes(local.view) == bytes(expected)
        assert result.nbytes == 777 + 1 + 384


def test_neighbours_on_both_sides_move_as_one(ours: Transport, peer: Peer) -> None:
    with ours.allocate(8 * BLOCK) as local, ours.open(peer.allocate(8 * BLOCK)) as remote:
        data = fill(local, 3)
        both = ours.post(Op.WRITE, local, remote, [0, BLOCK, 2 * BLOCK], [4 * BLOCK, 5 * BLOCK, 6 * BLOCK], BLOCK).wait(
            5
        )
        assert (both.num_blocks, both.num_pieces) == (3, 1)
        assert peer.read(4 * BLOCK, 3 * BLOCK) == data[: 3 * BLOCK]
        one_side = ours.post(Op.WRITE, local, remote, [0, BLOCK], [BLOCK, 0], BLOCK).wait(5)
        assert one_side.num_pieces == 2
        assert peer.read(0, 2 * BLOCK) == data[BLOCK : 2 * BLOCK] + data[:BLOCK]


def test_an_empty_batch_succeeds(ours: Transport, peer: Peer) -> None:
    with ours.allocate(BLOCK) as local, ours.open(peer.allocate(BLOCK)) as remote:
        for sizes in ([], BLOCK):
            assert ours.post(Op.WRITE, local, remote, [], [], sizes).wait(5).nbytes == 0
        assert ours.post(Op.WRITE, local, remote, [BLOCK], [0], 0).wait(5).num_pieces == 0


OUTSIDE = [  # local offsets in BLOCK bytes, remote offsets in 2 * BLOCK bytes, sizes
    ([0, BLOCK], [0, 0], BLOCK),
    ([0, 0], [0, 2 * BLOCK - 1], BLOCK // 2),
    ([1], [0], BLOCK),
    ([0], [0], BLOCK + 1),
    ([-1], [0], 1),
    ([0], [-BLOCK], BLOCK),
    ([0], [0], -1),
    ([2**64 - 1], [0], 2),
    ([0], [2**64 - BLOCK], BLOCK),
]


def test_pieces_outside_either_region_are_refused_before_a_byte_moves(ours: Transport, peer: Peer) -> None:
    with ours.allocate(BLOCK) as local, ours.open(peer.allocate(2 * BLOCK)) as remote:
        fill(local, 4)
        for here, there, sizes in OUTSIDE:
            with pytest.raises(OutOfBounds):
                ours.post(Op.WRITE, local, remote, here, there, sizes)
        assert ours.post(Op.READ, local, remote, [0], [0], 0).wait(5).nbytes == 0  # whatever was queued has run
        assert peer.read(0, 2 * BLOCK) == bytes(2 * BLOCK)
        assert ours.counters().num_posted == 1


def test_batches_that_make_no_sense_are_refused(ours: Transport, peer: Peer) -> None:
    with ours.allocate(BLOCK) as local, ours.open(peer.allocate(BLOCK)) as remote:
        with pytest.raises(ValueError, match="pair up"):
            ours.post(Op.WRITE, local, remote, [0, 1], [0], 1)
        with pytest.raises(TypeError, match="not integers"):
            ours.post(Op.WRITE, local, remote, np.array([0.5]), [0], 1)  # type: ignore[arg-type]


def test_a_cancelled_writer_has_stopped_when_it_says_so(ours: Transport, peer: Peer) -> None:
    with ours.allocate(MIB) as local, ours.open(peer.allocate(MIB)) as remote:
        local.view[:] = b"\1" * MIB
        transfer = ours.post(Op.WRITE, local, remote, *endless())
        transfer.cancel()
        with pytest.raises(TransferCancelled):
            transfer.wait(5)
        peer.fill(0, b"\2" * MIB)
        ours.post(Op.READ, local, remote, [0], [0], 1).wait(5)  # a full round behind whatever could still be coming
        assert peer.read(0, MIB) == b"\2" * MIB
        assert ours.counters().num_cancelled == 1
        transfer.cancel()  # after the end: nothing


def test_one_peers_cancel_and_big_batch_hold_up_nobody(ours: Transport, peer: Peer) -> None:
    with ours.allocate(MIB) as local, ours.open(peer.allocate(MIB)) as remote:
        big = ours.post(Op.WRITE, local, remote, *endless(256))
        small = ours.post(Op.READ, local, remote, [0], [0], 1)
        assert small.wait(5).nbytes == 1
        assert big.wait(10).nbytes == 256 * MIB


def test_closing_ends_the_work_in_flight(ours: Transport, peer: Peer) -> None:
    local = ours.allocate(MIB)
    view, remote = local.view, ours.open(peer.allocate(MIB))
    transfers = [ours.post(Op.WRITE, local, remote, *endless()) for _ in range(4)]
    started = time.monotonic()
    ours.close()
    assert time.monotonic() - started < 3
    for transfer in transfers:
        assert isinstance(transfer.future.exception(0), TransferCancelled | TransportClosed)
    for call in (
        lambda: ours.post(Op.WRITE, local, remote, [0], [0], 1),
        lambda: ours.allocate(BLOCK),
        lambda: ours.open(local.descriptor),
    ):
        with pytest.raises(TransportClosed):
            call()
    view[:1] = b"x"  # a forgotten array must not fault
    remote.close()
    local.release()
    ours.close()


def test_regions_in_use_are_not_given_up(ours: Transport, peer: Peer) -> None:
    local, remote = ours.allocate(MIB), ours.open(peer.allocate(MIB))
    transfer = ours.post(Op.WRITE, local, remote, *endless())
    for give_up in (local.release, remote.close):
        with pytest.raises(RegionBusy, match="transfers"):
            give_up()
    transfer.cancel()
    with pytest.raises(TransferCancelled):
        transfer.wait(5)
    for look in (lambda: np.frombuffer(local.view, np.uint8), lambda: local.view[8:], lambda: local.view):
        seen = look()
        with pytest.raises(RegionBusy, match="array"):
            local.release()
        assert seen[0] == 0
        del seen
    local.release()
    local.release()
    remote.close()
    with pytest.raises(TransportClosed):
        ours.post(Op.WRITE, local, remote, [0], [0], 1)
    with pytest.raises(TransportClosed):
        _ = local.view


def lose_peer(ours: Transport, peer: Peer, local: Region, remote: RemoteRegion) -> float:
    """Seconds from the peer's death, with a transfer under way, to the first error."""
    under_way = ours.post(Op.WRITE, local, remote, *endless(65536))
    ours.post(Op.WRITE, local, remote, [0], [0], 1).wait(5)  # in turns with the other one, which therefore has begun
    peer.die()
    died = time.monotonic()
    with pytest.raises(PeerLost):
        under_way.wait(5)
    return time.monotonic() - died


def test_a_peers_death_fails_the_transfer_and_nothing_else(
    ours: Transport, peer: Peer, new_peer: Callable[[], Peer], backend: str
) -> None:
    other = new_peer()
    with ours.allocate(MIB) as local, ours.open(other.allocate(MIB)) as bystander:
        with ours.open(descriptor := peer.allocate(MIB)) as remote:
            if backend != "loopback":
                assert lose_peer(ours, peer, local, remote) < 2
            else:  # one batch after the other: a second one would wait for ever
                under_way = ours.post(Op.WRITE, local, remote, *endless())
                peer.die()
                with pytest.raises(PeerLost):
                    under_way.wait(5)
            with pytest.raises(PeerLost):
                ours.post(Op.WRITE, local, remote, [0], [0], 1).wait(5)
        with pytest.raises(PeerLost):
            ours.open(descriptor)
        data = fill(local, 5)
        ours.post(Op.WRITE, local, bystander, [0], [0], MIB).wait(5)
        assert other.read(0, 4096) == data[:4096]
        restarted = new_peer()
        with ours.open(restarted.allocate(MIB)) as again:
            assert again.incarnation != remote.incarnation
            ours.post(Op.WRITE, local, again, [0], [0], MIB).wait(5)
            assert restarted.read(MIB - 4096, 4096) == data[-4096:]


def test_outcomes_are_delivered_in_the_attached_loop(ours: Transport, peer: Peer) -> None:
    async def main() -> None:
        ours.attach(asyncio.get_running_loop())
        with ours.allocate(MIB) as local, ours.open(peer.allocate(MIB)) as remote:
            transfers = [ours.post(Op.WRITE, local, remote, [i], [i], 1) for i in range(50)]
            threads = []
            transfers[0].future.add_done_callback(lambda _: threads.append(threading.get_ident()))
            async with asyncio.timeout(5):
                assert sum(r.nbytes for r in await asyncio.gather(*transfers)) == 50
            assert threads == [threading.get_ident()]
            stuck = ours.post(Op.WRITE, local, remote, *endless())
            with pytest.raises(RuntimeError, match="await"):
                stuck.wait(1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stuck, 0.01)
            assert not stuck.done  # giving up waiting stops nothing
            stuck.cancel()
            with pytest.raises(TransferCancelled):
                await asyncio.wait_for(stuck, 5)
            elsewhere = ours.post(Op.READ, local, remote, [0], [0], 1)
            assert (await asyncio.wait_for(asyncio.to_thread(elsewhere.wait, 3), 5)).nbytes == 1
        ours.detach()

    asyncio.run(main())


def test_threads_post_and_wait_side_by_side(ours: Transport, peer: Peer) -> None:
    num_threads, rounds = 4, 50
    with ours.allocate(num_threads * BLOCK) as local, ours.open(peer.allocate(num_threads * BLOCK)) as remote:
        data = fill(local, 6)
        failures: list[BaseException] = []

        def work(i: int) -> None:
            try:
                for _ in range(rounds):
                    ours.post(Op.WRITE, local, remote, [i * BLOCK], [i * BLOCK], BLOCK).wait(5)
            except BaseException as e:
                failures.append(e)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert failures == []
        assert peer.read(0, num_threads * BLOCK) == data
        assert ours.counters().num_succeeded == num_threads * rounds


def test_waiting_ends_on_time(ours: Transport, peer: Peer) -> None:
    assert ours.poll(0) == 0
    with ours.allocate(MIB) as local, ours.open(peer.allocate(MIB)) as remote:
        transfer = ours.post(Op.WRITE, local, remote, *endless())
        with pytest.raises(TimeoutError):
            transfer.wait(0.01)
        transfer.cancel()
        assert ours.poll(5) == 1
        assert transfer.done


def test_counters_tell_what_moved(ours: Transport, peer: Peer, backend: str) -> None:
    with ours.allocate(4 * BLOCK) as local, ours.open(peer.allocate(4 * BLOCK)) as remote:
        ours.post(Op.WRITE, local, remote, [0, 2 * BLOCK], [0, BLOCK], BLOCK).wait(5)
        ours.post(Op.READ, local, remote, [0], [0], 100).wait(5)
        expected = Path.LOOPBACK if backend == "loopback" else Path[os.environ.get("KVFERRY_TEST_PATH", "MAPPED")]
        assert remote.path is expected
        c = ours.counters()
        assert (c.num_posted, c.num_succeeded, c.num_pieces) == (2, 2, 3)
        assert (c.bytes_written, c.bytes_read) == (2 * BLOCK, 100)
        assert c.bytes_by_path == {expected: 2 * BLOCK + 100}


def test_both_sides_may_open_each_other_and_close(ours: Transport, backend: str) -> None:
    with transport.create(ours.name) as theirs:
        a, b = ours.allocate(BLOCK), theirs.allocate(BLOCK)
        back = theirs.open(a.descriptor)
        for _ in range(3):
            with ours.open(b.descriptor) as there:
                ours.post(Op.WRITE, a, there, [0], [0], BLOCK).wait(5)
            assert theirs.post(Op.READ, b, back, [0], [0], BLOCK).wait(5).nbytes == BLOCK


def shared_memory_of(pid: int) -> int:
    with open(f"/proc/{pid}/maps") as maps:
        return sum("ucx_shm" in line or "memfd" in line or "/dev/shm" in line for line in maps)


def test_opening_and_closing_leaves_nothing_behind(ours: Transport, peer: Peer) -> None:
    descriptor = peer.allocate(MIB)

    def use(t: Transport) -> None:
        with t.allocate(BLOCK) as local, t.open(descriptor) as remote:
            t.post(Op.WRITE, local, remote, [0], [0], BLOCK).wait(5)

    # A segment that another process of this machine is just making may be among them, and gone later.
    segments = set(os.listdir("/dev/shm"))

    def footprint() -> tuple[int, int, int, set[str]]:
        gc.collect()
        theirs = peer.num_open_files() if isinstance(peer, ProcessPeer) else 0
        left = set(os.listdir("/dev/shm")) - segments
        return len(os.listdir("/proc/self/fd")), theirs, shared_memory_of(os.getpid()), left

    def cycle() -> None:
        use(ours)
        with transport.create(ours.name) as t:
            use(t)

    def left_behind() -> str:
        """Less than before may be there: what others in this process had open."""
        now = footprint()
        return "" if all(map(operator.le, now, before)) else f"{now}, and before {before}"

    cycle()
    before = (*footprint()[:3], set[str]())
    for _ in range(20):
        cycle()
    deadline = time.monotonic() + 2
    while (left := left_behind()) and time.monotonic() < deadline:
        time.sleep(0.02)  # the peer hears of the last goodbye a moment later
    assert not left


def test_the_pulse_goes_on_with_nothing_to_do_and_ends_with_the_transport(backend: str) -> None:
    with transport.create(backend.removesuffix("-process")) as t:
        before, deadline = t.pulse(), time.monotonic() + 10
        while t.pulse() <= before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    with pytest.raises(TransportClosed):
        t.pulse()
