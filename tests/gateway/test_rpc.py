"""The gateway's gRPC server does what grpc.aio's does: by the same tests, against the same clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue as Text
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, TrailersReceived

from gateway.rpc.framing import prefixed
from gateway.rpc.limits import Limits
from gateway.rpc.server import RpcServer
from tests.runtime import test_server
from tests.runtime.test_server import (  # noqa: F401
    test_a_bug_becomes_internal_without_its_text,
    test_a_cancelled_stream_closes_its_handler_even_at_a_yield,
    test_a_message_has_so_many_bytes_and_no_more,
    test_a_taken_port_is_named_with_the_remedy,
    test_abort_by_hand_passes,
    test_an_error_in_mid_stream_comes_after_what_was_sent,
    test_an_oversized_request_is_refused,
    test_an_unknown_method_is_unimplemented,
    test_answers_pass_through,
    test_cancelling_reaches_a_unary_handler,
    test_health_and_reflection,
    test_malformed_bytes_are_the_callers_fault,
    test_metadata_has_so_many_bytes_and_entries_and_no_more,
    test_our_errors_become_statuses_with_details,
    test_request_id_and_trace_reach_the_handler_and_do_not_stay,
    test_what_the_server_was_started_under_is_not_a_calls_context,
)


@pytest.fixture(autouse=True)
def made_by_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours() -> tuple[Any, Callable[[], int]]:
        server = RpcServer()
        return server, lambda: server.bind("127.0.0.1:0")

    monkeypatch.setattr(test_server, "made_by", ours)


class Numbers:
    """Streams as many messages as it is told, of the sizes that it is told; keeps whether its calls were closed."""

    def __init__(self) -> None:
        self.open = 0
        self.go_on = asyncio.Event()

    async def stream(self, request: Text, context: Any) -> AsyncIterator[Text]:
        self.open += 1
        try:
            count, size = map(int, request.value.split(","))
            for number in range(count):
                yield Text(value=f"{number}," + "x" * size)
                if number == 0:
                    await self.go_on.wait()
        finally:
            self.open -= 1

    async def unary(self, request: Text, context: Any) -> Text:
        found = [value for name, value in context.invocation_metadata() if name == "given-bin"]
        return Text(value=f"{request.value} {found} {context.peer().rpartition(':')[0]}")

    async def collect(self, requests: AsyncIterator[Text], context: Any) -> Text:
        return Text(value=str([len(request.value) async for request in requests]))


LIMITS = Limits(max_message_nbytes=1 << 20)
PATIENT = replace(LIMITS, preface_timeout_s=600)  # asks nobody whether he is there: what ends is ended by another bound


@asynccontextmanager
async def serving(
    handlers: Numbers, limits: Limits = LIMITS, write_timeout_s: float = 20
) -> AsyncIterator[tuple[Any, str]]:
    """The server, which may be stopped, and its address."""
    server = RpcServer(write_timeout_s=write_timeout_s, limits=limits)
    how = {"request_deserializer": Text.FromString, "response_serializer": Text.SerializeToString}
    methods = {
        "Stream": grpc.unary_stream_rpc_method_handler(handlers.stream, **how),
        "Unary": grpc.unary_unary_rpc_method_handler(handlers.unary, **how),
        "Collect": grpc.stream_unary_rpc_method_handler(handlers.collect, **how),
    }
    server.add_registered_method_handlers("test.Test", methods)
    port = server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def stream(channel: grpc.aio.Channel, count: int, size: int) -> Any:
    call = channel.unary_stream(
        "/test.Test/Stream", request_serializer=Text.SerializeToString, response_deserializer=Text.FromString
    )
    return call(Text(value=f"{count},{size}"), timeout=60)


async def rest(call: Any) -> list[Any]:
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  # of sockets and of another's threads, which set no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("num_streams", "count", "size"), [(300, 20, 30), (8, 6, 200_000), (1, 3, 1_000_000)])
async def test_each_stream_gets_all_its_messages_once_and_in_order(num_streams: int, count: int, size: int) -> None:
    handlers = Numbers()
    async with serving(handlers) as (_, address), grpc.aio.insecure_channel(address) as channel:
        calls = [stream(channel, count, size) for _ in range(num_streams)]
        firsts = [(await call.read()).value for call in calls]
        handlers.go_on.set()
        for first, call in zip(firsts, calls, strict=True):
            got = [first, *(message.value for message in await rest(call))]
            assert got == [f"{number}," + "x" * size for number in range(count)]


async def test_a_small_message_does_not_wait_for_the_acknowledgement_of_the_one_before() -> None:
    async with serving(Numbers()) as (server, address), grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        (connection,) = server._connections
        accepted = connection._transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_stream_that_is_not_read_holds_up_no_other() -> None:
    handlers = Numbers()
    handlers.go_on.set()
    async with serving(handlers) as (_, address), grpc.aio.insecure_channel(address) as channel:
        unread = stream(channel, 1000, 100_000)
        await unread.read()
        for _ in range(3):
            assert len(await rest(stream(channel, 5, 1000))) == 5
        assert handlers.open == 1
        unread.cancel()
        await until(lambda: handlers.open == 0)


async def test_a_client_that_takes_nothing_loses_its_stream() -> None:
    handlers = Numbers()
    handlers.go_on.set()
    async with (
        serving(handlers, write_timeout_s=0.3) as (_, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = stream(channel, 1_000_000, 100_000)
        await until(lambda: handlers.open == 1)
        await until(lambda: handlers.open == 0)
        assert not call.done()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert test_server.details_of(caught.value)[0].reason == "CLIENT_TOO_SLOW"


async def test_streams_share_their_connections_window() -> None:
    """Which is 65,535 bytes until the client makes it larger; beyond it h2 raises FlowControlError here."""
    handlers = Numbers()
    handlers.go_on.set()
    async with serving(handlers) as (_, address), Raw.connected(address) as client, asyncio.timeout(20):
        waiting = {client.call("Stream", Text(value="1,50000")) for _ in range(2)}
        untaken: dict[int, int] = dict.fromkeys(waiting, 0)
        while waiting:
            for event in client.h2.receive_data(await client.reader.read(65_536)):
                if isinstance(event, DataReceived):
                    untaken[event.stream_id] += event.flow_controlled_length
                elif isinstance(event, TrailersReceived):
                    waiting.remove(event.stream_id)
            if sum(untaken.values()) == 65_535:
                for stream_id, nbytes in untaken.items():
                    client.h2.acknowledge_received_data(nbytes, stream_id)
            client.flush()
        assert sum(untaken.values()) > 100_000


async def test_who_hangs_up_ends_its_calls() -> None:
    handlers = Numbers()
    async with serving(handlers) as (_, address), Raw.connected(address) as client:
        client.call("Stream", Text(value="2,1"))
        await until(lambda: handlers.open == 1)
        client.writer.transport.abort()
        await until(lambda: handlers.open == 0)


async def test_a_call_ends_at_its_deadline_whoever_else_forgets_it() -> None:
    handlers = Numbers()
    async with serving(handlers) as (_, address), Raw.connected(address) as client:
        stream_id = client.call("Stream", Text(value="2,1"), ("grpc-timeout", "200m"))
        await until(lambda: handlers.open == 1)
        assert (await client.trailers(stream_id))["grpc-status"] == "4"
        assert handlers.open == 0


async def test_requests_come_in_parts_and_metadata_as_bytes() -> None:
    async with serving(Numbers()) as (_, address), grpc.aio.insecure_channel(address) as channel:
        collect = channel.stream_unary(
            "/test.Test/Collect", request_serializer=Text.SerializeToString, response_deserializer=Text.FromString
        )
        sizes = [700_000, 0, 3, 900_000]
        assert (await collect(iter([Text(value="x" * size) for size in sizes]), timeout=20)).value == str(sizes)
        unary = channel.unary_unary(
            "/test.Test/Unary", request_serializer=Text.SerializeToString, response_deserializer=Text.FromString
        )
        answer = await unary(Text(value="é"), metadata=[("given-bin", b"\x00\xff,")], timeout=20)
        assert answer.value == "é [b'\\x00\\xff,'] 127.0.0.1"


async def test_what_is_compressed_is_refused_by_name() -> None:
    async with serving(Numbers()) as (_, address), grpc.aio.insecure_channel(address) as channel:
        unary = channel.unary_unary("/test.Test/Unary", request_serializer=Text.SerializeToString)
        with pytest.raises(grpc.aio.AioRpcError, match="compressed") as caught:
            await unary(Text(value="x" * 10_000), compression=grpc.Compression.Gzip, timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_server_that_stops_lets_calls_end_and_takes_no_more() -> None:
    handlers = Numbers()
    async with serving(handlers) as (server, address), grpc.aio.insecure_channel(address) as channel:
        running, late = stream(channel, 3, 1), stream(channel, 3, 1)
        await running.read()
        await late.read()
        stopping = asyncio.create_task(server.stop(1.0))
        await until(lambda: channel.get_state() is not grpc.ChannelConnectivity.READY)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stream(channel, 1, 1).read()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        handlers.go_on.set()
        assert len(await rest(running)) == 2
        await stopping
        assert len(await rest(late)) == 2


async def test_a_server_that_stops_cuts_calls_off_after_the_grace() -> None:
    handlers = Numbers()
    async with serving(handlers) as (server, address), grpc.aio.insecure_channel(address) as channel:
        call = stream(channel, 3, 1)
        await call.read()
        await server.stop(0.1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert handlers.open == 0


@dataclass
class Raw:
    """A client that does as it is told."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    h2: H2Connection

    @classmethod
    @asynccontextmanager
    async def connected(cls, address: str, *, greets: bool = True) -> AsyncIterator[Raw]:
        reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        client = cls(reader, writer, H2Connection(H2Configuration(header_encoding="utf-8")))
        try:
            if greets:
                client.h2.initiate_connection()
                client.flush()
            yield client
        finally:
            writer.close()

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    def call(self, method: str, request: Text, *headers: tuple[str, str]) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        known = [(":method", "POST"), (":scheme", "http"), (":path", f"/test.Test/{method}"), (":authority", "a")]
        self.h2.send_headers(stream_id, [*known, ("content-type", "application/grpc"), *headers])
        self.h2.send_data(stream_id, prefixed(request.SerializeToString()), end_stream=True)
        self.flush()
        return stream_id

    async def trailers(self, stream_id: int) -> dict[str, str]:
        async with asyncio.timeout(20):
            while data := await self.reader.read(65_536):
                for event in self.h2.receive_data(data):
                    if isinstance(event, TrailersReceived) and event.stream_id == stream_id:
                        return dict(event.headers)
                self.flush()
        raise AssertionError("the connection ended")

    async def is_hung_up(self) -> bool:
        """Whether the server ends the connection in good time; what it says until then is read."""
        with suppress(ConnectionError):
            async with asyncio.timeout(20):
                while await self.reader.read(65_536):
                    pass
        return True


async def test_who_says_goodbye_still_gets_what_it_had_asked_for() -> None:
    handlers = Numbers()
    async with serving(handlers) as (_, address), Raw.connected(address) as client:
        stream_id = client.call("Stream", Text(value="2,1"))
        await until(lambda: handlers.open == 1)
        client.writer.write((8).to_bytes(3, "big") + b"\x07\x00" + bytes(4) + bytes(8))
        await client.writer.drain()
        await asyncio.sleep(0.2)  # until it has been read
        handlers.go_on.set()
        assert (await client.trailers(stream_id))["grpc-status"] == "0"
        assert await client.is_hung_up()


async def test_who_says_nothing_or_nonsense_or_answers_no_ping_is_hung_up_on() -> None:
    limits = replace(LIMITS, preface_timeout_s=0.1, ping_interval_s=0.1, ping_timeout_s=0.1)
    handlers = Numbers()
    async with serving(handlers, limits) as (_, address):
        async with Raw.connected(address, greets=False) as silent:
            assert await silent.is_hung_up()
        async with Raw.connected(address, greets=False) as talking:
            talking.writer.write(b"GET / HTTP/1.1\r\n\r\n" * 10)
            assert await talking.is_hung_up()
        async with Raw.connected(address) as client:
            client.call("Stream", Text(value="2,1"))
            assert await client.is_hung_up(), "it reads, but h2 is not told and so answers nothing"
            await until(lambda: handlers.open == 0)


async def test_who_answers_pings_stays() -> None:
    limits = replace(LIMITS, preface_timeout_s=0.05, ping_interval_s=0.05, ping_timeout_s=5)
    handlers = Numbers()
    async with serving(handlers, limits) as (_, address), grpc.aio.insecure_channel(address) as channel:
        call = stream(channel, 2, 1)
        await call.read()
        await asyncio.sleep(0.5)
        handlers.go_on.set()
        assert len(await rest(call)) == 1


async def test_who_gives_up_streams_as_fast_as_it_opens_them_is_hung_up_on() -> None:
    handlers = Numbers()
    async with serving(handlers, replace(PATIENT, max_resets=20)) as (_, address), Raw.connected(address) as client:
        with suppress(ConnectionError):
            for _ in range(30):
                stream_id = client.call("Stream", Text(value="2,1"))
                client.h2.reset_stream(stream_id)
                client.flush()
                await client.writer.drain()
        assert await client.is_hung_up()
        await until(lambda: handlers.open == 0)


class Unread(asyncio.Transport):
    """To a client that reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.nbytes += len(data)

    def get_write_buffer_size(self) -> int:
        return self.nbytes

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


async def test_who_asks_for_answers_and_reads_none_is_hung_up_on() -> None:
    server, client, transport = RpcServer(limits=replace(LIMITS, max_unread_nbytes=10_000)), H2Connection(), Unread()
    connection = server.connection()
    connection.connection_made(transport)
    client.initiate_connection()
    num_pings = 0
    while not transport.aborted and num_pings < 1000:
        client.ping(bytes(8))
        num_pings += 1
        connection.data_received(client.data_to_send())
        await asyncio.sleep(0)
    connection.connection_lost(None)
    assert 10_000 / 17 - 10 < num_pings < 10_000 / 17 + 10


async def test_requests_that_are_never_whole_have_a_bound() -> None:
    limits = replace(PATIENT, max_buffered_nbytes=40_000)
    async with serving(Numbers(), limits) as (_, address), Raw.connected(address) as client:
        head = [(":method", "POST"), (":scheme", "http"), (":path", "/test.Test/Unary"), (":authority", "a")]
        for _ in range(5):
            stream_id = client.h2.get_next_available_stream_id()
            client.h2.send_headers(stream_id, [*head, ("content-type", "application/grpc")])
            client.h2.send_data(stream_id, b"\0" + (1 << 19).to_bytes(4, "big") + bytes(10_000))
            client.flush()
        assert await client.is_hung_up()
