"""What ranks say to each other, over a real pair of sockets."""

from __future__ import annotations

import socket
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.batch import Batch, Entry, build_batch
from services.engine.parallel.frames import FrameError, Kind, Pipe, Setup, pack_step, unpack_step
from services.engine.sampling_params import Sampling

SETUP = Setup(
    rank=1, size=2, model="/m", revision="r", dtype="float32", block_size=16, num_blocks=8, max_running=4, threads=1,
    cpus=(2, 3), device=None, compiled=True, pool="00ff", store="/s", log_name="decode-0", log_level="info",
    returns_early=False,
)  # fmt: skip


def entry(draw: st.DrawFn) -> Entry:
    start, length = draw(st.integers(0, 40)), draw(st.integers(1, 20))
    table = draw(st.lists(st.integers(0, 1000), min_size=-(-(start + length) // 4), max_size=30))
    drafts = draw(st.integers(0, length - 1))
    return Entry([7] * length, start, table, draw(st.sampled_from([None, Sampling(seed=3)])), drafts)


@given(st.lists(st.composite(entry)(), max_size=5))
def test_a_step_arrives_as_it_was_sent(entries: list[Entry]) -> None:
    batch = build_batch(entries, 4)
    found = unpack_step(pack_step(batch))
    for field in fields(Batch):
        sent, arrived = getattr(batch, field.name), getattr(found, field.name)
        if field.name == "samples":
            assert [s.row for s in sent] == [s.row for s in arrived]
        else:
            assert sent.dtype == arrived.dtype
            assert np.array_equal(sent, arrived)
            assert arrived.flags.writeable


def test_a_step_of_another_length_is_refused() -> None:
    packed = pack_step(build_batch([Entry([1, 2], 0, [3], Sampling())], 4))
    for wrong in (packed[:-1], packed + b"\0", b"", packed[:8]):
        with pytest.raises(FrameError):
            unpack_step(wrong)


def test_a_setup_arrives_as_it_was_sent() -> None:
    assert Setup.unpack(SETUP.pack()) == SETUP
    assert Setup.unpack(replace(SETUP, device=1, cpus=()).pack()) == replace(SETUP, device=1, cpus=())
    for wrong in (b"{}", b"[]", b"\xff", SETUP.pack().replace(b'"rank"', b'"rang"')):
        with pytest.raises(FrameError):
            Setup.unpack(wrong)


def test_frames_come_in_order_and_the_end_is_seen() -> None:
    ours, theirs = (Pipe(end) for end in socket.socketpair())
    ours.send(Kind.STEP, b"x" * 100_000)
    ours.send(Kind.STOP)
    assert theirs.receive() == (Kind.STEP, b"x" * 100_000)
    assert theirs.receive() == (Kind.STOP, b"")
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive()
    theirs.close()


@pytest.mark.parametrize("garbage", [b"\x63\0\0\0\0", b"\x03\xff\xff\xff\xff"])
def test_what_is_no_frame_is_refused(garbage: bytes) -> None:
    sender, receiver = socket.socketpair()
    sender.sendall(garbage)
    with pytest.raises(FrameError):
        Pipe(receiver).receive()
    sender.close()
    receiver.close()
