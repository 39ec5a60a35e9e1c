"""One stream for many requests, over a real scheduler whose steps the test takes one by one."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import grpc
import pytest
import structlog

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import InvalidRequestError, OverloadedError
from services.decode.reservations import Reservations, Terms
from services.decode.servicer import DecodeServicer
from services.decode.session import Session
from services.runtime.channels import Channels
from services.runtime.interceptor import RequestInterceptor
from services.runtime.tracing import REQUEST_ID_KEY
from services.worker.puller import Puller
from services.worker.servicer import drain
from services.worker.share import Share
from services.worker.worker import Worker
from tests.worker.tiny import NUM_BLOCKS, SAMPLING, HeldDigester, make_worker
from transport import Transport, create

NUM_TOKENS = SAMPLING.max_tokens
salts = (f"salt {i}".encode() for i in itertools.count())


@pytest.fixture
def transport() -> Iterator[Transport]:
    with create("loopback") as transport:
        yield transport


@pytest.fixture
async def worker(transport: Transport) -> Worker:
    return make_worker(transport, "decode-0", common_pb2.WORKER_ROLE_DECODE)


@pytest.fixture
async def reservations(worker: Worker) -> AsyncIterator[Reservations]:
    terms = Terms(ticket_lifetime_s=60.0, verified=Share.parse("none"), pair_quarantine_s=60.0)
    async with (
        Channels() as channels,
        Puller(worker, channels) as puller,
        Reservations(worker, channels, puller, HeldDigester(), terms) as it,  # type: ignore[arg-type]
    ):
        yield it
        assert worker.integrity_ok()
        assert num_free(worker) == NUM_BLOCKS


class Gateway:
    """The other end of a session."""

    def __init__(self, worker: Worker, reservations: Reservations, max_unread_events: int = 1000) -> None:
        self.worker = worker
        self.session = Session(worker, reservations, max_unread_events=max_unread_events)
        self.responses: AsyncGenerator[worker_pb2.DecodeResponse, None] = self.session.responses()
        self._requests = asyncio.Queue[worker_pb2.DecodeRequest | None]()
        self._following = asyncio.create_task(self.session.follow(each(self._requests)))

    async def send(self, *requests: worker_pb2.DecodeRequest | None) -> None:
        for request in requests:
            self._requests.put_nowait(request)
        await settle()

    async def step(self) -> None:
        self.worker.engine.step()
        await settle()

    async def read(self) -> list[tuple[int, str]]:
        async with asyncio.timeout(5):
            response = await anext(self.responses)
        return [(event.handle, event.WhichOneof("event") or "") for event in response.events]

    async def close(self) -> None:
        self._following.cancel()
        self.session.close()
        await self.responses.aclose()
        await asyncio.gather(self._following, return_exceptions=True)


async def each(
    queue: asyncio.Queue[worker_pb2.DecodeRequest | None],
) -> AsyncIterator[worker_pb2.DecodeRequest]:
    while (item := await queue.get()) is not None:
        yield item


@asynccontextmanager
async def gateway(worker: Worker, reservations: Reservations, **options: int) -> AsyncIterator[Gateway]:
    it = Gateway(worker, reservations, **options)
    try:
        yield it
    finally:
        await it.close()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def open_(handle: int, *, token: int = 1, request_id: str = "r") -> worker_pb2.DecodeRequest:
    """Nothing of it is cached."""
    return worker_pb2.DecodeRequest(
        open=worker_pb2.DecodeOpen(
            handle=handle, request_id=request_id, prompt_token_ids=[token, 2], sampling=SAMPLING, cache_salt=next(salts),
            context={REQUEST_ID_KEY: request_id},
        )
    )  # fmt: skip


def cancel(handle: int) -> worker_pb2.DecodeRequest:
    return worker_pb2.DecodeRequest(cancel=worker_pb2.DecodeCancel(handle=handle))


def num_free(worker: Worker) -> int:
    with worker.engine.exclusive(wake=False) as scheduler:
        counts = scheduler.pool.counts()
        return counts.free + counts.cached


async def test_a_step_is_one_message_for_all_requests(worker: Worker, reservations: Reservations) -> None:
    async with gateway(worker, reservations) as it:
        await it.send(open_(1), open_(2), open_(5))
        for _ in range(NUM_TOKENS - 1):
            await it.step()
            assert await it.read() == [(1, "token"), (2, "token"), (5, "token")]
        await it.step()
        assert sorted(await it.read()) == sorted((h, kind) for h in (1, 2, 5) for kind in ("token", "finished"))


async def test_what_was_not_taken_in_time_comes_together_and_in_order(
    worker: Worker, reservations: Reservations
) -> None:
    async with gateway(worker, reservations) as it:
        await it.send(open_(1))
        for _ in range(NUM_TOKENS):
            await it.step()
        response = await anext(it.responses)
        assert [event.token.index for event in response.events[:-1]] == list(range(NUM_TOKENS))
        assert response.events[-1].HasField("finished")


async def test_a_refusal_is_one_requests_failure(worker: Worker, reservations: Reservations) -> None:
    async with gateway(worker, reservations) as it:
        await it.send(open_(1, token=100), open_(2))
        (failed,) = (await anext(it.responses)).events
        assert (failed.handle, failed.failure.reason) == (1, "INVALID_REQUEST")
        assert failed.failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        await it.step()
        assert await it.read() == [(2, "token")]


async def test_a_cancelled_request_gives_back_what_it_holds_and_is_heard_no_more(
    worker: Worker, reservations: Reservations
) -> None:
    async with gateway(worker, reservations) as it:
        await it.send(open_(1), open_(2))
        await it.step()
        await it.read()
        before = num_free(worker)
        await it.send(cancel(1), cancel(77))
        assert num_free(worker) == before + 1
        await it.step()
        assert await it.read() == [(2, "token")]


async def test_closing_gives_back_everything(worker: Worker, reservations: Reservations) -> None:
    async with gateway(worker, reservations) as it:
        await it.send(open_(1), open_(2))
        await it.step()
        assert num_free(worker) < NUM_BLOCKS
    assert num_free(worker) == NUM_BLOCKS


async def test_a_gateway_that_does_not_read_loses_its_requests_and_no_other_does(
    worker: Worker, reservations: Reservations
) -> None:
    async with gateway(worker, reservations, max_unread_events=3) as slow, gateway(worker, reservations) as other:
        await slow.send(open_(1), open_(2))
        await other.send(open_(1))
        for _ in range(2):
            await other.step()
            assert await other.read() == [(1, "token")]
        await settle()
        assert num_free(worker) == NUM_BLOCKS - 1, "the other's"
        with pytest.raises(OverloadedError, match="3 events wait to be read") as lost:
            await slow.read()
        assert lost.value.reason == "NOT_READ"
        await other.step()
        assert await other.read() == [(1, "token")]


async def test_a_handle_is_used_once(worker: Worker, reservations: Reservations) -> None:
    async with gateway(worker, reservations) as it:
        await it.send(open_(3), open_(3))
        with pytest.raises(InvalidRequestError, match="handle 3 is not above the one before, 3"):
            await it.read()


@pytest.mark.parametrize("by_the_worker", [False, True])
async def test_it_ends_with_its_last_request(worker: Worker, reservations: Reservations, by_the_worker: bool) -> None:
    async with gateway(worker, reservations) as it:
        await it.send(open_(1))
        if by_the_worker:
            it.session.end()
        else:
            await it.send(None)
        for _ in range(NUM_TOKENS):
            reading = asyncio.create_task(it.read())
            await settle()
            assert not reading.done()
            await it.step()
            await reading
        with pytest.raises(StopAsyncIteration):
            await it.read()


async def test_a_requests_lines_in_the_log_carry_its_id_and_no_other(
    worker: Worker, reservations: Reservations
) -> None:
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        async with gateway(worker, reservations) as it:
            await it.send(open_(1, request_id="one"), open_(2, request_id="two"))
            for _ in range(NUM_TOKENS):
                await it.step()
    assert [line["request_id"] for line in lines if line["event"] == "decoded"] == ["one", "two"]


async def test_over_grpc_a_lost_call_gives_everything_back_and_a_shutdown_ends_idle_ones(
    worker: Worker, reservations: Reservations
) -> None:
    server = grpc.aio.server(interceptors=(RequestInterceptor(),))
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(worker, reservations), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(10):
        stub = worker_pb2_grpc.DecodeServiceStub(channel)
        lost, idle = stub.Decode(), stub.Decode()
        for call in (lost, idle):
            await call.write(open_(1))
            reading = asyncio.ensure_future(call.read())
            while not reading.done():
                worker.engine.step()
                await asyncio.sleep(0.001)
            assert reading.result().events[0].HasField("token")
        lost.cancel()
        await idle.write(cancel(1))
        await drain(worker)
        assert num_free(worker) == NUM_BLOCKS
        worker.end_streams()
        while await idle.read() is not grpc.aio.EOF:  # a step more may have been made before it was heard
            pass
        with suppress(asyncio.CancelledError):
            await lost.code()
    await server.stop(None)
