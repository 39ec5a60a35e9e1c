"""What anybody who reaches the gateway's gRPC port sends, byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cache
from random import Random

import grpc
from google.protobuf.wrappers_pb2 import StringValue
from h2.config import H2Configuration
from h2.connection import H2Connection
from hypothesis import strategies as st

from gateway.rpc.framing import prefixed
from gateway.rpc.server import RpcServer
from tests.fuzz.clients import Client, say
from tests.fuzz.inputs import damaged
from tests.fuzz.target import Target

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_NBYTES = 9


class _Client(Client):
    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.is_closing()


class _Door:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.num_answered = 0
        self._server = RpcServer(write_timeout_s=1)
        how = {"request_deserializer": StringValue.FromString, "response_serializer": StringValue.SerializeToString}
        self._server.add_registered_method_handlers(
            "t.T",
            {
                "Unary": grpc.unary_unary_rpc_method_handler(self._unary, **how),
                "Stream": grpc.unary_stream_rpc_method_handler(self._stream, **how),
                "Collect": grpc.stream_unary_rpc_method_handler(self._collect, **how),
            },
        )

    async def _unary(self, request: StringValue, context: object) -> StringValue:
        self.num_answered += 1
        return request

    async def _stream(self, request: StringValue, context: object) -> AsyncIterator[StringValue]:
        for _ in range(3):
            self.num_answered += 1
            yield request

    async def _collect(self, requests: AsyncIterator[StringValue], context: object) -> StringValue:
        size = sum([len(request.value) async for request in requests])
        self.num_answered += 1
        return StringValue(value=str(size))

    async def serve(self, data: bytes) -> bool:
        """Whether a handler was asked.  The client hangs up when nothing more comes."""
        self.num_answered = 0
        connection = self._server.connection()
        await say(connection, _Client(), data, lambda: {call.task for call in connection.calls.values()}, "call")
        return self.num_answered > 0


@cache
def _door() -> _Door:
    return _Door()


def _read(data: bytes) -> bool:
    door = _door()
    return door.loop.run_until_complete(door.serve(PREFACE + data))


def _asked(method: str, messages: list[str], *headers: tuple[str, str]) -> bytes:
    """The client's frames of one call, without the preface."""
    h2 = H2Connection(H2Configuration(header_encoding="utf-8", validate_outbound_headers=False))
    h2.initiate_connection()
    known = [(":method", "POST"), (":scheme", "http"), (":path", f"/t.T/{method}"), (":authority", "a")]
    h2.send_headers(1, [*known, ("content-type", "application/grpc"), ("te", "trailers"), *headers])
    for message in messages:
        h2.send_data(1, prefixed(StringValue(value=message).SerializeToString()))
    h2.end_stream(1)
    h2.ping(b"12345678")
    h2.increment_flow_control_window(1000)
    return h2.data_to_send().removeprefix(PREFACE)


def _frames(data: bytes) -> list[bytearray]:
    frames, at = [], 0
    while len(data) - at >= HEAD_NBYTES:
        end = at + HEAD_NBYTES + int.from_bytes(data[at : at + 3], "big")
        frames.append(bytearray(data[at:end]))
        at = end
    return frames


def _mutate(data: bytes, random: Random) -> bytes | None:
    """A frame twice, moved, gone, of another kind, flag or stream, or with another payload of its length."""
    frames = _frames(data)
    if not frames:
        return None
    index = random.randrange(len(frames))
    frame = frames[index]
    match random.randrange(7):
        case 0:
            frames.insert(random.randrange(len(frames) + 1), bytearray(frame))
        case 1:
            del frames[index]
        case 2:
            frames.insert(random.randrange(len(frames)), frames.pop(index))
        case 3:
            frame[3] = random.randrange(11)
        case 4:
            frame[4] ^= 1 << random.randrange(8)
        case 5:
            frame[5:9] = random.choice([0, 1, 2, 3, 5, 2**31 - 1]).to_bytes(4, "big")
        case _:
            payload = bytearray(frame[HEAD_NBYTES:])
            for _ in range(random.randrange(1, 4)):
                if payload:
                    payload[random.randrange(len(payload))] = random.randrange(256)
            frames[index] = bytearray(len(payload).to_bytes(3, "big") + frame[3:HEAD_NBYTES] + payload)
    return b"".join(frames)


_CALLS = st.builds(
    _asked,
    st.sampled_from(["Unary", "Stream", "Collect", "Nothing"]),
    st.lists(st.text(max_size=30), max_size=4),
    st.tuples(
        st.sampled_from(["grpc-timeout", "x-bin", "authorization", "grpc-encoding", "content-type", "x-request-id"]),
        st.one_of(st.text("0123456789SmunHM=, azé", max_size=20), st.sampled_from(["1n", "99999999H", "gzip", "AA"])),
    ),
)
TARGETS = [Target("grpc", damaged(_CALLS), _read, _mutate)]
