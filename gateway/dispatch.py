"""Runs one request's state machine against real workers: routes, opens requests there, passes tokens on."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter as Counts
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc
import structlog
from prometheus_client import Counter, Gauge

from gateway.admission import Objectives
from gateway.candidates import Candidate, Rates, Role, TransferRate, WorkerKey
from gateway.costs import HORIZON_TOKENS, Demand
from gateway.decisions import Decision, DecisionBook, Refusal
from gateway.line import Line, Ticket
from gateway.link import DecodeLink, DecodeLinks
from gateway.pace import Load, Pace
from gateway.pending import Pending, PendingBook
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
from gateway.retry_budget import RetryBudget, Slice
from gateway.routing import NoWorkerError, Policy, Route, choose_route
from gateway.tenants import EVERYBODY, Tenant
from gateway.view import Change, ClusterView, WorkerGone
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import (
    CancelledError,
    DeadlineError,
    Error,
    InternalError,
    OverloadedError,
    UnavailableError,
    from_rpc_error,
)
from services.directory.index import Prefix
from services.engine.hashing import chain_root, extend_chain
from services.runtime.backoff import Backoff
from services.runtime.channels import Channels
from services.runtime.failure import from_failure
from services.runtime.place import Distance
from services.runtime.tracing import outgoing_metadata

log = structlog.get_logger(__name__)

NO_WORKER_RETRY_S = 1.0
WORKER_RETRY_S = 2.0
# How long an answer that has begun tries to go on without getting a token further.
WORKER_WAIT_S = 30.0
# How often the line looks whether workers have reported room.
LOOK_INTERVAL_S = 0.02
# When nobody else is there, workers that failed it are tried again after so long, and then ever more seldom.
FORGIVE_S = (2.0, 6.0)
# The first retry follows at once; of those that get no further, each waits longer for the next.
RETRY_BACKOFF_S = (0.1, 2.0)
# Once the directory has given a worker up, it has failed each request of which it says nothing for so long.
GONE_STALL_S = 3.0
# After the last token, how long the writer's figures may take: they decorate the timeline and nothing else.
FIGURES_TIMEOUT_S = 1.0

# As long as a worker waits at all.
MAX_PULL_MS = 10_000

_CONTINUED = Counter("kvferry_requests_continued", "Times that a request went on behind tokens already sent")

_OVER_BUDGET = Counter("kvferry_retries_over_budget", "Times that a request was not started over, for others had been")
_IN_LINE = Gauge("kvferry_requests_in_line", "Requests that wait in the gateway for workers to have room")

# Of the options, in the log.
_LOGGED_OPTIONS = 8

_NO_PREFIX = Prefix(0, 0)
_NO_OBJECTIVES = Objectives()
_DISTANCES: dict[int, Distance] = {distance.value: distance for distance in Distance}
_ROLES = {common_pb2.WORKER_ROLE_PREFILL: Role.PREFILL, common_pb2.WORKER_ROLE_DECODE: Role.DECODE}


@dataclass(frozen=True, slots=True)
class Job:
    """A request whose defaults are all filled in."""

    request_id: str
    prompt: Sequence[int]
    sampling: common_pb2.SamplingParams
    tenant: Tenant = EVERYBODY
    priority: int = 0

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
    line_s: float = 0.0  # that the request waited for workers to have room
    committed: worker_pb2.Committed | None = None
    finished: worker_pb2.DecodeFinished | None = None
    num_retries: int = 0
    # By time.monotonic(), of the last attempt.
    opened_s: float | None = None
    ticket_s: float | None = None


class _Run:
    """The moving parts of one request: where its events wait, and what goes on for it."""

    def __init__(self, job: Job, trace: Trace, pace: Pace) -> None:
        self.whole_job = job
        self.job = job  # of the attempt
        self.sent: list[int] = []
        self.trace = trace
        self.retrying_since_s: float | None = None  # without a token meanwhile
        self.backoff = Backoff(*RETRY_BACKOFF_S)
        self.grudge = Backoff(*FORGIVE_S)
        self.spent: Slice | None = None  # of the retry budget, until it has paid
        self.routed = False
        self.ticket: Ticket[_Run] | None = None  # while it waits in the line
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

    def later(self, delay_s: float, act: Callable[[], None]) -> None:
        self.timers.append(asyncio.get_running_loop().call_later(delay_s, act))

    def put_later(self, delay_s: float, event: Event | DeadlineError) -> None:
        self.later(delay_s, partial(self.put, event))

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


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    excluded: frozenset[WorkerKey]
    until_s: float


class _Decoding:
    """One attempt's request on its decode worker, which counts as pending there until it has ended."""

    def __init__(
        self, run: _Run, attempt: int, link: DecodeLink, pending: PendingBook, stall_timeout_s: float,
        opened: set[_Decoding],
    ) -> None:  # fmt: skip
        """Is in ``opened`` from ``open`` to its end."""
        self.key = run.route.decode.key
        self._opened = opened
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
        self._counted = self._pending.add(
            route.decode.key,
            0 if route.prefill else route.num_uncached_tokens,
            route.decode.num_missing_blocks(len(request.prompt_token_ids) + 1),
        )
        if route.prefill:
            # Requests that come before the ticket does must not find the prefill worker idle.
            self._promised = (route.prefill.key, self._pending.add(route.prefill.key, route.num_uncached_tokens))
        self._opened.add(self)
        self._watch(self._stall_timeout_s)

    def expect_soon(self, within_s: float) -> None:
        """From here on the worker has failed the request when it says nothing for so long."""
        self._stall_timeout_s = min(self._stall_timeout_s, within_s)
        self._heard_s = time.monotonic()
        if self._silence is not None:
            self._silence.cancel()
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
        self._opened.discard(self)
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
        retry_ratio: float = 0.2,
        objectives: Objectives = _NO_OBJECTIVES,
    ) -> None:  # fmt: skip
        """``stall_timeout_s``: a worker that says nothing of a request for so long has failed it.  ``retry_ratio``: retries
        that bring nothing, at most, for each request."""
        self._eos_token_ids = frozenset(eos_token_ids)
        self._budget = RetryBudget(retry_ratio)
        self._waiting: dict[_Run, _Wait] = {}  # for a worker to join
        self._view = view
        self._channels = channels
        self._links = links
        self._model_revision = model_revision
        self._routing = routing
        self._min_ship_tokens = min_ship_tokens
        self._max_attempts = max_attempts
        self._stall_timeout_s = stall_timeout_s
        self._objectives = objectives
        self._line: Line[_Run] = Line()
        self._looks_again: asyncio.Handle | None = None
        self._pending = PendingBook(self._look_soon)
        self._opened: set[_Decoding] = set()
        self._num_routed = 0
        self.decisions = DecisionBook()
        self._pace = Pace(Load().is_behind)

    async def run(self, job: Job, trace: Trace, timeout_s: float) -> AsyncGenerator[list[common_pb2.Token], None]:
        """Each token once, in order, together with those that have come since the caller took the last ones; at least one.
        Closing the generator stops the request's compute.  Raises kvferry.errors.Error."""
        self._budget.request(time.monotonic())
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
                    self._line.served(job.tenant.name, 0, len(tokens), job.tenant.weight)
                    yield tokens
                match last:
                    case Finish(finished=finished):
                        trace.finished = finished
                        return
                    case Fail(error=error):
                        raise error
                await run.wait()
        finally:
            self._waiting.pop(run, None)
            self._leave_line(run)
            await run.end()

    def members_changed(self, changes: Iterable[Change] = ()) -> None:
        """To be called when workers have come or gone.  One that left of its own accord has ended its streams itself."""
        for change in changes:
            if isinstance(change, WorkerGone) and change.reason != directory_pb2.LEAVE_REASON_DEREGISTERED:
                gone = WorkerKey(change.worker_id, change.incarnation)
                for decoding in [d for d in self._opened if d.key == gone]:
                    decoding.expect_soon(GONE_STALL_S)
        for run, wait in list(self._waiting.items()):
            self._end_wait(run, wait.excluded)

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
                        self._got_further(run)
                    case ChooseRoute() if machine.attempt == 1:
                        if (outcome := self._enter(run)) is not None:
                            actions.extend(machine.on(outcome))
                    case ChooseRoute(excluded=excluded):
                        self._start_over(run, excluded)
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
                    num_free_blocks=max(0, _num_spare(load, block_size) - pending.num_blocks),
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

    def _got_further(self, run: _Run) -> None:
        if run.retrying_since_s is not None:
            run.retrying_since_s = None
            run.backoff.reset()
            run.grudge.reset()
        if run.spent is not None:
            self._budget.give_back(run.spent)
            run.spent = None

    def _start_over(self, run: _Run, excluded: frozenset[WorkerKey]) -> None:
        """At once, or a while after the last time; in the end an event comes of it."""
        run.job = run.whole_job.behind(run.sent)
        if run.sent:
            _CONTINUED.inc()
            log.info("continuing", request_id=run.job.request_id, tokens_sent=len(run.sent))
        if run.retrying_since_s is None:
            run.retrying_since_s = time.monotonic()
            self._try_again(run, excluded)
        else:
            run.later(run.backoff.next_s(), partial(self._try_again, run, excluded))

    def _try_again(self, run: _Run, excluded: frozenset[WorkerKey]) -> None:
        outcome = self._choose_again(run, excluded)
        if isinstance(outcome, NotRouted) and run.sent:
            self._wait_for_worker(run, excluded, outcome)
        else:
            run.put(outcome)

    def _wait_for_worker(self, run: _Run, excluded: frozenset[WorkerKey], event: NotRouted) -> None:
        """An answer has begun: its client would rather wait for a worker that is started again than lose it."""
        assert run.retrying_since_s is not None
        wait = self._waiting[run] = _Wait(excluded, run.retrying_since_s + WORKER_WAIT_S)

        def look_again_later() -> None:
            run.later(max(0.0, min(run.grudge.next_s(), wait.until_s - time.monotonic())), look_again)

        def look_again() -> None:
            if self._waiting.get(run) is not wait:
                return
            if time.monotonic() >= wait.until_s:
                del self._waiting[run]
                run.put(event)
            elif not self._end_wait(run, frozenset()):  # who failed it may only have been out of reach for a moment
                look_again_later()

        log.warning("waiting_for_worker", request_id=run.job.request_id, tokens_sent=len(run.sent))
        look_again_later()

    def _end_wait(self, run: _Run, excluded: frozenset[WorkerKey]) -> bool:
        """Whether there is a worker to go on with now."""
        event = self._choose_again(run, excluded)
        if not isinstance(event, Routed):
            return False
        del self._waiting[run]
        run.put(event)
        return True

    def _choose_again(self, run: _Run, excluded: frozenset[WorkerKey]) -> Event:
        """Within the budget."""
        now_s = time.monotonic()
        if not self._budget.can_spend(now_s):
            _OVER_BUDGET.inc()
            log.warning("over_retry_budget", request_id=run.job.request_id)
            what = "many requests are being started over at the moment, and this one is not"
            return NotRouted(UnavailableError(what, reason="RETRY_BUDGET", retry_after_s=_jittered(WORKER_RETRY_S)))
        event = self._choose(run, excluded)
        if isinstance(event, Routed):
            run.spent = self._budget.spend(now_s)
        return event

    def _enter(self, run: _Run) -> Event | None:
        """A request's first route.  None: it waits in the line, and the event comes by itself."""
        tenant, priority, now_s = run.job.tenant.name, run.job.priority, time.monotonic()
        routed = self._route_in_time(run, self._line.wait_s(tenant, priority, num_lanes=self._num_lanes()))
        if isinstance(routed, NotRouted):
            return routed
        if not self._line and self._objectives.has_room(routed):
            return self._take(run, routed)
        terms = routed.chosen.terms
        work_s = terms.pull_s + terms.prefill_s
        run.ticket = self._line.join(run, tenant, priority=priority, work_s=work_s, now_s=now_s)
        _IN_LINE.set(len(self._line))
        self._look_later()
        return None

    def _route_in_time(self, run: _Run, wait_s: float) -> Route | NotRouted:
        """For a request that has waited for so long, or would have to."""
        routed = self._route(run, frozenset())
        if not isinstance(routed, NotRouted):
            try:
                self._objectives.check(routed, wait_s)
            except OverloadedError as error:
                return NotRouted(error)
        return routed

    def _look_soon(self) -> None:
        """Whether the first of the line may go: once the loop comes to it, however often it is asked."""
        if self._line:
            self._look_in(0.0)

    def _look_later(self) -> None:
        """What the workers report changes unseen."""
        if self._line and self._looks_again is None:
            self._look_in(LOOK_INTERVAL_S)

    def _look_in(self, delay_s: float) -> None:
        if self._looks_again is not None:
            self._looks_again.cancel()
        self._looks_again = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        """Lets in who may go, in the order of the line."""
        self._looks_again = None
        try:
            while ticket := self._line.first():
                run, now_s = ticket.item, time.monotonic()
                event: Event | Route = self._route_in_time(run, now_s - ticket.came_s)
                if isinstance(event, Route):
                    if not self._objectives.has_room(event):
                        break
                    event = self._take(run, event)
                self._leave_line(run, now_s)
                run.put(event)
        finally:
            self._look_later()

    def _leave_line(self, run: _Run, turn_s: float | None = None) -> None:
        """``turn_s``: when its turn came; None for one that gives up.  Idempotent."""
        if run.ticket is not None:
            run.trace.line_s = time.monotonic() - run.ticket.came_s
            self._line.leave(run.ticket, turn_s)
            run.ticket = None
            _IN_LINE.set(len(self._line))

    def _num_lanes(self) -> int:
        """Workers that compute prompts."""
        by_role = Counts(worker.info.role for worker in self._view.workers.values())
        return by_role[common_pb2.WORKER_ROLE_PREFILL] or by_role[common_pb2.WORKER_ROLE_DECODE]

    def _choose(self, run: _Run, excluded: frozenset[WorkerKey]) -> Event:
        routed = self._route(run, excluded)
        return routed if isinstance(routed, NotRouted) else self._take(run, routed)

    def _route(self, run: _Run, excluded: frozenset[WorkerKey]) -> Route | NotRouted:
        started_s = time.monotonic()
        job = run.job
        try:
            return choose_route(
                self.candidates(job),
                Demand(len(job.prompt), job.sampling.max_tokens),
                excluded,
                policy=self._routing,
                min_ship_tokens=self._min_ship_tokens,
                turn=self._num_routed,
                request_id=job.request_id,
            )
        except NoWorkerError as e:
            self._remember(run, Refusal(str(e), e.passed_over))
            return NotRouted(UnavailableError(str(e), reason="NO_WORKER", retry_after_s=NO_WORKER_RETRY_S))
        finally:
            run.trace.route_s = time.monotonic() - started_s  # the last time counts: others were in the line

    def _take(self, run: _Run, route: Route) -> Routed:
        self._remember(run, route)
        job = run.job
        self._line.served(job.tenant.name, route.num_uncached_tokens, 0, job.tenant.weight)
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

    def _remember(self, run: _Run, outcome: Route | Refusal) -> None:
        self._num_routed += 1
        decision = Decision(outcome, time.monotonic(), self._view.age_s)
        self.decisions.add(run.job.tenant.name, run.job.request_id, decision, first=not run.routed)
        run.routed = True

    def _open_decode(self, run: _Run, attempt: int) -> None:
        decode, prefill, job = run.route.decode, run.route.prefill, run.job
        run.trace.opened_s, run.trace.ticket_s = time.monotonic(), None
        link = self._links.get(decode.address)
        run.decodes[attempt] = _Decoding(run, attempt, link, self._pending, self._stall_timeout_s, self._opened)
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


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.5, 1.0)


def _num_spare(load: directory_pb2.WorkerLoad, block_size: int) -> int:
    """Blocks for newcomers: what is neither resident nor lent to writers, less what running answers may yet take."""
    growth = load.num_running * HORIZON_TOKENS // 2 // block_size
    return load.blocks.free + load.blocks.cached - growth


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
    """What gRPC itself says of a stream, in words that help; a worker's own are kept.  CANCELLED is what it says of calls
    that a process left open at its end: of those that were cancelled here nobody asks."""
    if error.reason not in (UnavailableError.default_reason, CancelledError.default_reason):
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
