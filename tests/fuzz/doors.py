"""What anybody who reaches a port sends: HTTP byte by byte, JSON bodies, keys, names in certificates, trace contexts."""

from __future__ import annotations

import asyncio
import hashlib
from functools import cache

import uvicorn
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from gateway.doorkeeper import Doorkeeper
from gateway.http import schema
from gateway.http.app import create_app
from gateway.http.limits import MAX_HEAD_NBYTES
from gateway.http.slow_heads import BoundedHeads
from gateway.tenants import Keyring
from kvferry import errors
from kvferry._roles import CertificateRole
from services.runtime.access import ALLOWED, require, roles_of
from services.runtime.server import split_address
from services.runtime.startup import StartupError
from services.runtime.tls import is_loopback
from services.runtime.tracing import RequestScope, is_request_id
from tests.fuzz.clients import Client, say
from tests.fuzz.inputs import damaged, dumped, nested, objects
from tests.fuzz.mutation import body_of_http, json_values
from tests.fuzz.target import Target
from tests.gateway.scripted import MODEL, VOCABULARY, ScriptedFrontDoor, chunk, finished, started

CHAT = {
    "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0.5, "top_p": 0.5,
    "stop": ["x"], "stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2,
    "seed": 1, "n": 1, "user": "u", "presence_penalty": 0,
}  # fmt: skip
COMPLETION = {"model": MODEL, "prompt": [1, 2], "max_tokens": 3, "logprobs": 2, "temperature": 0.5}
UNKNOWN = {"best_of": 1, "suffix": None, "echo": False}


class _Door:
    """The HTTP server's protocol and application, without a socket."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.statuses: list[int] = []
        front_door = ScriptedFrontDoor(started(), chunk("abc"), finished())
        app = create_app(front_door, vocabulary=VOCABULARY)

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            async def note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self.statuses.append(message["status"])
                await send(message)

            await app(scope, receive, note)

        self.config = uvicorn.Config(
            watched, http=BoundedHeads, lifespan="off", ws="none", access_log=False, log_config=None, server_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_NBYTES,
        )  # fmt: skip
        self.config.load()

    async def serve(self, data: bytes) -> bool:
        """Whether a request was answered with 200.  The client hangs up when nothing more comes."""
        self.statuses.clear()
        state = ServerState()
        protocol = BoundedHeads(self.config, state, {}, self.loop, head_timeout_s=10)
        client = Client()
        await say(protocol, client, data, lambda: state.tasks, "request")
        assert not client.answer or client.answer.startswith(b"HTTP/1.1 "), client.answer[:100]
        assert all(status < 500 for status in self.statuses), self.statuses
        return 200 in self.statuses


@cache
def _door() -> _Door:
    return _Door()


def _http(data: bytes) -> bool:
    door = _door()
    return door.loop.run_until_complete(door.serve(data))


def _request(method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode("utf-8", "replace"), b"host: g", b"content-length: %d" % len(body)]
    return b"\r\n".join([*lines, *(name + b": " + value for name, value in headers), b"", body])


def _body(kind: type[schema.GenerationRequest], data: bytes) -> bool:
    try:
        schema.parse(kind, data)
    except errors.InvalidRequestError:
        return False
    return True


def _authorization(data: bytes) -> bool:
    digest = hashlib.sha256(b"kvf-abc").hexdigest()
    keeper = Doorkeeper(Keyring.parse(f'[[key]]\ntenant = "t"\nsha256 = "{digest}"\n'))
    try:
        keeper.admit(data.decode("latin-1"))
    except errors.UnauthenticatedError:
        return False
    assert data[len("bearer ") :].strip(b" \t") == b"kvf-abc"
    return True


def _names(data: bytes) -> bool:
    """A role is given by its whole name and nothing like it."""
    names = data.split(b"\n")
    roles = roles_of(names)
    assert {role.dns_name.encode() for role in roles} == {
        n for n in names if n in {r.dns_name.encode() for r in CertificateRole}
    }
    for method, allowed in ALLOWED.items():
        try:
            require(method, roles)
            assert roles & allowed
        except errors.PermissionDeniedError:
            assert not roles & allowed
    return bool(roles)


def _address(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    inner = is_loopback(text.rpartition(":")[0])
    try:
        host, port = split_address(text)
    except StartupError:
        return False
    assert 0 <= port <= 65535
    assert is_loopback(host) or not inner, "an address beyond the loopback would need no certificate"
    return True


def _trace_context(data: bytes) -> bool:
    pairs = [line.partition(b": ") for line in data.split(b"\n")]
    carrier = [(name.decode("latin-1"), value.decode("latin-1")) for name, _, value in pairs]
    scope = RequestScope("fuzz", carrier)
    scope.run(lambda: None)
    scope.end()
    return is_request_id(dict(carrier).get("x-request-id", ""))


_HEADERS = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from([b"x-request-id", b"x-request-timeout", b"authorization", b"content-length", b"traceparent",
                             b"content-type", b"x-kvferry-timeline", b"cookie", b"host", b"accept", b"transfer-encoding",
                             b"expect", b"connection", b"upgrade"]),
            st.binary(min_size=1, max_size=12).map(bytes.lower),
        ),
        st.one_of(
            st.binary(max_size=30),
            st.sampled_from([b"nan", b"inf", b"-1", b"1e999", b"0", b"9" * 5000, b"Bearer", b"Bearer \xff", b"chunked",
                             b"100-continue", b"close", b"websocket", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01"]),
            st.floats().map(lambda x: str(x).encode()),
        ),
    ),
    max_size=5,
)  # fmt: skip
_CHAT_BODY = damaged(st.one_of(st.just(CHAT), objects(CHAT)).map(dumped))
_COMPLETION_BODY = damaged(st.one_of(st.just(COMPLETION), objects(CHAT | COMPLETION | UNKNOWN)).map(dumped))
_DEEP = st.integers(1, 5000).map(lambda n: b'{"messages": ' + nested(n) + b"}")
_PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/health",
    "/metrics",
    "/v1/models/a/b",
    "*",
    "//",
    "/?a=b",
]
_GET = st.builds(_request, st.just("GET"), st.sampled_from(_PATHS), _HEADERS, st.just(b""))
_WHOLE = st.one_of(st.just(CHAT), st.just(COMPLETION)).map(dumped)

TARGETS = [
    Target("http", st.one_of(
        st.builds(_request, st.sampled_from(["POST", "POST", "GET", "DELETE", "\x00"]),
                  st.one_of(st.sampled_from(_PATHS), st.text(max_size=20).map(lambda path: "/" + path)),
                  _HEADERS, st.one_of(_CHAT_BODY, _COMPLETION_BODY)),
        st.builds(_request, st.just("POST"), st.sampled_from(_PATHS[:2]), st.just([]), _WHOLE),
        st.builds(bytes.__add__, _GET, _GET),
        st.integers(1, MAX_HEAD_NBYTES * 2).map(lambda n: b"GET / HTTP/1.1\r\nx: " + b"y" * n + b"\r\n\r\n"),
        st.integers(1, 5000).map(lambda n: b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * n + b"\r\n"),
    ), _http, body_of_http, max_nbytes=1 << 16),
    Target("chat_body", st.one_of(_CHAT_BODY, _DEEP), lambda data: _body(schema.ChatRequest, data), json_values),
    Target("completion_body", _COMPLETION_BODY, lambda data: _body(schema.CompletionRequest, data), json_values),
    Target("certificate_names", st.lists(st.one_of(
        st.sampled_from([role.dns_name.encode() for role in CertificateRole]), st.binary(max_size=30)), max_size=4).map(
            b"\n".join), _names),
    Target("address", damaged(st.sampled_from(
        [b"127.0.0.1:8470", b"[::1]:1", b"localhost:65535", b"0.0.0.0:0", b"h:99999", b"[::]:80", b"::1:80"])),
        _address),
    Target("trace_context", damaged(st.sampled_from([
        b"traceparent: 00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-01\nx-request-id: r1\ntracestate: a=b,c=d",
        b"x-request-id: " + b"r" * 200, b"tracestate: " + b"a=b," * 100])), _trace_context),
    Target("authorization", damaged(st.sampled_from([b"Bearer kvf-abc", b"bearer ", b"Basic x", b""])), _authorization),
]  # fmt: skip
