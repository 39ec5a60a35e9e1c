"""POST /v1/completions and /v1/chat/completions: from the request's first byte to the answer's last."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol
from uuid import uuid4

import structlog
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from gateway.http import schema
from gateway.http.connection import BodyTooLargeError, ClientGoneError, read_body, refuse_body, until, while_connected
from gateway.http.encoding import DONE_EVENT, encode, sse_event
from gateway.http.errors import error_body, error_response, internal_error, json_response, too_large
from gateway.http.front_door import FrontDoor, Vocabulary
from gateway.http.limits import HttpLimits
from gateway.http.shapes import Head, Shape, timeline_content, usage_content
from gateway.tenants import Tenant
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from kvferry.errors import DeadlineError, Error, InternalError, InvalidRequestError, NotFoundError, UnavailableError

_log = structlog.stdlib.get_logger(__name__)

# How long a client that does not read may hold up the news that its answer has failed.
_LAST_WORD_S = 1.0

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would gather the events otherwise.
    (b"x-accel-buffering", b"no"),
]


# Stands for a chunk's text where all else of its event is made once for a whole answer.
_MARK = uuid4().hex


class MakeShape(Protocol):
    def __call__(self, head: Head, vocabulary: Vocabulary, *, with_logprobs: bool) -> Shape: ...


def require_model(front_door: FrontDoor, name: str) -> common_pb2.ModelInfo:
    """Raises NotFoundError unless ``name`` is the model that is served."""
    model = front_door.model
    if name != model.name:
        message = f"the model '{name[:128]}' does not exist; this gateway serves '{model.name}'"
        raise NotFoundError(message, reason="MODEL_NOT_FOUND", metadata={"field": "model"})
    return model


class Completions:
    """ASGI application of one generating route.  Raises kvferry.errors.Error as long as no response has begun; from
    then on an error is the stream's last event.  When the client hangs up, at any time, the generation is cancelled."""

    def __init__(self, front_door: FrontDoor, vocabulary: Vocabulary, limits: HttpLimits,
                 asks: type[schema.GenerationRequest], shape: MakeShape) -> None:  # fmt: skip
        self._front_door = front_door
        self._vocabulary = vocabulary
        self._limits = limits
        self._asks = asks
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_s = asyncio.get_running_loop().time()
        headers = Headers(scope=scope)
        reply = _Reply(scope, receive, send, self._limits.write_timeout_s)
        try:
            deadline_s = arrived_s + self._timeout_s(headers)
            async with until(deadline_s):
                body = await read_body(receive, headers.get("content-length"), self._limits.max_body_nbytes)
            asked = schema.parse(self._asks, body)
            await while_connected(receive, self._answer(asked, reply, deadline_s))
        except BodyTooLargeError:
            await refuse_body(too_large(self._limits.max_body_nbytes), scope, receive, send)
        except ClientGoneError:
            _log.info("client hung up", answer_begun=reply.begun)
        except asyncio.CancelledError:
            # Only the server cancels, after its grace, and this task has no other end than this answer.
            await self._last_word(reply, UnavailableError("the gateway is shutting down"))

    async def _last_word(self, reply: _Reply, error: Error) -> None:
        """Without it, when the client does not read, the server breaks the response off."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                await reply.fail(error)

    def _timeout_s(self, headers: Headers) -> float:
        text = headers.get("x-request-timeout")
        if text is None:
            return min(self._limits.default_timeout_s, self._limits.max_timeout_s)
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = math.nan
        if not 0 < timeout_s <= self._limits.max_timeout_s:
            raise InvalidRequestError(
                f"the header x-request-timeout must be a number of seconds above 0 and up to "
                f"{self._limits.max_timeout_s:g}, not {text[:64]!r}",
                reason="INVALID_VALUE",
                metadata={"field": "x-request-timeout"},
            )
        return timeout_s

    async def _answer(self, asked: schema.GenerationRequest, reply: _Reply, deadline_s: float) -> None:
        model = require_model(self._front_door, asked.model)
        request = asked.to_proto(reply.request_id)
        head = Head(id=reply.request_id, created_s=int(time.time()), model=model.name, fingerprint=model.revision)
        shape = self._shape(head, self._vocabulary, with_logprobs=asked.num_logprobs is not None)
        outlet = _Stream(asked, shape, reply) if asked.stream else _Whole(shape, reply)
        try:
            async with until(deadline_s):
                await self._front_door.generate(request, reply.tenant, outlet)
                await outlet.end()
        except Exception as error:
            if not reply.begun:
                raise
            if not isinstance(error, Error):
                _log.exception("the stream failed")
            await self._last_word(reply, error if isinstance(error, Error) else internal_error(reply.request_id))


class _Reply:
    """The response to one request, and how far it has come."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, write_timeout_s: float) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._write_timeout_s = write_timeout_s
        self.begun = False
        self._streams = False
        self._write_now: Callable[[bytes], bool] | None = scope["state"].get("write_now")
        self.request_id: str = scope["state"]["request_id"]
        self.tenant: Tenant = scope["state"]["tenant"]
        self.wants_timeline = Headers(scope=scope).get("x-kvferry-timeline") == "1"

    async def whole(self, content: dict[str, Any]) -> None:
        self.begun = True
        await json_response(content)(self._scope, self._receive, self._send)

    def write_now(self, events: bytes) -> bool:
        """Sends server-sent events, unless that would have to wait."""
        return self._streams and self._write_now is not None and self._write_now(events)

    async def write(self, events: bytes) -> None:
        """Waits while the client does not read, but not for ever: then raises DeadlineError."""
        if not self.begun:
            self.begun = self._streams = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
        if self.write_now(events):
            return
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._send({"type": "http.response.body", "body": events, "more_body": True})
        except TimeoutError:
            raise DeadlineError(
                f"nothing of the answer was read for {self._write_timeout_s:g} s", reason="CLIENT_TOO_SLOW"
            ) from None

    async def end(self, events: bytes) -> None:
        await self.write(events)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: Error) -> None:
        """A response of its own, or the last event of the stream that has begun.  Another response that has begun is
        past mending, and the server breaks it off."""
        if self._streams:
            await self.end(sse_event(error_body(error)))
        elif not self.begun:
            self.begun = True
            await error_response(error)(self._scope, self._receive, self._send)


class _Whole:
    """Outlet of an answer that leaves in one piece, after its end, so that whoever has it knows that its resources are
    free."""

    def __init__(self, shape: Shape, reply: _Reply) -> None:
        self._shape = shape
        self._reply = reply
        self._texts: list[str] = []
        self._tokens: list[common_pb2.Token] = []
        self._finished: inference_pb2.Finished | None = None

    def send(self, response: inference_pb2.GenerateResponse) -> bool:
        kind = response.WhichOneof("event")
        if kind == "chunk":
            self._texts.append(response.chunk.text)
            self._tokens.extend(response.chunk.tokens)
        elif kind == "finished":
            self._finished = response.finished
        return True

    async def drained(self) -> None:
        """Nothing was sent that could be in the way."""

    async def end(self) -> None:
        if self._finished is None:
            raise _broken_off()
        content = self._shape.whole("".join(self._texts), self._tokens, self._finished)
        if self._reply.wants_timeline:
            content["kvferry"] = timeline_content(self._finished.timeline)
        await self._reply.whole(content)


class _Stream:
    """Outlet of server-sent events.  Begins the response with the first chunk, not before: until then a failure can still
    have its own status, which is what clients decide on whether to try again.  Ends it after the answer's own end, as
    ``_Whole`` does."""

    def __init__(self, asked: schema.GenerationRequest, shape: Shape, reply: _Reply) -> None:
        self._asked = asked
        self._shape = shape
        self._reply = reply
        self._with_logprobs = asked.num_logprobs is not None
        # With include_usage every event has the field, null in all but the last.
        self._extra: dict[str, Any] = {"usage": None} if asked.include_usage else {}
        self._so_far = inference_pb2.Usage()
        opening = shape.opening()
        self._ahead = b"" if opening is None else sse_event({**opening, **self._extra})
        self._around: tuple[bytes, bytes] | None = None
        if not self._with_logprobs and not asked.usage_so_far:
            before, after = sse_event({**shape.delta(_MARK, ()), **self._extra}).split(encode(_MARK))
            self._around = before, after
        self._finished: inference_pb2.Finished | None = None

    def send(self, response: inference_pb2.GenerateResponse) -> bool:
        kind = response.WhichOneof("event")
        if kind == "chunk":
            return self._send_chunk(response.chunk)
        if kind == "started":
            self._so_far.num_prompt_tokens = response.started.num_prompt_tokens
        elif kind == "finished":
            self._finished = response.finished
        return True

    def _send_chunk(self, chunk: inference_pb2.Chunk) -> bool:
        if self._asked.usage_so_far:
            self._so_far.num_output_tokens += len(chunk.tokens)
            self._extra = {"usage": usage_content(self._so_far)}
        if not chunk.text and not (self._with_logprobs and chunk.tokens):
            return True
        if self._around is not None:
            before, after = self._around
            events = b"%b%b%b%b" % (self._ahead, before, encode(chunk.text), after)
        else:
            events = self._ahead + sse_event({**self._shape.delta(chunk.text, chunk.tokens), **self._extra})
        is_sent = self._reply.write_now(events)
        self._ahead = b"" if is_sent else events
        return is_sent

    async def drained(self) -> None:
        events, self._ahead = self._ahead, b""
        await self._reply.write(events)

    async def end(self) -> None:
        if self._finished is None:
            raise _broken_off()
        if self._asked.usage_so_far:
            self._extra = {"usage": usage_content(self._finished.usage)}
        parts = [{**self._shape.closing(self._finished.reason), **self._extra}]
        if self._asked.include_usage:
            parts.append(self._shape.usage(self._finished.usage))
        if self._reply.wants_timeline:
            parts[-1]["kvferry"] = timeline_content(self._finished.timeline)
        await self._reply.end(b"".join((self._ahead, *map(sse_event, parts), DONE_EVENT)))


def _broken_off() -> InternalError:
    return InternalError("the answer broke off without an end")
