"""One stream for all requests on a worker, against a real gRPC server that plays the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from gateway.link import DecodeLink
from gateway.serving import WORKER_WINDOW_NBYTES
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import Error, UnavailableError
from services.runtime.channel import open_channel
from services.runtime.channels import Channels
from tests.gateway.played import Played, playing, token


@dataclass
class Heard:
    events: asyncio.Queue[worker_pb2.DecodeEvent] = field(default_factory=asyncio.Queue)
    lost: asyncio.Queue[Error] = field(default_factory=asyncio.Queue)

    def on_event(self, _kind: str | None, event: worker_pb2.DecodeEvent) -> None:
        self.events.put_nowait(event)

    def on_lost(self, error: Error) -> None:
        self.lost.put_nowait(error)

    async def indices(self, count: int) -> list[int]:
        return [(await self.events.get()).token.index for _ in range(count)]


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Played, DecodeLink]]:
    async with playing() as (played, address), open_channel(address) as channel:
        link = DecodeLink(channel)
        try:
            yield played, link
        finally:
            await link.aclose()


def ask(link: DecodeLink, request_id: str = "") -> tuple[int, Heard]:
    heard = Heard()
    return link.open(worker_pb2.DecodeOpen(request_id=request_id), heard), heard


async def test_requests_share_one_stream_and_hear_their_own() -> None:
    async with linked() as (played, link):
        one, first = ask(link, "one")
        two, second = ask(link, "two")
        opened = [(await played.sent.get()).open for _ in range(2)]
        assert [(request.handle, request.request_id) for request in opened] == [(one, "one"), (two, "two")]
        played.say(token(two, 0), token(one, 0), token(two, 1))
        played.say(token(one, 1))
        assert await first.indices(2) == [0, 1]
        assert await second.indices(2) == [0, 1]
        assert played.num_streams == 1


async def test_what_a_gateway_does_not_read_waits_at_the_worker() -> None:
    """There it gathers; on the way it would only grow old."""
    sent_nbytes = {}
    for window_nbytes in (None, WORKER_WINDOW_NBYTES):
        async with (
            playing() as (played, address),
            Channels(window_nbytes=window_nbytes) as channels,
        ):
            call = worker_pb2_grpc.DecodeServiceStub(channels.get(address)).Decode()
            while played.num_streams == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            step = [token(1, index) for index in range(64)]
            for _ in range(1000):
                played.say(*step)
            seen = -1
            while seen != played.num_left_to_say:
                seen = played.num_left_to_say
                await asyncio.sleep(0.1)
            sent_nbytes[window_nbytes] = (1000 - seen) * worker_pb2.DecodeResponse(events=step).ByteSize()
            call.cancel()
    assert sent_nbytes[None] > 60_000
    assert sent_nbytes[WORKER_WINDOW_NBYTES] < 2 * WORKER_WINDOW_NBYTES


async def test_after_its_end_or_its_cancellation_a_request_hears_nothing() -> None:
    async with linked() as (played, link):
        ended, first = ask(link)
        cancelled, second = ask(link)
        for _ in range(2):
            await played.sent.get()
        link.cancel(cancelled)
        assert (await played.sent.get()).cancel.handle == cancelled
        played.say(worker_pb2.DecodeEvent(handle=ended, finished=worker_pb2.DecodeFinished()))
        played.say(token(cancelled, 0), token(ended, 1))
        other, third = ask(link)
        played.say(token(other, 0))
        assert await third.indices(1) == [0]
        assert (await first.events.get()).HasField("finished")
        assert first.events.empty()
        assert second.events.empty()
        played.vanish()
        await third.lost.get()
        assert first.lost.empty()
        assert second.lost.empty()


async def test_a_lost_stream_is_every_requests_loss_and_comes_back_when_asked_for() -> None:
    async with linked() as (played, link):
        listeners = [ask(link)[1] for _ in range(3)]
        for _ in listeners:
            await played.sent.get()
        played.vanish()
        errors = [await heard.lost.get() for heard in listeners]
        assert {type(error) for error in errors} == {UnavailableError}
        with pytest.raises(UnavailableError, match="lost a moment ago"):
            ask(link)
        assert played.num_streams == 1, "nobody asked for another"
        await asyncio.sleep(0.11)  # the first bound of the backoff
        handle, heard = ask(link)
        assert (await played.sent.get()).open.handle == handle
        played.say(token(handle, 0))
        assert await heard.indices(1) == [0]
        assert played.num_streams == 2


async def test_a_worker_that_is_not_there_is_a_loss_at_once() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        link = DecodeLink(channel)
        _, heard = ask(link)
        assert isinstance(await asyncio.wait_for(heard.lost.get(), 10), UnavailableError)
        await link.aclose()
