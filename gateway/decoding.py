"""One attempt of a request on its decode worker."""

from __future__ import annotations

import asyncio
import time

import structlog

from gateway.candidates import WorkerKey
from gateway.costs import num_needed_blocks
from gateway.link import DecodeLink
from gateway.pending import Pending, PendingBook
from gateway.request import DecodeDone, Stream, StreamFailed, TicketCame, TokenCame
from gateway.run import Run
from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import CancelledError, Error, UnavailableError
from services.runtime.backoff import jittered
from services.runtime.failure import from_failure

log = structlog.get_logger(__name__)

WORKER_RETRY_S = 2.0
# After the last token, how long the writer's figures may take: they decorate the timeline and nothing else.
FIGURES_TIMEOUT_S = 1.0


class Decoding:
    """One attempt's request on its decode worker, which counts as pending there until it has ended."""

    def __init__(
        self, run: Run, attempt: int, link: DecodeLink, pending: PendingBook, stall_timeout_s: float,
        opened: set[Decoding],
    ) -> None:  # fmt: skip
        """Is in ``opened`` from ``open`` to its end."""
        self.key = run.route.decode.key
        self._opened = opened
        self._run = run
        self._attempt = attempt
        self._link = link
        self._pending = pending
        self._stall_timeout_s = stall_timeout_s
        self._heard_s = time.monotonic()
        self._counted: Pending | None = None
        self._promised: tuple[WorkerKey, Pending] | None = None  # to the prefill worker, until a stream to it counts
        self._handle = 0
        self._has_begun = False
        self._is_given_up = False
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
            num_needed_blocks(route.decode, route.demand),
        )
        if route.prefill:
            # Requests that come before the ticket does must not find the prefill worker idle.
            self._promised = (route.prefill.key, self._pending.add(route.prefill.key, route.num_uncached_tokens))
        self._opened.add(self)
        self._watch(self._stall_timeout_s)

    def expect_soon(self, within_s: float) -> None:
        """The worker has been given up: from here on it is lost when it says nothing for so long."""
        self._is_given_up = True
        self._stall_timeout_s = min(self._stall_timeout_s, within_s)
        self._heard_s = time.monotonic()
        if self._silence is not None:
            self._silence.cancel()
        self._watch(self._stall_timeout_s)

    def on_event(self, kind: str | None, event: worker_pb2.DecodeEvent) -> None:
        self._heard_s = time.monotonic()
        match kind:
            case "token":
                if not self._has_begun:
                    self._begin()
                self._run.put(TokenCame(self._attempt, Stream.DECODE, event.token))
            case "ticket":
                if self._run.is_held:
                    self.keep_promise()  # who knows when the prefill worker will be asked
                self._run.put(TicketCame(self._attempt, event.ticket))
            case "finished":
                self._end()
                self._run.put(DecodeDone(self._attempt, event.finished))
                late = UnavailableError("the prefill worker's figures did not come")
                self._run.put_later(FIGURES_TIMEOUT_S, StreamFailed(self._attempt, Stream.PREFILL, late))
            case "failure":
                self._fail(from_failure(event.failure))

    def on_lost(self, error: Error) -> None:
        self._fail(as_lost(error, self.key.worker_id))

    def cancel(self) -> None:
        self._end()
        self._link.cancel(self._handle)

    def _begin(self) -> None:
        """Its prompt is no longer ahead of others'."""
        self._has_begun = True
        if self._counted is not None:
            self._pending.computed(self.key, self._counted)

    def _watch(self, delay_s: float) -> None:
        self._silence = asyncio.get_running_loop().call_later(delay_s, self._check_silence)

    def _check_silence(self) -> None:
        left_s = self._heard_s + self._stall_timeout_s - time.monotonic()
        if left_s > 0:
            self._watch(left_s)
        else:
            self._link.cancel(self._handle)
            if self._is_given_up:
                self.on_lost(UnavailableError("it was given up and says nothing"))
            else:
                self._fail(stalled(self.key.worker_id, self._stall_timeout_s))

    def _fail(self, error: Error) -> None:
        self._end()
        log.warning("stream_failed", stream=Stream.DECODE.name, worker_id=self.key.worker_id, error=str(error))
        self._run.put(StreamFailed(self._attempt, Stream.DECODE, error))

    def _end(self) -> None:
        """Idempotent."""
        self._opened.discard(self)
        if self._silence is not None:
            self._silence.cancel()
        self.keep_promise()
        if self._counted is not None:
            self._pending.remove(self.key, self._counted)
            self._counted = None

    def keep_promise(self) -> None:
        """From here on the prefill stream counts itself.  Idempotent."""
        if self._promised is not None:
            self._pending.remove(*self._promised)
            self._promised = None


def as_lost(error: Error, worker_id: str) -> Error:
    """What gRPC itself says of a stream, in words that help; a worker's own are kept.  CANCELLED is what it says of calls
    that a process left open at its end: of those that were cancelled here nobody asks."""
    if error.reason not in (UnavailableError.default_reason, CancelledError.default_reason):
        return error
    text = f"worker {worker_id} was lost or cannot be reached; send the request again"
    return UnavailableError(text, reason="WORKER_LOST", retry_after_s=jittered(WORKER_RETRY_S))


def stalled(worker_id: str, timeout_s: float) -> UnavailableError:
    return UnavailableError(f"worker {worker_id} said nothing for {timeout_s:g} s", reason="STALLED")
