from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf import wrappers_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvferry import errors
from services.runtime import tracing
from services.runtime.channel import open_channel
from services.runtime.server import (
    MAX_MESSAGE_NBYTES,
    MAX_METADATA_NBYTES,
    add_standard_services,
    bind,
    create_server,
    running,
    split_address,
)
from services.runtime.startup import StartupError

Text = wrappers_pb2.StringValue


class Handlers:
    """What the requests' text asks for."""

    def __init__(self) -> None:
        self.seen: list[tuple[str | None, str | None]] = []
        self.closed = asyncio.Event()
        self.suspended = asyncio.Event()

    def note_context(self) -> None:
        self.seen.append((tracing.current_request_id(), dict(tracing.outgoing_metadata()).get("traceparent")))

    async def unary(self, request: Any, context: Any) -> Any:
        self.note_context()
        match request.value:
            case "overloaded":
                raise errors.OverloadedError("too much", retry_after_s=1.5, metadata={"limit": "3"})
            case "bug":
                raise ZeroDivisionError("secret detail")
            case "abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "by hand")
            case "wait":
                self.suspended.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.closed.set()
        return Text(value=request.value)

    async def stream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        task = asyncio.current_task()
        try:
            yield Text(value="one")
            if request.value == "conflict":
                raise errors.ConflictError("half-way", reason="GAP")
            if request.value == "bug":
                raise ZeroDivisionError("secret detail")
            if request.value == "endless":
                while True:
                    self.suspended.set()
                    yield Text(value="x" * 100_000)
            yield Text(value="two")
        finally:
            # A generator that was left to the garbage collector is closed by a task of the event loop's own.
            self.closed_by_its_call = asyncio.current_task() is task
            self.closed.set()

    async def collect(self, requests: Any, context: Any) -> Any:
        return Text(value=",".join([request.value async for request in requests]))


def grpc_aio() -> tuple[Any, Callable[[], int]]:
    server = create_server()
    return server, lambda: bind(server, "127.0.0.1:0")


made_by = grpc_aio  # or by another server that shall do the same, as test_rpc.py has it


@asynccontextmanager
async def serving(handlers: Handlers) -> AsyncIterator[tuple[grpc.aio.Channel, int]]:
    server, bound = made_by()

    def as_text(cls: Any) -> dict[str, Any]:
        return {"request_deserializer": cls.FromString, "response_serializer": cls.SerializeToString}

    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(handlers.unary, **as_text(Text)),
        "Stream": grpc.unary_stream_rpc_method_handler(handlers.stream, **as_text(Text)),
        "Collect": grpc.stream_unary_rpc_method_handler(handlers.collect, **as_text(Text)),
    }
    server.add_registered_method_handlers("test.Test", methods)
    await add_standard_services(server, ["test.Test"])
    port = bound()
    async with running(server, grace_s=0), open_channel(f"127.0.0.1:{port}") as channel:
        yield channel, port


async def to_the_end(call: Any) -> None:
    async for _ in call:
        pass


async def test_a_message_has_so_many_bytes_and_no_more() -> None:
    unbound = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    async with (
        serving(Handlers()) as (_, port),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=unbound) as plain,
    ):
        call = plain.unary_unary("/test.Test/Unary", request_serializer=Text.SerializeToString)
        around = len(Text(value="x" * MAX_MESSAGE_NBYTES).SerializeToString()) - MAX_MESSAGE_NBYTES
        await call(Text(value="x" * (MAX_MESSAGE_NBYTES - around)), timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(Text(value="x" * (MAX_MESSAGE_NBYTES - around + 1)), timeout=30)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_has_so_many_bytes_and_entries_and_no_more() -> None:
    """Around a call are about 400 bytes of gRPC's own; a refusal must not depend on luck."""
    each = 32
    fits = (MAX_METADATA_NBYTES - 1024) // each
    async with serving(Handlers()) as (channel, _):
        call = channel.unary_unary("/test.Test/Unary", request_serializer=Text.SerializeToString)
        for _ in range(20):
            for metadata in ([("x", "y" * (fits * each))], [("x", "")] * (fits - 1)):
                await call(Text(value="a"), metadata=metadata, timeout=10)
            for metadata in ([("x", "y" * MAX_METADATA_NBYTES)], [("x", "")] * (MAX_METADATA_NBYTES // each)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(Text(value="a"), metadata=metadata, timeout=10)
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def unary(channel: grpc.aio.Channel, method: str = "Unary", raw: bool = False) -> Any:
    return channel.unary_unary(
        f"/test.Test/{method}",
        request_serializer=None if raw else Text.SerializeToString,
        response_deserializer=Text.FromString,
    )


def stream(channel: grpc.aio.Channel) -> Any:
    return channel.unary_stream(
        "/test.Test/Stream", request_serializer=Text.SerializeToString, response_deserializer=Text.FromString
    )


async def exhausted(call: Any) -> list[Any]:
    return [message async for message in call]


def details_of(error: grpc.aio.AioRpcError) -> list[Any]:
    (data,) = (value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin")
    found = []
    for detail in status_pb2.Status.FromString(data).details:
        for message in (error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()):
            if detail.Unpack(message):
                found.append(message)
    return found


async def test_answers_pass_through() -> None:
    async with serving(Handlers()) as (channel, _):
        assert (await unary(channel)(Text(value="hi"), timeout=5)).value == "hi"
        assert [m.value async for m in stream(channel)(Text(value=""), timeout=5)] == ["one", "two"]
        collect = channel.stream_unary("/test.Test/Collect", Text.SerializeToString, Text.FromString)
        assert (await collect(iter([Text(value="a"), Text(value="b")]), timeout=5)).value == "a,b"


async def test_our_errors_become_statuses_with_details() -> None:
    async with serving(Handlers()) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(channel)(Text(value="overloaded"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "too much"
        info, retry = details_of(caught.value)
        assert (info.reason, info.domain, dict(info.metadata)) == ("OVERLOADED", "kvferry", {"limit": "3"})
        assert retry.retry_delay.ToTimedelta().total_seconds() == 1.5


async def test_an_error_in_mid_stream_comes_after_what_was_sent() -> None:
    async with serving(Handlers()) as (channel, _):
        call = stream(channel)(Text(value="conflict"), timeout=5)
        assert (await call.read()).value == "one"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert details_of(caught.value)[0].reason == "GAP"


@pytest.mark.parametrize("method", ["Unary", "Stream"])
async def test_a_bug_becomes_internal_without_its_text(method: str) -> None:
    async with serving(Handlers()) as (channel, _):
        make = unary if method == "Unary" else stream
        call = make(channel)(Text(value="bug"), timeout=5, metadata=(("x-request-id", "req-7"),))
        with structlog.testing.capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call if method == "Unary" else exhausted(call))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (caught.value.details() or "")
        assert "req-7" in (caught.value.details() or "")
        assert details_of(caught.value)[0].reason == "INTERNAL"
        (line,) = [entry for entry in logs if entry["event"] == "handler failed"]
        assert isinstance(line["exc_info"], ZeroDivisionError)


async def test_abort_by_hand_passes() -> None:
    async with serving(Handlers()) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(channel)(Text(value="abort"), timeout=5)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.DATA_LOSS, "by hand")


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"])
async def test_malformed_bytes_are_the_callers_fault(data: bytes) -> None:
    async with serving(Handlers()) as (channel, _):
        raw_stream = channel.unary_stream("/test.Test/Stream", None, Text.FromString)
        raw_collect = channel.stream_unary("/test.Test/Collect", None, Text.FromString)
        for call in (unary(channel, raw=True)(data, timeout=5), raw_collect(iter([data]), timeout=5)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert details_of(caught.value)[0].reason == "MALFORMED_MESSAGE"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw_stream(data, timeout=5).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await unary(channel)(Text(value="still here"), timeout=5)).value == "still here"


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving(Handlers()) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(channel, "Nothing")(Text(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_cancelling_reaches_a_unary_handler() -> None:
    handlers = Handlers()
    async with serving(handlers) as (channel, _):
        call = unary(channel)(Text(value="wait"), timeout=5)
        await asyncio.wait_for(handlers.suspended.wait(), 5)
        call.cancel()
        await asyncio.wait_for(handlers.closed.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_cancelled_stream_closes_its_handler_even_at_a_yield() -> None:
    handlers = Handlers()
    async with serving(handlers) as (channel, _):
        call = stream(channel)(Text(value="endless"), timeout=5)
        await call.read()
        # The reader stands still, so flow control suspends the handler at its yield.
        await asyncio.wait_for(handlers.suspended.wait(), 5)
        call.cancel()
        await asyncio.wait_for(handlers.closed.wait(), 5)
        assert handlers.closed_by_its_call


async def test_what_the_server_was_started_under_is_not_a_calls_context() -> None:
    handlers = Handlers()
    with structlog.contextvars.bound_contextvars(request_id="startup"):
        async with serving(handlers) as (_, port), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as plain:
            await unary(plain)(Text(), timeout=5)
    assert handlers.seen[0][0] is None


async def test_request_id_and_trace_reach_the_handler_and_do_not_stay() -> None:
    handlers = Handlers()
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serving(handlers) as (channel, _):
        with structlog.contextvars.bound_contextvars(request_id="req-1"):
            await unary(channel)(Text(), timeout=5, metadata=(("traceparent", traceparent),))
        await unary(channel)(Text(), timeout=5)
        await unary(channel)(Text(), timeout=5, metadata=(("x-request-id", "y" * 129),))
    (first_id, first_trace), (second_id, second_trace), (third_id, _) = handlers.seen
    assert first_id == "req-1"
    assert first_trace is not None
    assert first_trace.split("-")[1] == traceparent.split("-")[1]
    assert (second_id, third_id) == (None, None)
    assert second_trace is None or second_trace.split("-")[1] != traceparent.split("-")[1]


async def test_an_oversized_request_is_refused() -> None:
    async with serving(Handlers()) as (channel, port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as plain:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unary(plain)(Text(value="x" * (17 << 20)), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await unary(channel)(Text(value="x" * (10 << 20)), timeout=20)).ByteSize() > 10 << 20


async def test_health_and_reflection() -> None:
    async with serving(Handlers()) as (channel, _):
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "test.Test"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service="test.Test"), timeout=5)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = reflection.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
        )
        answer = await call.read()
        assert "test.Test" in {service.name for service in answer.list_services_response.service}


async def test_a_taken_port_is_named_with_the_remedy() -> None:
    async with serving(Handlers()) as (_, port):
        with pytest.raises(StartupError) as caught:
            bind(create_server(), f"127.0.0.1:{port}")
        message = f"address 127.0.0.1:{port} is in use by another process; choose another with --listen"
        assert str(caught.value) == message
    with socket.socket() as plain:
        plain.bind(("127.0.0.1", 0))
        plain.listen()
        with pytest.raises(StartupError, match=r"in use .* --grpc"):
            bind(create_server(), f"127.0.0.1:{plain.getsockname()[1]}", flag="--grpc")


@pytest.mark.parametrize("address", ["", "8000", "host:", ":8000", "host:eight", "host:70000"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(StartupError, match="host:port"):
        split_address(address)


def test_addresses() -> None:
    assert split_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_address("[::1]:80") == ("::1", 80)


async def test_no_more_calls_than_allowed() -> None:
    handlers = Handlers()
    server = create_server(max_concurrent_rpcs=1)
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                "test.Test",
                {
                    "Unary": grpc.unary_unary_rpc_method_handler(
                        handlers.unary, request_deserializer=Text.FromString, response_serializer=Text.SerializeToString
                    )
                },
            )
        ]
    )
    port = bind(server, "127.0.0.1:0")
    async with running(server, grace_s=0), open_channel(f"127.0.0.1:{port}") as channel:
        first = unary(channel)(Text(value="wait"), timeout=5)
        await asyncio.wait_for(handlers.suspended.wait(), 5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(channel)(Text(value="refused"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        await asyncio.wait_for(handlers.closed.wait(), 5)
