"""Runs one request's state machine against real workers: routes, opens requests there, passes tokens on."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import grpc
import structlog
from prometheus_client import Counter

from gateway.candidates import Candidate, Rates, Role, TransferRate, WorkerKey
from gateway.costs import Demand
from gateway.decisions import Decision, DecisionBook, Refusal
from gateway.link import DecodeLink, DecodeLinks
from gateway.pace import Load, Pace
from gateway.pulls import Pull
from gateway.request import (
    Action,
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
from gateway.routing import NoWorkerError, Policy, Route, choose_route
from gateway.tenants import EVERYBODY, Tenant
from gateway.view import ClusterView
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import DeadlineError, Error, InternalError, UnavailableError, from_rpc_error
from services.directory.index import Prefix
from services.engine.hashing import chain_root, extend_chain
from services.runtime.channels import Channels
from services.runtime.failure import from_failure
from services.runtime.place import Distance
from services.runtime.tracing import outgoing_metadata

log = structlog.get_logger(__name__)

NO_WORKER_RETRY_S = 1.0
WORKER_RETRY_S = 2.0
# How long an answer that has begun waits for a worker to go on with.
WORKER_WAIT_S = 30.0
# When nobody else is there, workers that failed it are tried again after so long.
FORGIVE_S = 2.0
# After the last token, how long the writer's figures may take: they decorate the timeline and nothing else.
FIGURES_TIMEOUT_S = 1.0

# As long as a worker waits at all.
MAX_PULL_MS = 10_000

_CONTINUED = Counter("kvferry_requests_continued", "Times that a request went on behind tokens already sent")

# Of the options, in the log.
_LOGGED_OPTIONS = 8

_NO_PREFIX = Prefix(0, 0)
_DISTANCES: dict[int, Distance] = {distance.value: distance for distance in Distance}
_ROLES = {common_pb2.WORKER_ROLE_PREFILL: Role.PREFILL, common_pb2.WORKER_ROLE_DECODE: Role.DECODE}


@dataclass(frozen=True, slots=True)
class Job:
    """A request whose defaults are all filled in."""

    request_id: str
    prompt: Sequence[int]
    sampling: common_pb2.SamplingParams
    tenant: Tenant = EVERYBODY

    @property
    def cache_salt(self) -> bytes:
        return self.tenant.cache_salt

    def behind(self, sent: Sequence[int]) -> Job:
        """What is left of it when ``sent`` has been answered: the same tokens come next."""
        if not sent:
            return self
        sampling = common_pb2.SamplingParams()
        sampling.CopyFrom(self.sampling)
        sampling.max_tokens -= len(sent)
        return replace(self, prompt=[*self.prompt, *sent], sampling=sampling)


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


class PendingBook:
    def __init__(self) -> None:
        self._by_worker: dict[WorkerKey, Pending] = {}

    def of(self, key: WorkerKey) -> Pending:
        return self._by_worker.get(key, Pending())

    def add(self, key: WorkerKey, prefill_tokens: int) -> Pending:
        """One request; what to ``remove`` at its end."""
        total = self._by_worker.setdefault(key, Pending())
        total.num_requests += 1
        total.prefill_tokens += prefill_tokens
        return Pending(1, prefill_tokens)

    def computed(self, key: WorkerKey, counted: Pending) -> None:
        """The prompt is no longer ahead of others'; the request goes on.  Idempotent."""
        self._by_worker[key].prefill_tokens -= counted.prefill_tokens
        counted.prefill_tokens = 0

    def remove(self, key: WorkerKey, ended: Pending) -> None:
        total = self._by_worker[key]
        total.num_requests -= ended.num_requests
        total.prefill_tokens -= ended.prefill_tokens
        if total.num_requests == 0:
            del self._by_worker[key]


class _Run:
    """The moving parts of one request: where its events wait, and what goes on for it."""

    def __init__(self, job: Job, trace: Trace, pace: Pace) -> None:
        self.whole_job = job
        self.job = job  # of the attempt
        self.sent: list[int] = []
        self.trace = trace
        self.routed = False
        self._pace = pace
        self.tasks: dict[int, asyncio.Task[None]] = {}  # prefill streams, by attempt
        self.decodes: dict[int, _Decoding] = {}  # by attempt
        self.timers: list[asyncio.TimerHandle] = []
        self.events: deque[Event | DeadlineError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_woken = False
        self._is_paced = False

    @property
    def route(self) -> Route:
        assert self.trace.route is not None, "streams open after routing"
        return self.trace.route

    @property
    def prefill(self) -> Candidate:
        assert self.route.prefill is not None, "a ticket comes when a writer was named"
        return self.route.prefill

    def put(self, event: Event | DeadlineError) -> None:
        """Tokens after the first wait for the pace, everything else is for now."""
        self.events.append(event)
        if not isinstance(event, TokenCame) or event.token.index == 0:
            self._wake()
            return
        if not self._is_paced and not self._is_woken:
            self._is_paced = True
            self._pace.add(self._wake)

    def put_later(self, delay_s: float, event: Event | DeadlineError) -> None:
        self.timers.append(asyncio.get_running_loop().call_later(delay_s, self.put, event))

    async def wait(self) -> None:
        """Until there are events to be seen to.  One task waits."""
        if not self._is_woken:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._is_woken = False

    def _wake(self) -> None:
        self._is_paced, self._is_woken = False, True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self, attempt: int) -> None:
        if task := self.tasks.get(attempt):
            task.cancel()
        if decode := self.decodes.get(attempt):
            decode.cancel()

    async def end(self) -> None:
        """Cancels whatever goes on."""
        for timer in self.timers:
            timer.cancel()
        for attempt in self.tasks.keys() | self.decodes.keys():
            self.cancel(attempt)
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


class _Decoding:
    """One attempt's request on its decode worker, which counts as pending there until it has ended."""

    def __init__(self, run: _Run, attempt: int, link: DecodeLink, pending: PendingBook, stall_timeout_s: float) -> None:
        self._run = run
        self._attempt = attempt
        self._link = link
        self._worker_id = run.route.decode.key.worker_id
        self._pending = pending
        self._stall_timeout_s = stall_timeout_s
        self._heard_s = time.monotonic()
        self._counted: Pending | None = None
        self._promised: tuple[WorkerKey, Pending] | None = None  # to the prefill worker, until the ticket is here
        self._handle = 0
        self._silence: asyncio.TimerHandle | None = None

    def open(self, request: worker_pb2.DecodeOpen) -> None:
        try:
            self._handle = self._link.open(request, self)
        except Error as e:
            self.on_lost(e)
            return
        route = self._run.route
        self._counted = self._pending.add(route.decode.key, 0 if route.prefill else route.num_uncached_tokens)
        if route.prefill:
            # Requests that come before the ticket does must not find the prefill worker idle.
            self._promised = (route.prefill.key, self._pending.add(route.prefill.key, route.num_uncached_tokens))
        self._watch(self._stall_timeout_s)

    def on_event(self, event: worker_pb2.DecodeEvent) -> None:
        self._heard_s = time.monotonic()
        match event.WhichOneof("event"):
            case "token":
                if self._counted is not None:
                    self._pending.computed(self._run.route.decode.key, self._counted)
                self._run.put(TokenCame(self._attempt, Stream.DECODE, event.token))
            case "ticket":
                self._keep_promise()
                self._run.put(TicketCame(self._attempt, event.ticket))
            case "finished":
                self._end()
                self._run.put(DecodeDone(self._attempt, event.finished))
                late = UnavailableError("the prefill worker's figures did not come")
                self._run.put_later(FIGURES_TIMEOUT_S, StreamFailed(self._attempt, Stream.PREFILL, late))
            case "failure":
                self._fail(from_failure(event.failure))

    def on_lost(self, error: Error) -> None:
        self._fail(_as_lost(error, self._worker_id))

    def cancel(self) -> None:
        self._end()
        self._link.cancel(self._handle)

    def _watch(self, delay_s: float) -> None:
        self._silence = asyncio.get_running_loop().call_later(delay_s, self._check_silence)

    def _check_silence(self) -> None:
        left_s = self._heard_s + self._stall_timeout_s - time.monotonic()
        if left_s > 0:
            self._watch(left_s)
        else:
            self._link.cancel(self._handle)
            self._fail(_stalled(self._worker_id, self._stall_timeout_s))

    def _fail(self, error: Error) -> None:
        self._end()
        log.warning("stream_failed", stream=Stream.DECODE.name, worker_id=self._worker_id, error=str(error))
        self._run.put(StreamFailed(self._attempt, Stream.DECODE, error))

    def _end(self) -> None:
        """Idempotent."""
        if self._silence is not None:
            self._silence.cancel()
        self._keep_promise()
        if self._counted is not None:
            self._pending.remove(self._run.route.decode.key, self._counted)
            self._counted = None

    def _keep_promise(self) -> None:
        """From here on the prefill stream counts itself.  Idempotent."""
        if self._promised is not None:
            self._pending.remove(*self._promised)
            self._promised = None


class Dispatcher:
    def __init__(
        self, view: ClusterView, channels: Channels, links: DecodeLinks, *, model_revision: str, routing: Policy,
        min_ship_tokens: int, max_attempts: int, stall_timeout_s: float, eos_token_ids: Iterable[int] = (),
    ) -> None:  # fmt: skip
        """``stall_timeout_s``: a worker that says nothing of a request for so long has failed it."""
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting: dict[_Run, tuple[frozenset[WorkerKey], asyncio.TimerHandle]] = {}  # for a worker to join
        self._view = view
        self._channels = channels
        self._links = links
        self._model_revision = model_revision
        self._routing = routing
        self._min_ship_tokens = min_ship_tokens
        self._max_attempts = max_attempts
        self._stall_timeout_s = stall_timeout_s
        self._pending = PendingBook()
        self._num_routed = 0
        self.decisions = DecisionBook()
        self._pace = Pace(Load().is_behind)

    async def run(self, job: Job, trace: Trace, timeout_s: float) -> AsyncGenerator[list[common_pb2.Token], None]:
        """Each token once, in order, together with those that have come since the caller took the last ones; at least one.
        Closing the generator stops the request's compute.  Raises kvferry.errors.Error."""
        run = _Run(job, trace, self._pace)
        run.put_later(timeout_s, DeadlineError("the request took longer than the gateway allows"))
        machine = RequestMachine(
            self._max_attempts, max_tokens=job.sampling.max_tokens, stop_ids=self._stop_ids(job.sampling)
        )
        actions = deque(machine.start())
        try:
            while True:
                tokens: list[common_pb2.Token] = []
                last = self._advance(run, machine, actions, tokens)
                if tokens:
                    yield tokens
                match last:
                    case Finish(finished=finished):
                        trace.finished = finished
                        return
                    case Fail(error=error):
                        raise error
                await run.wait()
        finally:
            self._wait_no_longer(run)
            await run.end()

    def members_changed(self) -> None:
        """To be called when workers have joined."""
        for run, (excluded, _) in list(self._waiting.items()):
            if isinstance(event := self._choose(run, excluded), Routed):
                self._wait_no_longer(run)
                run.put(event)

    def _stop_ids(self, sampling: common_pb2.SamplingParams) -> frozenset[int]:
        return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos_token_ids)

    def _advance(
        self, run: _Run, machine: RequestMachine, actions: deque[Action], tokens: list[common_pb2.Token]
    ) -> Finish | Fail | None:
        """Does all that there is to do; adds what is to be sent to ``tokens``.  None: there is more to come."""
        while True:
            while actions:
                match actions.popleft():
                    case Emit(token=token):
                        run.sent.append(token.id)
                        tokens.append(token)
                    case ChooseRoute(excluded=excluded):
                        run.job = run.whole_job.behind(run.sent)
                        if run.sent:
                            _CONTINUED.inc()
                            log.info("continuing", request_id=run.job.request_id, tokens_sent=len(run.sent))
                        outcome = self._choose(run, excluded)
                        if isinstance(outcome, NotRouted) and run.sent:
                            self._wait_for_worker(run, excluded, outcome)
                        else:
                            actions.extend(machine.on(outcome))
                    case OpenDecode(attempt=attempt):
                        self._open_decode(run, attempt)
                    case OpenPrefill(attempt=attempt, ticket=ticket):
                        run.trace.ticket_s = time.monotonic()
                        run.tasks[attempt] = asyncio.create_task(self._follow_prefill(run, attempt, ticket))
                    case CancelAttempt(attempt=attempt):
                        run.cancel(attempt)
                    case (Finish() | Fail()) as last:
                        return last
            if not run.events:
                return None
            event = run.events.popleft()
            if isinstance(event, DeadlineError):
                return Fail(event)
            if isinstance(event, PrefillDone) and event.attempt == machine.attempt:
                run.trace.committed = event.committed
            actions.extend(machine.on(event))
            run.trace.num_retries = max(0, machine.attempt - 1)

    def candidates(self, job: Job) -> list[Candidate]:
        """The workers that serve this model, as routing sees them."""
        prefixes: dict[int, dict[str, Prefix]] = {}  # by block size
        found = []
        for worker in self._view.workers.values():
            info, load = worker.info, worker.load
            if info.role not in _ROLES or info.model.revision != self._model_revision:
                continue
            block_size = info.layout.block_size_tokens
            if block_size not in prefixes:
                root = chain_root(self._model_revision, job.cache_salt)
                prefixes[block_size] = self._view.longest_prefix(extend_chain(root, job.prompt, block_size))
            key = WorkerKey(info.worker_id, info.incarnation)
            pending = self._pending.of(key)
            prefix = prefixes[block_size].get(info.worker_id, _NO_PREFIX)
            found.append(
                Candidate(
                    key=key,
                    role=_ROLES[info.role],
                    address=info.control_address,
                    content_fingerprint=info.layout.content_fingerprint,
                    block_size=block_size,
                    block_nbytes=info.layout.block_nbytes,
                    num_requests=max(pending.num_requests, load.num_running + load.num_waiting),
                    num_queued_prefill_tokens=max(pending.prefill_tokens, load.num_queued_prefill_tokens),
                    num_free_blocks=load.blocks.free + load.blocks.cached,
                    num_prefix_blocks=prefix.num_blocks,
                    num_prefix_host_blocks=prefix.num_blocks - prefix.num_device_blocks,
                    rates=Rates(
                        prefill_tokens_per_s=load.prefill_tokens_per_s,
                        step_base_s=load.decode_step_base_s,
                        step_per_sequence_s=load.decode_step_per_sequence_s,
                        transfer_bytes_per_s=load.transfer_bytes_per_s,
                        transfer_round_trip_s=load.transfer_round_trip_s,
                        host_load_bytes_per_s=load.host_load_bytes_per_s,
                        pull_bytes_per_s=load.pull_bytes_per_s,
                        pull_overhead_s=load.pull_overhead_s,
                    ),
                    draining=load.draining,
                    fingerprint=info.layout.fingerprint,
                    host=f"{info.process.boot_id}/{info.process.pid_namespace}" if info.process.boot_id else "",
                    num_pinnable_blocks=load.num_pinnable_blocks,
                    abilities=self._view.abilities(info.worker_id),
                    place=self._view.place(info.worker_id),
                    transfer_rates=tuple(
                        TransferRate(_DISTANCES[rate.distance], rate.bytes_per_s, rate.round_trip_s)
                        for rate in load.transfer_rates
                        if rate.distance in _DISTANCES
                    ),
                )
            )
        return found

    def _wait_for_worker(self, run: _Run, excluded: frozenset[WorkerKey], event: NotRouted) -> None:
        """An answer has begun: its client would rather wait for a worker that is started again than lose it."""

        def give_up() -> None:
            self._wait_no_longer(run)
            run.put(event)

        def forgive() -> None:
            """Who failed it may only have been out of reach for a moment; attempts stay bounded."""
            if run in self._waiting and isinstance(again := self._choose(run, frozenset()), Routed):
                self._wait_no_longer(run)
                run.put(again)

        run.timers.append(asyncio.get_running_loop().call_later(FORGIVE_S, forgive))
        log.warning("waiting_for_worker", request_id=run.job.request_id, tokens_sent=len(run.sent))
        self._waiting[run] = (excluded, asyncio.get_running_loop().call_later(WORKER_WAIT_S, give_up))

    def _wait_no_longer(self, run: _Run) -> None:
        """Idempotent."""
        if waiting := self._waiting.pop(run, None):
            waiting[1].cancel()

    def _choose(self, run: _Run, excluded: frozenset[WorkerKey]) -> Event:
        started_s = time.monotonic()
        job = run.job
        try:
            route = choose_route(
                self.candidates(job),
                Demand(len(job.prompt), job.sampling.max_tokens),
                excluded,
                policy=self._routing,
                min_ship_tokens=self._min_ship_tokens,
                turn=self._num_routed,
                request_id=job.request_id,
            )
        except NoWorkerError as e:
            self._remember(run, Refusal(str(e), e.passed_over), started_s)
            return NotRouted(UnavailableError(str(e), reason="NO_WORKER", retry_after_s=NO_WORKER_RETRY_S))
        self._remember(run, route, started_s)
        run.trace.route, run.trace.committed = route, None
        log.info(
            "route",
            policy=route.policy.value,
            chosen=str(route.chosen),
            options=[str(option) for option in route.options[:_LOGGED_OPTIONS]],
            passed_over={p.worker_id: p.why for p in route.passed_over},
            pull=route.pull_reason,
            prompt_tokens=len(job.prompt),
        )
        return Routed(route.decode.key, route.prefill.key if route.prefill else None)

    def _remember(self, run: _Run, outcome: Route | Refusal, started_s: float) -> None:
        self._num_routed += 1
        run.trace.route_s += time.monotonic() - started_s
        decision = Decision(outcome, started_s, self._view.age_s)
        self.decisions.add(run.job.tenant.name, run.job.request_id, decision, first=not run.routed)
        run.routed = True

    def _open_decode(self, run: _Run, attempt: int) -> None:
        decode, prefill, job = run.route.decode, run.route.prefill, run.job
        run.trace.opened_s, run.trace.ticket_s = time.monotonic(), None
        link = self._links.get(decode.address)
        run.decodes[attempt] = _Decoding(run, attempt, link, self._pending, self._stall_timeout_s)
        run.decodes[attempt].open(
            worker_pb2.DecodeOpen(
                request_id=job.request_id,
                prompt_token_ids=job.prompt,
                sampling=job.sampling,
                cache_salt=job.cache_salt,
                writer=self._writer(prefill) if prefill else None,
                pull=None if prefill else _to_pull_source(run.route.chosen.pull),
                context=dict(outgoing_metadata()),
            )
        )

    async def _follow_prefill(self, run: _Run, attempt: int, ticket: worker_pb2.Ticket) -> None:
        key = run.prefill.key  # the run's route may be the next attempt's when this one has been cancelled
        worker_id = key.worker_id
        counted = self._pending.add(key, run.route.num_uncached_tokens)
        try:
            await self._prefill(run, attempt, ticket)
            error: Error = UnavailableError(f"worker {worker_id} ended its stream early")
        except grpc.aio.AioRpcError as e:
            error = _as_lost(from_rpc_error(e), worker_id)
            log.warning("stream_failed", stream=Stream.PREFILL.name, worker_id=worker_id, error=str(error))
        except TimeoutError:
            error = _stalled(worker_id, self._stall_timeout_s)
        except Exception as e:
            log.exception("stream_broke", stream=Stream.PREFILL.name)
            error = InternalError(f"the gateway failed to follow a worker's stream: {type(e).__name__}")
        finally:
            self._pending.remove(key, counted)
        run.put(StreamFailed(attempt, Stream.PREFILL, error))  # ignored where the stream had come to its end

    async def _prefill(self, run: _Run, attempt: int, ticket: worker_pb2.Ticket) -> None:
        job = run.job
        request = worker_pb2.PrefillRequest(
            request_id=job.request_id,
            prompt_token_ids=job.prompt,
            sampling=job.sampling,
            ticket=ticket,
            cache_salt=job.cache_salt,
            pull=_to_pull_source(run.route.chosen.pull),
        )
        stub = worker_pb2_grpc.PrefillServiceStub(self._channels.get(run.prefill.address))
        async with aclosing(_each(stub.Prefill(request), self._stall_timeout_s)) as responses:
            async for response in responses:
                if response.WhichOneof("event") == "first_token":
                    run.put(TokenCame(attempt, Stream.PREFILL, response.first_token))
                else:
                    run.put(PrefillDone(attempt, response.committed))

    def _writer(self, candidate: Candidate) -> worker_pb2.Writer:
        state = self._view.workers.get(candidate.key.worker_id)
        return worker_pb2.Writer(
            worker_id=candidate.key.worker_id,
            incarnation=candidate.key.incarnation,
            control_address=candidate.address,
            process=state.info.process if state else None,
        )


def _to_pull_source(pull: Pull | None) -> worker_pb2.PullSource | None:
    if pull is None:
        return None
    return worker_pb2.PullSource(
        worker_id=pull.holder.key.worker_id,
        incarnation=pull.holder.key.incarnation,
        control_address=pull.holder.address,
        num_blocks=pull.total_blocks,
        within_ms=max(1, min(MAX_PULL_MS, round(pull.compute_s * 1000))),
    )


def _as_lost(error: Error, worker_id: str) -> Error:
    """What gRPC itself says of a stream, in words that help; a worker's own are kept."""
    if error.reason != UnavailableError.default_reason:
        return error
    text = f"worker {worker_id} was lost or cannot be reached; send the request again"
    return UnavailableError(text, reason="WORKER_LOST", retry_after_s=WORKER_RETRY_S)


def _stalled(worker_id: str, timeout_s: float) -> UnavailableError:
    return UnavailableError(f"worker {worker_id} said nothing for {timeout_s:g} s", reason="STALLED")


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
