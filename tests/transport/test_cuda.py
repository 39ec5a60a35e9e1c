"""Regions on a GPU, with a stand-in for the CUDA driver whose memory is the host's: every call that is made of it, and UCX
between two such regions by tcp.  What UCX does with the memory of a real one, tests/gpu asks."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import transport
from transport import BackendUnavailable, Op, OutOfMemory, RegionBusy, Transport, TransportError, cuda, ucp
from transport import Path as Way

MIB = 1 << 20


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", built, source], check=True)
    return built


@pytest.fixture
def gpus(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Two of them; whatever was allocated or retained is given back in the end."""
    monkeypatch.setattr(cuda, "LIBRARY", str(library))
    cuda.driver.cache_clear()
    yield cuda.driver()
    counts = [ctypes.c_int.in_dll(cuda.driver(), f"fake_{name}").value for name in ("allocated", "retained")]
    cuda.driver.cache_clear()
    assert counts == [0, 0]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda, "LIBRARY", "libnowhere.so.1")
    cuda.driver.cache_clear()
    yield
    cuda.driver.cache_clear()


@pytest.fixture
def ours() -> Iterator[Transport]:
    with transport.create("ucx") as t:
        yield t


def fill(address: int, content: bytes) -> None:
    ctypes.memmove(address, content, len(content))


def test_a_region_of_a_gpu_is_zeroed_and_read_piece_by_piece(gpus: ctypes.CDLL, ours: Transport) -> None:
    with ours.allocate(MIB, device=1) as region:
        assert region.device == 1
        assert bytes(region.fetch([0], MIB)) == bytes(MIB)
        fill(region.address, bytes(range(100)))
        assert bytes(region.fetch([10, 50, 0], 4)) == bytes([10, 11, 12, 13, 50, 51, 52, 53, 0, 1, 2, 3])
        with pytest.raises(TransportError, match="GPU"):
            _ = region.view


def test_a_region_of_the_host_is_read_the_same_way(ours: Transport) -> None:
    with ours.allocate(MIB) as region:
        region.view[10:14] = b"abcd"
        assert region.device is None
        assert bytes(region.fetch([12, 10], 2)) == b"cdab"


def test_blocks_go_from_gpu_to_gpu_and_between_gpu_and_host(gpus: ctypes.CDLL, ours: Transport) -> None:
    with transport.create("ucx") as theirs:
        for our_device, their_device in ((0, 1), (0, None), (None, 0)):
            with ours.allocate(MIB, our_device) as local, theirs.allocate(MIB, their_device) as target:
                fill(local.address, b"\x05" * MIB)
                with ours.open(target.descriptor) as remote:
                    assert remote.path is Way.RMA
                    assert "GPU" in remote.why_not_mapped
                    ours.post(Op.WRITE, local, remote, [0, 8192], [4096, 65536], 4096).wait(30)
                    assert bytes(target.fetch([4096, 65536, 0], 4096)) == b"\x05" * 8192 + bytes(4096)
                    fill(local.address, bytes(MIB))
                    ours.post(Op.READ, local, remote, [0], [4096], 4096).wait(30)
                    assert bytes(local.fetch([0], 4096)) == b"\x05" * 4096


def test_memory_of_a_gpu_is_lent(gpus: ctypes.CDLL, ours: Transport) -> None:
    with ours.allocate(MIB, device=1) as region:
        borrowed = transport.borrow(region.lend())
        assert (borrowed.device, borrowed.nbytes) == (1, MIB)
        fill(borrowed.address, b"abcd")
        assert bytes(region.fetch([0], 4)) == b"abcd"
        with pytest.raises(TransportError, match="GPU"):
            _ = borrowed.view
        gpus.cuDevicePrimaryCtxRelease_v2(1)  # as the process's end does


def test_memory_of_a_gpu_that_is_not_there_is_not_borrowed(gpus: ctypes.CDLL, ours: Transport) -> None:
    with pytest.raises(TransportError, match="GPU 2: memory of another process: no such GPU"):
        cuda.open_exported(2, bytes(64))
    with pytest.raises(TransportError, match="GPU 0: memory of another process: opening"):
        cuda.open_exported(0, bytes(64))  # a handle of nothing


def test_an_owner_that_has_given_its_region_up_is_found_out(gpus: ctypes.CDLL, ours: Transport) -> None:
    region = ours.allocate(MIB, device=0)
    mark = region.address + MIB
    assert ctypes.c_uint64.from_address(mark).value == ours.incarnation  # type: ignore[attr-defined]
    region._device.give_up()  # type: ignore[union-attr]
    assert ctypes.c_uint64.from_address(mark).value == 0
    region.release()


def test_what_was_mapped_before_there_was_a_gpu_takes_nothing_from_one(gpus: ctypes.CDLL, ours: Transport) -> None:
    with transport.create("ucx") as theirs, theirs.allocate(MIB) as target, ours.open(target.descriptor) as remote:
        assert remote.path is Way.MAPPED
        with ours.allocate(MIB, device=0) as local, pytest.raises(ValueError, match="open it again"):
            ours.post(Op.WRITE, local, remote, [0], [0], 4096)


def test_more_than_the_gpu_has_is_refused(gpus: ctypes.CDLL, ours: Transport) -> None:
    with pytest.raises(OutOfMemory, match=r"GPU 0 has no .* make it smaller"):
        ours.allocate(65 << 20, device=0)


def test_a_gpu_that_is_not_there_is_refused(gpus: ctypes.CDLL, ours: Transport) -> None:
    assert cuda.device_count() == 2
    with pytest.raises(TransportError, match="GPU 2: no such GPU: invalid device ordinal"):
        ours.allocate(MIB, device=2)


@pytest.mark.parametrize(
    ("version", "carries"),
    [
        ((1, 12, 0), False),
        ((1, 19, 9), False),
        ((1, 20, 0), False),
        ((1, 20, 1), True),
        ((1, 22, 0), True),
        ((2, 0, 0), True),
    ],
)
def test_since_when_ucx_carries_gpus(version: tuple[int, int, int], carries: bool) -> None:
    assert ucp.carries_gpus(version) is carries


def test_a_ucx_that_would_take_tcp_has_pools_of_the_host_alone(
    gpus: ctypes.CDLL, ours: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ucp, "OLDEST_UCX_FOR_GPUS", (99, 0, 1))
    ours.allocate(MIB).release()
    with pytest.raises(
        BackendUnavailable, match=r"UCX \d+\.\d+\.\d+ would .* over TCP; .* needs UCX 99\.0\.1 or newer: pip"
    ):
        ours.allocate(MIB, device=0)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_driver_there_are_no_gpus(ours: Transport) -> None:
    assert cuda.device_count() == 0
    with pytest.raises(BackendUnavailable, match="install it, or use --device cpu"):
        ours.allocate(MIB, device=0)


def test_the_loopback_has_none() -> None:
    with transport.create("loopback") as t, pytest.raises(BackendUnavailable):
        t.allocate(MIB, device=0)


def test_a_region_in_use_is_not_released(gpus: ctypes.CDLL, ours: Transport) -> None:
    with (
        transport.create("ucx") as theirs,
        theirs.allocate(16 * MIB) as target,
        ours.allocate(16 * MIB, device=0) as local,
        ours.open(target.descriptor) as remote,
    ):
        under_way = ours.post(Op.WRITE, local, remote, [0], [0], 16 * MIB)
        with pytest.raises(RegionBusy):
            local.release()
        under_way.wait(30)
