"""The blocking client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

import grpc
from google.protobuf.message import Message as ProtobufMessage
from tenacity import sleep_using_event

from kvferry import _channel, _convert, _retry, errors
from kvferry._answer import Answer
from kvferry._gateways import Gateways
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
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

DEFAULT_ADDRESS = "127.0.0.1:8470"
DEFAULT_TIMEOUT_S = 10.0
DEFAULT_GENERATE_TIMEOUT_S = 600.0
DEFAULT_MAX_ATTEMPTS = 4
DEFAULT_KEEPALIVE_S = 30.0

_Request = TypeVar("_Request", bound=ProtobufMessage)
_Response = TypeVar("_Response")


class _Call(Protocol):
    def __next__(self) -> inference_pb2.GenerateResponse: ...
    def cancel(self) -> bool: ...


class Stream(Answer):
    """One answer as it comes: iterate over its :class:`Chunk`, or take the whole with :meth:`result`.

    The call has begun when the stream is made.  As long as nothing has arrived it is begun again, within its deadline,
    when nobody could serve it or when a refusal says when to come back; after that every error is final.  Leaving the
    ``with`` block, :meth:`close` and garbage collection cancel the call, and with it the compute behind it.  One
    thread may read; any thread may close.
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
        self._closed = threading.Event()
        self._begun = False
        self._error: errors.Error | None = None
        self._call: _Call | None = None  # __del__ needs it even when start() fails
        self._call = start(deadline.remaining_s())

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """Blocks until the next piece of the answer; raises kvferry.Error when there will be none."""
        if self._error is not None:
            raise self._error
        try:
            while (response := self._next_response()) is not None:
                if (chunk := self._take(response)) is not None:
                    return chunk
            self._check_complete()
        except errors.Error as error:
            self._error = error
            raise
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the call unless it has ended.  Idempotent; a reader in another thread gets CancelledError."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    cancel = close

    def result(self) -> Completion:
        """Reads to the end, and returns the whole answer, what was read before included."""
        for _ in self:
            pass
        return self._completion()

    def _next_response(self) -> inference_pb2.GenerateResponse | None:
        if self._begun:
            return self._read()
        sleep = sleep_using_event(self._closed)
        response = _retry.blocking(self._attempt, self._deadline, self._max_attempts, _retry.was_refused, sleep)
        self._begun = True
        return response

    def _attempt(self) -> inference_pb2.GenerateResponse | None:
        if self._call is None:
            self._call = self._start(self._deadline.remaining_s())
        if self._closed.is_set():
            self._call.cancel()
        try:
            return self._read()
        except errors.Error:
            self._call = None
            raise

    def _read(self) -> inference_pb2.GenerateResponse | None:
        assert self._call is not None
        try:
            return next(self._call)
        except StopIteration:
            return None
        except grpc.RpcError as error:
            raise _convert.error(error, cancelled=self._closed.is_set() or self._client_closed()) from error


class _Gateway:
    """A channel to one, and what is called on it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.cluster = inference_pb2_grpc.ClusterServiceStub(channel)
        self.health: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_channel.HEALTH_CHECK)


class Client:
    """A connection to a kvferry gateway.  Thread-safe; connects with the first call and reconnects by itself.

    ``address`` may name several gateways of one cluster, with commas between them: when the one that is asked cannot be
    reached, or refuses, the next attempt goes to the next.
    ``timeout`` is the deadline in seconds of every call but ``generate`` and ``chat``, whose is ``generate_timeout``;
    each call takes its own ``timeout`` instead.  A deadline covers all attempts.  ``max_attempts`` 1 switches retries
    off.  ``api_key`` goes with every call as ``authorization: Bearer``; without ``tls`` it is sent in the clear.

    Every method raises :class:`kvferry.Error`, and nothing else for what happens on the way.
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
        self.address = address
        self._metadata = _channel.metadata(api_key)
        self._timeout_s = timeout
        self._generate_timeout_s = generate_timeout
        self._max_attempts = max_attempts
        options = _channel.options(keepalive_s)
        secured = None if tls is None else _channel.credentials(tls)

        def connect(target: str) -> _Gateway:
            if secured is None:
                return _Gateway(grpc.insecure_channel(target, options))
            return _Gateway(grpc.secure_channel(target, secured, options))

        self._gateways = Gateways(address, connect)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is still running and frees the connections.  Idempotent."""
        self._closed = True
        for gateway in self._gateways.all:
            gateway.channel.close()

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
    ) -> Stream:
        """Continues ``prompt``, text or token ids as they stand, without a chat template.

        ``temperature`` 0 is greedy; ``seed`` makes sampling repeatable; the answer ends before the first of ``stop``;
        ``logprobs`` asks for each token's log-probability and for that many likeliest alternatives (0 to 20);
        ``speculate`` for several tokens a step where the answer repeats what was said before, for more speed and the same
        tokens.  Where requests must wait, those of higher ``priority`` go before the same tenant's others.  What is None is
        the gateway's to choose, or the worker's.
        """
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
    ) -> Stream:
        """Answers a conversation, rendered by the model's chat template.  Parameters as in :meth:`generate`."""
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

    def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        response = self._unary(lambda gateway: gateway.inference.ListModels, inference_pb2.ListModelsRequest(), timeout)
        return tuple(map(_convert.model, response.models))

    def tokenize(
        self, prompt: str | Sequence[Message], *, model: str = "", timeout: float | None = None
    ) -> tuple[int, ...]:
        """The token ids of a text as it stands, or of a conversation in the model's chat template."""
        request = _convert.tokenize_request(prompt, model)
        return tuple(self._unary(lambda gateway: gateway.inference.Tokenize, request, timeout).ids)

    def detokenize(self, ids: Sequence[int], *, model: str = "", timeout: float | None = None) -> str:
        """The text of the tokens; incomplete characters become U+FFFD."""
        request = _convert.detokenize_request(ids, model)
        return self._unary(lambda gateway: gateway.inference.Detokenize, request, timeout).text

    def cluster(self, *, timeout: float | None = None) -> Cluster:
        """The workers, their blocks and rates as the gateway sees them now."""
        return _convert.cluster(
            self._unary(
                lambda gateway: gateway.cluster.DescribeCluster, inference_pb2.DescribeClusterRequest(), timeout
            )
        )

    def explain_route(self, request_id: str, *, timeout: float | None = None) -> tuple[RouteDecision, ...]:
        """Why a request went where it did, one decision for each attempt.  NotFoundError unless it is among the last 1000
        that the gateway routed; of several gateways, only the one that is asked at the moment."""
        request = inference_pb2.ExplainRouteRequest(request_id=request_id)
        response = self._unary(lambda gateway: gateway.cluster.ExplainRoute, request, timeout)
        return tuple(map(_convert.route_decision, response.decisions))

    def traffic(self, *, timeout: float | None = None) -> Traffic:
        """How long the last requests of the key's tenant were and took, of the last 20,000 that the gateway answered; of
        several gateways, only the one that is asked at the moment."""
        request = inference_pb2.DescribeTrafficRequest()
        response = self._unary(lambda gateway: gateway.cluster.DescribeTraffic, request, timeout)
        return _convert.traffic(response)

    def health(self, *, timeout: float | None = None) -> HealthStatus:
        """What the gateway says of itself, asked once; UnavailableError when nobody answers."""
        self._check_open()
        deadline = self._deadline(timeout, self._timeout_s)
        try:
            return _convert.health(
                self._gateways.current.health(b"", timeout=deadline.remaining_s(), metadata=self._metadata)
            )
        except grpc.RpcError as error:
            raise _convert.error(error) from error

    def _stream(self, request: inference_pb2.GenerateRequest, timeout_s: float | None) -> Stream:
        deadline = self._deadline(timeout_s, self._generate_timeout_s)

        asked: _Gateway | None = None

        def start(remaining_s: float) -> _Call:
            nonlocal asked
            self._check_open()
            if asked is not None:  # it refused
                self._gateways.leave(asked)
            asked = self._gateways.current
            return asked.inference.Generate(request, timeout=remaining_s, metadata=self._metadata)

        return Stream(start, deadline, self._max_attempts, lambda: self._closed)

    def _unary(
        self,
        method: Callable[[_Gateway], grpc.UnaryUnaryMultiCallable[_Request, _Response]],
        request: _Request,
        timeout_s: float | None,
    ) -> _Response:
        """For calls that change nothing, and so may be made again."""
        deadline = self._deadline(timeout_s, self._timeout_s)

        def attempt() -> _Response:
            self._check_open()
            gateway = self._gateways.current
            try:
                return method(gateway)(request, timeout=deadline.remaining_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                failure = _convert.error(error, cancelled=self._closed)
                if _retry.is_transient(failure):
                    self._gateways.leave(gateway)
                raise failure from error

        return _retry.blocking(attempt, deadline, self._max_attempts, _retry.is_transient)

    def _check_open(self) -> None:
        if self._closed:
            raise errors.ConflictError("the client is closed")

    @staticmethod
    def _deadline(timeout_s: float | None, default_s: float) -> _retry.Deadline:
        return _retry.Deadline(default_s if timeout_s is None else timeout_s)
