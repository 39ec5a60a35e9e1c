"""Segments by themselves: whose they are, what they are made of, and what is said when they cannot be had."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
from collections.abc import Iterator

import pytest

import transport
from transport import OutOfMemory, PeerLost, segments
from transport.segments import HUGE_PAGE, CannotMap, Segment, make_segment, open_segment

MINE = 7


@pytest.fixture
def owned() -> Iterator[Segment]:
    segment = make_segment(3 * HUGE_PAGE + 5000, MINE)
    yield segment
    segment.unmap()


def kib_of(address: int, what: str) -> int | None:
    """A figure of proc(5)'s smaps, None when nothing is mapped there."""
    with open("/proc/self/smaps") as smaps:
        lines = iter(smaps)
        if not any(line.startswith(f"{address:x}-") for line in lines):
            return None
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def test_peers_see_the_same_bytes_and_nothing_outlives_the_last_of_them(owned: Segment) -> None:
    files = set(os.listdir("/proc/self/fd"))
    peer = open_segment(owned.name, owned.nbytes, MINE)
    ctypes.memset(peer.address + owned.nbytes - 1, 0x5A, 1)
    assert ctypes.string_at(owned.address + owned.nbytes - 2, 2) == b"\0\x5a"
    assert peer.address != owned.address
    assert kib_of(peer.address, "Rss") == kib_of(owned.address, "Rss") == owned.mapped_nbytes >> 10
    peer.unmap()
    peer.unmap()
    assert kib_of(peer.address, "Rss") is None
    assert set(os.listdir("/proc/self/fd")) == files


def test_pages_are_huge_for_both_where_the_kernel_gives_them(owned: Segment) -> None:
    if not owned.huge:
        pytest.skip("this kernel gives no pages of 2 MiB to shared memory")
    peer = open_segment(owned.name, owned.nbytes, MINE)
    for segment in (owned, peer):
        assert kib_of(segment.address, "ShmemPmdMapped") == 3 * HUGE_PAGE >> 10
    peer.unmap()


def test_without_huge_pages_every_page_is_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_collapse", lambda start, stop: False)
    segment = make_segment(2 * HUGE_PAGE, MINE)
    assert not segment.huge
    assert kib_of(segment.address, "Rss") == segment.mapped_nbytes >> 10
    segment.unmap()


def test_only_the_segment_that_was_meant_is_mapped(owned: Segment) -> None:
    name, nbytes = owned.name, owned.nbytes
    other = os.open("/dev/null", os.O_RDWR)
    for wrong_name, wrong_nbytes, incarnation in (
        (name, nbytes, MINE + 1),  # a process that came after, at the same place
        (name, nbytes - HUGE_PAGE, MINE),
        (name, nbytes + HUGE_PAGE, MINE),
        (dataclasses.replace(name, fd=other), nbytes, MINE),
        (dataclasses.replace(name, fd=999), nbytes, MINE),
        (dataclasses.replace(name, pid=2**22 - 1), nbytes, MINE),
    ):
        with pytest.raises(PeerLost, match="ended"):
            open_segment(wrong_name, wrong_nbytes, incarnation)
    with pytest.raises(CannotMap, match="another host or in another PID namespace"):
        open_segment(dataclasses.replace(name, host=bytes(16)), nbytes, MINE)
    os.close(other)


def test_a_segment_keeps_its_size_and_one_that_may_shrink_is_not_mapped(owned: Segment) -> None:
    """A store behind the end of a file that its owner made smaller would kill the writer."""
    with pytest.raises(PermissionError):
        os.truncate(owned.name.path, 4096)
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    with open(owned.name.path, "rb") as sealed:
        os.write(loose, sealed.read())
    with pytest.raises(PeerLost):
        open_segment(dataclasses.replace(owned.name, fd=loose), owned.nbytes, MINE)
    os.close(loose)


def test_a_segment_given_up_is_seen_as_such_and_not_opened_again(owned: Segment) -> None:
    peer, name = open_segment(owned.name, owned.nbytes, MINE), owned.name
    owned.give_up()
    assert ctypes.string_at(peer.mark_address, 8) == bytes(8)
    with pytest.raises(PeerLost):
        open_segment(name, owned.nbytes, MINE)
    peer.unmap()


def test_what_another_user_owns_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch, owned: Segment) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CannotMap, match="Permission denied; both processes must belong to the same user"):
        open_segment(owned.name, owned.nbytes, MINE)


def test_too_large_a_region_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with transport.create("ucx") as t:
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(OutOfMemory, match=r"does not fit: \d+ bytes are free; make the region smaller"):
            t.allocate(1 << 60)
        monkeypatch.setattr(segments, "_populate_part", lambda start, stop: errno.EFAULT)
        with pytest.raises(OutOfMemory, match="cannot be had: Cannot allocate memory; make the region smaller"):
            t.allocate(4096)
        assert set(os.listdir("/proc/self/fd")) <= before


def test_a_control_groups_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]) -> None:
    machine = segments.available_memory()
    monkeypatch.setattr(segments, "CONTROL_GROUP", tmp_path)
    for name, value in (("memory.max", "max"), ("memory.current", "4096")):
        with open(os.path.join(tmp_path, name), "w") as file:
            file.write(value)
    assert segments.available_memory() > machine // 2
    with open(os.path.join(tmp_path, "memory.max"), "w") as file:
        file.write("12288")
    assert segments.available_memory() == 8192
