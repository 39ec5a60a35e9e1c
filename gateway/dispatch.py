"""Runs one request's state machine against real workers: routes, opens requests there, passes tokens on."""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counts
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import structlog
from prometheus_client import Counter

from gateway.admission import Objectives
from gateway.apart import Apart
from gateway.candidates import Candidate, WorkerKey
from gateway.costs import STALL_WEIGHT, Demand
from gateway.decisions import Decision, DecisionBook, Refusal
from gateway.decoding import WORKER_RETRY_S, Decoding, as_lost, stalled
from gateway.entrance import Entrance
from gateway.job import Job, Trace
from gateway.link import DecodeLinks
from gateway.pending import PendingBook
from gateway.pulls import Pull
from gateway.request import (
    Action,
    CancelAttempt,
    ChooseRoute,
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
    TokenCame,
)
from gateway.retry_budget import RetryBudget
from gateway.routing import NoWorkerError, Policy, Route, choose_route
from gateway.run import Run, TokenSink
from gateway.turn import Turn
from gateway.view import Change, ClusterView, WorkerGone
from gateway.worker_state import ROLES, seen_now
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.errors import (
    DeadlineError,
    Error,
    InternalError,
    UnavailableError,
    from_rpc_error,
)
from services.directory.index import Prefix
from services.engine.hashing import chain_root, extend_chain
from services.runtime.backoff import jittered
from services.runtime.channels import Channels
from services.runtime.tracing import outgoing_metadata

log = structlog.get_logger(__name__)

NO_WORKER_RETRY_S = 1.0
# How long an answer that has begun tries to go on without getting a token further.
WORKER_WAIT_S = 30.0
# Once the directory has given a worker up, it has failed each request of which it says nothing for so long.
GONE_STALL_S = 3.0

# As long as a worker waits at all.
MAX_PULL_MS = 10_000

_CONTINUED = Counter("kvferry_requests_continued", "Times that a request went on behind tokens already sent")

_OVER_BUDGET = Counter("kvferry_retries_over_budget", "Times that a request was not started over, for others had been")

# Of the options, in the log.
_LOGGED_OPTIONS = 8

_NO_PREFIX = Prefix(0, 0)
_NO_OBJECTIVES = Objectives()
_NOBODY: frozenset[WorkerKey] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class _Wait:
    excluded: frozenset[WorkerKey]
    until_s: float


class Dispatcher:
    def __init__(
        self, view: ClusterView, channels: Channels, links: DecodeLinks, *, model_revision: str, routing: Policy,
        min_ship_tokens: int, max_attempts: int, stall_timeout_s: float, stall_weight: float = STALL_WEIGHT,
        eos_token_ids: Iterable[int] = (),
        budget: RetryBudget | None = None,
        objectives: Objectives = _NO_OBJECTIVES,
    ) -> None:  # fmt: skip
        """``stall_timeout_s``: a worker that says nothing of a request for so long has failed it."""
        self._eos_token_ids = frozenset(eos_token_ids)
        self._budget = budget or RetryBudget(0.2)
        self._apart = Apart()
        self._waiting: dict[Run, _Wait] = {}  # for a worker to join
        self._view = view
        self._channels = channels
        self._links = links
        self._model_revision = model_revision
        self._routing = routing
        self._min_ship_tokens = min_ship_tokens
        self._stall_weight = stall_weight
        self._max_attempts = max_attempts
        self._stall_timeout_s = stall_timeout_s
        self._first_from_decode = objectives.promises_gaps
        self._entrance = Entrance(objectives, route=self._route, take=self._take, num_lanes=self._num_lanes)
        self._pending = PendingBook(time.monotonic, self._entrance.look_soon)
        view.on_report = self._pending.reported
        self._opened: set[Decoding] = set()
        self._num_routed = 0
        self.decisions = DecisionBook()
        self._turn = Turn()

    async def run(self, job: Job, trace: Trace, timeout_s: float, sink: TokenSink) -> None:
        """Puts each token into ``sink`` once, in order, together with those that have come since.  Returns at the answer's
        end, or when the sink wants no more; cancelling it stops the request's compute.  Raises kvferry.errors.Error."""
        self._budget.request(time.monotonic())
        machine = RequestMachine(
            self._max_attempts, max_tokens=job.sampling.max_tokens, stop_ids=self._stop_ids(job.sampling),
            first_from_decode=self._first_from_decode,
        )  # fmt: skip
        run = Run(job, trace, machine, sink, self._turn, self._pass_on)
        run.put_later(timeout_s, DeadlineError("the request took longer than the gateway allows"))
        try:
            while True:
                if run.is_held:
                    if not await sink.room():
                        return
                    run.is_held = False
                self._advance(run)
                if run.is_held:
                    continue
                match run.last:
                    case Finish(finished=finished):
                        trace.finished = finished
                        return
                    case Fail():
                        raise _taken_from(run)
                await run.wait()
        finally:
            self._waiting.pop(run, None)
            self._entrance.leave(run)
            await run.end()

    def members_changed(self, changes: Iterable[Change] = ()) -> None:
        """To be called when workers have come or gone.  One that left of its own accord has ended its streams itself."""
        for change in changes:
            if not isinstance(change, WorkerGone):
                continue
            gone = WorkerKey(change.worker_id, change.incarnation)
            if not self._view.has(gone):  # it may be back already
                self._pending.gone(gone)
            if change.reason != directory_pb2.LEAVE_REASON_DEREGISTERED:
                for decoding in [d for d in self._opened if d.key == gone]:
                    decoding.expect_soon(GONE_STALL_S)
        for run, wait in list(self._waiting.items()):
            self._end_wait(run, wait.excluded)

    def _stop_ids(self, sampling: common_pb2.SamplingParams) -> frozenset[int]:
        return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos_token_ids)

    def _pass_on(self, run: Run) -> None:
        """What the tokens that have come ask for, with no task in between: most of what a gateway does is this."""
        try:
            self._advance(run)
        except Exception:
            log.exception("answer_broke", request_id=run.job.request_id)
            run.last = Fail(InternalError("the gateway failed to pass the answer on; its log has the details"))
        if run.is_held or run.last is not None:
            run.wake()

    def _advance(self, run: Run) -> None:
        """Does all that there is to do until the request ends, but gives the sink no more than it has room for."""
        tokens: list[common_pb2.Token] = []
        while run.last is None:
            if run.actions:
                self._act(run, run.actions.popleft())
            elif run.events:
                for action in self._see(run, run.events.popleft()):
                    if isinstance(action, Emit):
                        tokens.append(action.token)
                        run.sent.append(action.token.id)
                        if run.retrying_since_s is not None or run.spent is not None:
                            self._got_further(run)
                    else:
                        run.actions.append(action)
            else:
                break
        if tokens:
            self._entrance.served(run.job.tenant, 0, len(tokens))
            run.is_held = not run.sink.put(tokens)

    def _act(self, run: Run, action: Action) -> None:
        match action:
            case ChooseRoute() if run.machine.attempt == 1:
                if (outcome := self._entrance.enter(run)) is not None:
                    run.actions.extend(run.machine.on(outcome))
            case ChooseRoute(excluded=excluded):
                self._start_over(run, excluded)
            case OpenDecode(attempt=attempt):
                self._open_decode(run, attempt)
            case OpenPrefill(attempt=attempt, ticket=ticket):
                run.trace.ticket_s = time.monotonic()
                run.tasks[attempt] = asyncio.create_task(self._follow_prefill(run, attempt, ticket))
            case CancelAttempt(attempt=attempt):
                run.cancel(attempt)
            case Finish() | Fail():
                run.last = action

    def _see(self, run: Run, event: Event | DeadlineError) -> list[Action]:
        machine = run.machine
        if isinstance(event, TokenCame):
            return machine.on(event)
        if isinstance(event, DeadlineError):
            return [Fail(event)]
        if isinstance(event, PrefillDone) and event.attempt == machine.attempt:
            run.trace.committed = event.committed
        if isinstance(event, StreamFailed) and event.attempt == machine.attempt:
            self._note_apart(run, event)
        actions = machine.on(event)
        run.trace.num_retries = max(0, machine.attempt - 1)
        return actions

    def _note_apart(self, run: Run, failed: StreamFailed) -> None:
        if failed.stream is Stream.PREFILL and failed.error.reason == "OWNER_LOST":
            self._apart.add(run.prefill.key, run.route.decode.key, time.monotonic())

    def candidates(self, job: Job) -> list[Candidate]:
        """The workers that serve this model, as routing sees them."""
        prefixes: dict[int, dict[str, Prefix]] = {}  # by block size
        found = []
        for worker in self._view.workers.values():
            info = worker.info
            if info.role not in ROLES or info.model.revision != self._model_revision:
                continue
            block_size = info.layout.block_size_tokens
            if block_size not in prefixes:
                root = chain_root(self._model_revision, job.cache_salt)
                prefixes[block_size] = self._view.longest_prefix(extend_chain(root, job.prompt, block_size))
            prefix = prefixes[block_size].get(info.worker_id, _NO_PREFIX)
            candidate = self._view.candidate(info.worker_id)
            there = self._pending.there(candidate.key, candidate.num_requests, candidate.num_queued_prefill_tokens)
            found.append(seen_now(candidate, prefix, there))
        return found

    def _got_further(self, run: Run) -> None:
        if run.retrying_since_s is not None:
            run.retrying_since_s = None
            run.backoff.reset()
            run.grudge.reset()
        if run.spent is not None:
            self._budget.give_back(run.spent)
            run.spent = None

    def _start_over(self, run: Run, excluded: frozenset[WorkerKey]) -> None:
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

    def _try_again(self, run: Run, excluded: frozenset[WorkerKey]) -> None:
        outcome = self._choose_again(run, excluded)
        if isinstance(outcome, NotRouted) and run.sent:
            self._wait_for_worker(run, excluded, outcome)
        else:
            run.put(outcome)

    def _wait_for_worker(self, run: Run, excluded: frozenset[WorkerKey], event: NotRouted) -> None:
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

    def _end_wait(self, run: Run, excluded: frozenset[WorkerKey]) -> bool:
        """Whether there is a worker to go on with now."""
        event = self._choose_again(run, excluded)
        if not isinstance(event, Routed):
            return False
        del self._waiting[run]
        run.put(event)
        return True

    def _choose_again(self, run: Run, excluded: frozenset[WorkerKey]) -> Event:
        """Within the budget."""
        now_s = time.monotonic()
        if not self._budget.can_spend(now_s):
            _OVER_BUDGET.inc()
            log.warning("over_retry_budget", request_id=run.job.request_id)
            what = "many requests are being started over at the moment, and this one is not"
            return NotRouted(UnavailableError(what, reason="RETRY_BUDGET", retry_after_s=jittered(WORKER_RETRY_S)))
        event = self._choose(run, excluded)
        if isinstance(event, Routed):
            run.spent = self._budget.spend(now_s)
        return event

    def _num_lanes(self) -> int:
        """Workers that compute prompts."""
        by_role = Counts(worker.info.role for worker in self._view.workers.values())
        return by_role[common_pb2.WORKER_ROLE_PREFILL] or by_role[common_pb2.WORKER_ROLE_DECODE]

    def _choose(self, run: Run, excluded: frozenset[WorkerKey]) -> Event:
        routed = self._route(run, excluded)
        return routed if isinstance(routed, NotRouted) else self._take(run, routed)

    def _route(self, run: Run, excluded: frozenset[WorkerKey] = _NOBODY) -> Route | NotRouted:
        started_s = time.monotonic()
        job = run.job
        try:
            return choose_route(
                self.candidates(job),
                Demand(len(job.prompt), job.sampling.max_tokens),
                excluded,
                policy=self._routing,
                min_ship_tokens=self._min_ship_tokens,
                stall_weight=self._stall_weight,
                turn=self._num_routed,
                request_id=job.request_id,
                apart=self._apart.pairs(started_s),
            )
        except NoWorkerError as e:
            self._remember(run, Refusal(str(e), e.passed_over))
            return NotRouted(UnavailableError(str(e), reason="NO_WORKER", retry_after_s=jittered(NO_WORKER_RETRY_S)))
        finally:
            run.trace.route_s = time.monotonic() - started_s  # the last time counts: others were in the line

    def _take(self, run: Run, route: Route) -> Routed:
        self._remember(run, route)
        job = run.job
        self._entrance.served(job.tenant, route.num_uncached_tokens, 0)
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

    def _remember(self, run: Run, outcome: Route | Refusal) -> None:
        self._num_routed += 1
        decision = Decision(outcome, time.monotonic(), self._view.age_s)
        self.decisions.add(run.job.tenant.name, run.job.request_id, decision, first=not run.routed)
        run.routed = True

    def _open_decode(self, run: Run, attempt: int) -> None:
        decode, prefill, job = run.route.decode, run.route.prefill, run.job
        run.trace.opened_s, run.trace.ticket_s = time.monotonic(), None
        link = self._links.get(decode.address)
        decoding = run.decodes[attempt] = Decoding(
            run, attempt, link, self._pending, self._stall_timeout_s, self._opened
        )
        decoding.open(
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

    async def _follow_prefill(self, run: Run, attempt: int, ticket: worker_pb2.Ticket) -> None:
        key = run.prefill.key  # the run's route may be the next attempt's when this one has been cancelled
        worker_id = key.worker_id
        counted = self._pending.add(key, run.route.num_uncached_tokens)
        run.decodes[attempt].keep_promise()  # not before: the next of the line would find the worker idle
        try:
            await self._prefill(run, attempt, ticket, lambda: self._pending.computed(key, counted))
            error: Error = UnavailableError(f"worker {worker_id} ended its stream early")
        except grpc.aio.AioRpcError as e:
            error = as_lost(from_rpc_error(e), worker_id)
            log.warning("stream_failed", stream=Stream.PREFILL.name, worker_id=worker_id, error=str(error))
        except TimeoutError:
            error = stalled(worker_id, self._stall_timeout_s)
        except Exception as e:
            log.exception("stream_broke", stream=Stream.PREFILL.name)
            error = InternalError(f"the gateway failed to follow a worker's stream: {type(e).__name__}")
        finally:
            self._pending.remove(key, counted)
        run.put(StreamFailed(attempt, Stream.PREFILL, error))  # ignored where the stream had come to its end

    async def _prefill(
        self, run: Run, attempt: int, ticket: worker_pb2.Ticket, on_computed: Callable[[], None]
    ) -> None:
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
                    on_computed()  # the next prompt need not wait until what is left of this one has been written
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


def _taken_from(run: Run) -> Error:
    """What it failed with, which will refer to the request by its traceback, and the request no longer to it."""
    assert isinstance(run.last, Fail)
    error, run.last = run.last.error, None
    return error


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
