"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtobufMessage

from kvferry import _channel, _convert, _retry, errors
from kvferry._answer import Answer
from kvferry._gateways import Gateways
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
from kvferry.client import (
    DEFAULT_ADDRESS,
    DEFAULT_GENERATE_TIMEOUT_S,
    DEFAULT_KEEPALIVE_S,
    DEFAULT_MAX_ATTEMPTS,
    DEFAULT_TIMEOUT_S,
)
from kvferry.types import (
    Chunk,
    Cluster,
    Completion,
    HealthStatus,
    Message,
    ModelInfo,
    RouteDecision,
    TlsConfig,
    Traffic,
)

_Request = TypeVar("_Request", bound=ProtobufMessage)
_Response = TypeVar("_Response")


class _Call(Protocol):
    def read(self) -> Awaitable[Any]: ...
    def cancel(self) -> bool: ...


class AsyncStream(Answer):
    """One answer as it comes: ``async for`` over its :class:`Chunk`, or take the whole with :meth:`result`.

    As :class:`kvferry.Stream`; besides, cancelling the task that reads cancels the call.  One task may read.
    """

    def __init__(
        self,
        start: Callable[[float], _Call],
        deadline: _retry.Deadline,
        max_attempts: int,
        client_closed: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._client_closed = client_closed
        self._start = start
        self._deadline = deadline
        self._max_attempts = max_attempts
        self._closed = False
        self._begun = False
        self._error: errors.Error | None = None
        self._call: _Call | None = start(deadline.remaining_s())

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """The next piece of the answer; raises kvferry.Error when there will be none."""
        if self._error is not None:
            raise self._error
        try:
            while (response := await self._next_response()) is not None:
                if (chunk := self._take(response)) is not None:
                    return chunk
            self._check_complete()
        except errors.Error as error:
            self._error = error
            raise
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the call unless it has ended.  Idempotent; a reader in another task gets kvferry.CancelledError."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    cancel = close

    async def result(self) -> Completion:
        """Reads to the end, and returns the whole answer, what was read before included."""
        async for _ in self:
            pass
        return self._completion()

    async def _next_response(self) -> inference_pb2.GenerateResponse | None:
        if self._begun:
            return await self._read()
        response = await _retry.asynchronous(self._attempt, self._deadline, self._max_attempts, _retry.was_refused)
        self._begun = True
        return response

    async def _attempt(self) -> inference_pb2.GenerateResponse | None:
        if self._closed:
            raise errors.CancelledError("the stream was closed")
        if self._call is None:
            self._call = self._start(self._deadline.remaining_s())
        try:
            return await self._read()
        except errors.Error:
            self._call = None
            raise

    async def _read(self) -> inference_pb2.GenerateResponse | None:
        assert self._call is not None
        try:
            response: object = await self._call.read()
        except grpc.RpcError as error:
            raise _convert.error(error, cancelled=self._closed or self._client_closed()) from error
        except asyncio.CancelledError:
            # grpc.aio says so too when close() has cancelled the call; then this task was not.
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise errors.CancelledError("the stream was closed") from None
            raise
        return None if response is grpc.aio.EOF else cast("inference_pb2.GenerateResponse", response)


class _Gateway:
    """A channel to one, and what is called on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.cluster = inference_pb2_grpc.ClusterServiceStub(channel)
        self.health: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_channel.HEALTH_CHECK)


class AsyncClient:
    """A connection to a kvferry gateway for asyncio.  As :class:`kvferry.Client`; made and used in one event loop.

    ``generate`` and ``chat`` return their stream at once, without awaiting.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tls: TlsConfig | None = None,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        generate_timeout: float = DEFAULT_GENERATE_TIMEOUT_S,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        keepalive_s: float = DEFAULT_KEEPALIVE_S,
    ) -> None:
        asyncio.get_running_loop()  # grpc would quietly bind the channel to a loop that never runs
        self.address = address
        self._metadata = _channel.metadata(api_key)
        self._timeout_s = timeout
        self._generate_timeout_s = generate_timeout
        self._max_attempts = max_attempts
        options = _channel.options(keepalive_s)
        secured = None if tls is None else _channel.credentials(tls)

        def connect(target: str) -> _Gateway:
            if secured is None:
                return _Gateway(grpc.aio.insecure_channel(target, options))
            return _Gateway(grpc.aio.secure_channel(target, secured, options))

        self._gateways = Gateways(address, connect)
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is still running and frees the connections.  Idempotent."""
        self._closed = True
        for gateway in self._gateways.all:
            await gateway.channel.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        speculate: bool | None = None,
        priority: int = 0,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> AsyncStream:
        """As :meth:`kvferry.Client.generate`."""
        return self._stream(
            _convert.generate_request(
                prompt,
                model=model,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                stop=stop,
                stop_token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
                logprobs=logprobs,
                speculate=speculate,
                priority=priority,
                request_id=request_id,
            ),
            timeout,
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        model: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        speculate: bool | None = None,
        priority: int = 0,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> AsyncStream:
        """As :meth:`kvferry.Client.chat`."""
        return self._stream(
            _convert.generate_request(
                _convert.chat(messages),
                model=model,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                stop=stop,
                stop_token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
                logprobs=logprobs,
                speculate=speculate,
                priority=priority,
                request_id=request_id,
            ),
            timeout,
        )

    async def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        response = await self._unary(
            lambda gateway: gateway.inference.ListModels, inference_pb2.ListModelsRequest(), timeout
        )
        return tuple(map(_convert.model, response.models))

    async def tokenize(
        self, prompt: str | Sequence[Message], *, model: str = "", timeout: float | None = None
    ) -> tuple[int, ...]:
        """As :meth:`kvferry.Client.tokenize`."""
        request = _convert.tokenize_request(prompt, model)
        return tuple((await self._unary(lambda gateway: gateway.inference.Tokenize, request, timeout)).ids)

    async def detokenize(self, ids: Sequence[int], *, model: str = "", timeout: float | None = None) -> str:
        """As :meth:`kvferry.Client.detokenize`."""
        request = _convert.detokenize_request(ids, model)
        return (await self._unary(lambda gateway: gateway.inference.Detokenize, request, timeout)).text

    async def cluster(self, *, timeout: float | None = None) -> Cluster:
        """As :meth:`kvferry.Client.cluster`."""
        return _convert.cluster(
            await self._unary(
                lambda gateway: gateway.cluster.DescribeCluster, inference_pb2.DescribeClusterRequest(), timeout
            )
        )

    async def explain_route(self, request_id: str, *, timeout: float | None = None) -> tuple[RouteDecision, ...]:
        """As :meth:`kvferry.Client.explain_route`."""
        request = inference_pb2.ExplainRouteRequest(request_id=request_id)
        response = await self._unary(lambda gateway: gateway.cluster.ExplainRoute, request, timeout)
        return tuple(map(_convert.route_decision, response.decisions))

    async def traffic(self, *, timeout: float | None = None) -> Traffic:
        """As :meth:`kvferry.Client.traffic`."""
        request = inference_pb2.DescribeTrafficRequest()
        response = await self._unary(lambda gateway: gateway.cluster.DescribeTraffic, request, timeout)
        return _convert.traffic(response)

    async def health(self, *, timeout: float | None = None) -> HealthStatus:
        """As :meth:`kvferry.Client.health`."""
        self._check_open()
        deadline = self._deadline(timeout, self._timeout_s)
        try:
            return _convert.health(
                await self._gateways.current.health(b"", timeout=deadline.remaining_s(), metadata=self._metadata)
            )
        except grpc.RpcError as error:
            raise _convert.error(error) from error

    def _stream(self, request: inference_pb2.GenerateRequest, timeout_s: float | None) -> AsyncStream:
        deadline = self._deadline(timeout_s, self._generate_timeout_s)

        asked: _Gateway | None = None

        def start(remaining_s: float) -> _Call:
            nonlocal asked
            self._check_open()
            if asked is not None:  # it refused
                self._gateways.leave(asked)
            asked = self._gateways.current
            return asked.inference.Generate(request, timeout=remaining_s, metadata=self._metadata)

        return AsyncStream(start, deadline, self._max_attempts, lambda: self._closed)

    async def _unary(
        self,
        method: Callable[[_Gateway], grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]],
        request: _Request,
        timeout_s: float | None,
    ) -> _Response:
        """For calls that change nothing, and so may be made again."""
        deadline = self._deadline(timeout_s, self._timeout_s)

        async def attempt() -> _Response:
            self._check_open()
            gateway = self._gateways.current
            try:
                return await method(gateway)(request, timeout=deadline.remaining_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                failure = _convert.error(error, cancelled=self._closed)
                if _retry.is_transient(failure):
                    self._gateways.leave(gateway)
                raise failure from error

        return await _retry.asynchronous(attempt, deadline, self._max_attempts, _retry.is_transient)

    def _check_open(self) -> None:
        if self._closed:
            raise errors.ConflictError("the client is closed")

    @staticmethod
    def _deadline(timeout_s: float | None, default_s: float) -> _retry.Deadline:
        return _retry.Deadline(default_s if timeout_s is None else timeout_s)
