"""Runs one request's state machine against real workers: routes, opens streams, passes tokens on."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog

from gateway.request import (
    CancelAttempt,
    ChooseRoute,
    DecodeDone,
    Emit,
    Event,
    Fail,
    Finish,
    NotRouted,
    OpenDecode,
    OpenPrefill,
    PrefillDone,
    RequestMachine,
    Routed,
    Stream,
    StreamFailed,
    TicketCame,
    TokenCame,
)
from gateway.routing import Candidate, NoWorkerError, Role, Route, WorkerKey, choose_route
from gateway.view import ClusterView
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import Error, InternalError, UnavailableError, from_rpc_error
from services.directory.index import Prefix
from services.engine.hashing import chain_root, extend_chain
from services.runtime.channels import Channels

log = structlog.get_logger(__name__)

NO_WORKER_RETRY_S = 1.0
WORKER_RETRY_S = 2.0
# After the last token, how long the writer's figures may take: they decorate the timeline and nothing else.
FIGURES_TIMEOUT_S = 1.0

_NO_PREFIX = Prefix(0, 0)
_ROLES = {common_pb2.WORKER_ROLE_PREFILL: Role.PREFILL, common_pb2.WORKER_ROLE_DECODE: Role.DECODE}


@dataclass(frozen=True, slots=True)
class Job:
    """A request whose defaults are all filled in."""

    request_id: str
    prompt: Sequence[int]
    sampling: common_pb2.SamplingParams
    cache_salt: bytes = b""


@dataclass(slots=True)
class Trace:
    """What is known of a request's way so far; filled in while it runs."""

    route: Route | None = None
    route_s: float = 0.0
    committed: worker_pb2.Committed | None = None
    finished: worker_pb2.DecodeFinished | None = None
    num_retries: int = 0
    # By time.monotonic(), of the last attempt.
    opened_s: float | None = None
    ticket_s: float | None = None


@dataclass(slots=True)
class Pending:
    """What this gateway has sent to a worker and not yet heard the end of."""

    num_requests: int = 0
    prefill_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Run:
    """The moving parts of one request."""

    job: Job
    trace: Trace
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    tasks: dict[int, list[asyncio.Task[None]]] = field(default_factory=dict)

    @property
    def route(self) -> Route:
        assert self.trace.route is not None, "streams open after routing"
        return self.trace.route

    @property
    def prefill(self) -> Candidate:
        assert self.route.prefill is not None, "a ticket comes when a writer was named"
        return self.route.prefill


class Dispatcher:
    def __init__(
        self, view: ClusterView, channels: Channels, *, model_revision: str, min_ship_tokens: int, max_attempts: int,
        stall_timeout_s: float,
    ) -> None:  # fmt: skip
        """``stall_timeout_s``: a stream that says nothing for so long has failed."""
        self._view = view
        self._channels = channels
        self._model_revision = model_revision
        self._min_ship_tokens = min_ship_tokens
        self._max_attempts = max_attempts
        self._stall_timeout_s = stall_timeout_s
        self._pending: dict[WorkerKey, Pending] = {}

    async def run(self, job: Job, trace: Trace) -> AsyncGenerator[common_pb2.Token, None]:
        """Each token once, in order.  Closing the generator stops the request's compute.  Raises kvferry.errors.Error."""
        run = _Run(job, trace)
        machine = RequestMachine(self._max_attempts)
        actions = deque(machine.start())
        try:
            while True:
                while actions:
                    match actions.popleft():
                        case ChooseRoute(excluded=excluded):
                            actions.extend(machine.on(self._choose(run, excluded)))
                        case OpenDecode(attempt=attempt):
                            trace.opened_s, trace.ticket_s = time.monotonic(), None
                            self._start(run, attempt, Stream.DECODE, run.route.decode, self._decode(run, attempt))
                        case OpenPrefill(attempt=attempt, ticket=ticket):
                            trace.ticket_s = time.monotonic()
                            work = self._prefill(run, attempt, ticket)
                            self._start(run, attempt, Stream.PREFILL, run.prefill, work)
                        case CancelAttempt(attempt=attempt):
                            for task in run.tasks.get(attempt, ()):
                                task.cancel()
                        case Emit(token=token):
                            yield token
                        case Finish(finished=finished):
                            trace.finished = finished
                            return
                        case Fail(error=error):
                            raise error
                event = await run.events.get()
                if isinstance(event, PrefillDone) and event.attempt == machine.attempt:
                    trace.committed = event.committed
                actions.extend(machine.on(event))
                trace.num_retries = max(0, machine.attempt - 1)
        finally:
            tasks = [task for attempt in run.tasks.values() for task in attempt]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def candidates(self, job: Job) -> list[Candidate]:
        """The workers that serve this model, as routing sees them."""
        prefixes: dict[int, dict[str, Prefix]] = {}  # by block size
        found = []
        for worker in self._view.workers.values():
            info, load = worker.info, worker.load
            if info.role not in _ROLES or info.model.revision != self._model_revision or load.draining:
                continue
            block_size = info.layout.block_size_tokens
            if block_size not in prefixes:
                root = chain_root(self._model_revision, job.cache_salt)
                prefixes[block_size] = self._view.longest_prefix(extend_chain(root, job.prompt, block_size))
            key = WorkerKey(info.worker_id, info.incarnation)
            pending = self._pending.get(key, Pending())
            found.append(
                Candidate(
                    key=key,
                    role=_ROLES[info.role],
                    address=info.control_address,
                    content_fingerprint=info.layout.content_fingerprint,
                    block_size=block_size,
                    num_requests=max(pending.num_requests, load.num_running + load.num_waiting),
                    num_queued_prefill_tokens=max(pending.prefill_tokens, load.num_queued_prefill_tokens),
                    num_free_blocks=load.blocks.free + load.blocks.cached,
                    num_prefix_blocks=prefixes[block_size].get(info.worker_id, _NO_PREFIX).num_blocks,
                    prefill_tokens_per_s=load.prefill_tokens_per_s,
                )
            )
        return found

    def _choose(self, run: _Run, excluded: frozenset[WorkerKey]) -> Event:
        started_s = time.monotonic()
        try:
            route = choose_route(self.candidates(run.job), len(run.job.prompt), excluded, self._min_ship_tokens)
        except NoWorkerError as e:
            return NotRouted(UnavailableError(str(e), reason="NO_WORKER", retry_after_s=NO_WORKER_RETRY_S))
        finally:
            run.trace.route_s += time.monotonic() - started_s
        run.trace.route, run.trace.committed = route, None
        log.info("route", reason=route.reason, prompt_tokens=len(run.job.prompt))
        return Routed(route.decode.key, route.prefill.key if route.prefill else None)

    def _start(
        self, run: _Run, attempt: int, stream: Stream, worker: Candidate, work: Coroutine[Any, Any, None]
    ) -> None:
        num_tokens = len(run.job.prompt) if stream is Stream.PREFILL or not run.route.prefill else 0

        async def guarded() -> None:
            try:
                with self._counted(worker.key, num_tokens):
                    await work
                error: Error = UnavailableError(f"worker {worker.key.worker_id} ended its stream early")
            except grpc.aio.AioRpcError as e:
                error = from_rpc_error(e)
                log.warning("stream_failed", stream=stream.name, worker_id=worker.key.worker_id, error=str(error))
                if error.reason == UnavailableError.default_reason:  # gRPC's own word, not the worker's
                    text = f"worker {worker.key.worker_id} was lost or cannot be reached; send the request again"
                    error = UnavailableError(text, reason="WORKER_LOST", retry_after_s=WORKER_RETRY_S)
            except TimeoutError:
                text = f"worker {worker.key.worker_id} said nothing for {self._stall_timeout_s:g} s"
                error = UnavailableError(text, reason="STALLED")
            except Exception as e:
                log.exception("stream_broke", stream=stream.name)
                error = InternalError(f"the gateway failed to follow a worker's stream: {type(e).__name__}")
            run.events.put_nowait(StreamFailed(attempt, stream, error))  # ignored where the stream had come to its end

        run.tasks.setdefault(attempt, []).append(asyncio.create_task(guarded()))

    async def _decode(self, run: _Run, attempt: int) -> None:
        decode, prefill, job = run.route.decode, run.route.prefill, run.job
        request = worker_pb2.DecodeRequest(
            request_id=job.request_id,
            prompt_token_ids=job.prompt,
            sampling=job.sampling,
            cache_salt=job.cache_salt,
            writer=self._writer(prefill) if prefill else None,
        )
        stub = worker_pb2_grpc.DecodeServiceStub(self._channels.get(decode.address))
        async with aclosing(_each(stub.Decode(request), self._stall_timeout_s)) as responses:
            async for response in responses:
                match response.WhichOneof("event"):
                    case "ticket":
                        run.events.put_nowait(TicketCame(attempt, response.ticket))
                    case "token":
                        run.events.put_nowait(TokenCame(attempt, Stream.DECODE, response.token))
                    case "finished":
                        run.events.put_nowait(DecodeDone(attempt, response.finished))
                        await asyncio.sleep(FIGURES_TIMEOUT_S)
                        late = UnavailableError("the prefill worker's figures did not come")
                        run.events.put_nowait(StreamFailed(attempt, Stream.PREFILL, late))
                        return

    async def _prefill(self, run: _Run, attempt: int, ticket: worker_pb2.Ticket) -> None:
        job = run.job
        request = worker_pb2.PrefillRequest(
            request_id=job.request_id,
            prompt_token_ids=job.prompt,
            sampling=job.sampling,
            ticket=ticket,
            cache_salt=job.cache_salt,
        )
        stub = worker_pb2_grpc.PrefillServiceStub(self._channels.get(run.prefill.address))
        async with aclosing(_each(stub.Prefill(request), self._stall_timeout_s)) as responses:
            async for response in responses:
                if response.WhichOneof("event") == "first_token":
                    run.events.put_nowait(TokenCame(attempt, Stream.PREFILL, response.first_token))
                else:
                    run.events.put_nowait(PrefillDone(attempt, response.committed))

    def _writer(self, candidate: Candidate) -> worker_pb2.Writer:
        state = self._view.workers.get(candidate.key.worker_id)
        return worker_pb2.Writer(
            worker_id=candidate.key.worker_id,
            incarnation=candidate.key.incarnation,
            control_address=candidate.address,
            process=state.info.process if state else None,
        )

    def _counted(self, key: WorkerKey, prefill_tokens: int) -> _Counted:
        return _Counted(self._pending, key, prefill_tokens)


class _Counted:
    """Counts a stream as pending on its worker while entered."""

    def __init__(self, pending: dict[WorkerKey, Pending], key: WorkerKey, prefill_tokens: int) -> None:
        self._pending, self._key, self._prefill_tokens = pending, key, prefill_tokens

    def __enter__(self) -> None:
        entry = self._pending.setdefault(self._key, Pending())
        entry.num_requests += 1
        entry.prefill_tokens += self._prefill_tokens

    def __exit__(self, *_: object) -> None:
        entry = self._pending[self._key]
        entry.num_requests -= 1
        entry.prefill_tokens -= self._prefill_tokens
        if entry.num_requests == 0:
            del self._pending[self._key]


async def _each(call: Any, stall_timeout_s: float) -> AsyncGenerator[Any, None]:
    """The stream's messages; TimeoutError when one takes too long.  Leaving early cancels the call."""
    try:
        while True:
            async with asyncio.timeout(stall_timeout_s):
                message = await call.read()
            if message is grpc.aio.EOF:
                return
            yield message
    finally:
        call.cancel()
