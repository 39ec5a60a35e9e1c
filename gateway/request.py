"""One request's life on the cluster, as one explicit state machine.  Pure: events in, actions out.

An attempt is one try on chosen workers: a decode stream and, when the prompt is computed elsewhere, a prefill stream.
Both streams may bring the attempt's first token; each token leaves once, in order.  What goes wrong starts the next attempt
on other workers, which goes on behind the tokens that have left: they are computed again as a part of its prompt.  A draw
depends on seed and position alone, so the answer is the one that would have come anyway.

    ROUTING ──routed──▶ ATTEMPTING ──first token from decode──▶ DECODING ──▶ ENDED
       ▲                    │                                      │
       └─────────────retriable failure─────────────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from gateway.candidates import WorkerKey
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import (
    AbortedError,
    ConflictError,
    Error,
    InternalError,
    OverloadedError,
    UnavailableError,
)

# In all, of an answer that goes on and on: should its worker die of it, so do not all die of it for ever.
MOST_ATTEMPTS = 20

_RETRIABLE = (AbortedError, ConflictError, InternalError, OverloadedError, UnavailableError)


class Stream(Enum):
    PREFILL = auto()
    DECODE = auto()


class State(Enum):
    ROUTING = auto()
    ATTEMPTING = auto()
    DECODING = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class Routed:
    decode: WorkerKey
    prefill: WorkerKey | None


@dataclass(frozen=True, slots=True)
class NotRouted:
    """No worker can take it."""

    error: Error


@dataclass(frozen=True, slots=True)
class TicketCame:
    attempt: int
    ticket: worker_pb2.Ticket


# There is one of these, and of Emit, for each token: a NamedTuple is made in a third of a frozen dataclass's time.
class TokenCame(NamedTuple):
    """``token.index`` counts the attempt's own tokens."""

    attempt: int
    stream: Stream
    token: common_pb2.Token


@dataclass(frozen=True, slots=True)
class PrefillDone:
    attempt: int
    committed: worker_pb2.Committed


@dataclass(frozen=True, slots=True)
class DecodeDone:
    attempt: int
    finished: worker_pb2.DecodeFinished


@dataclass(frozen=True, slots=True)
class StreamFailed:
    attempt: int
    stream: Stream
    error: Error


Event = Routed | NotRouted | TicketCame | TokenCame | PrefillDone | DecodeDone | StreamFailed


@dataclass(frozen=True, slots=True)
class ChooseRoute:
    """Answer with Routed or NotRouted.  ``num_sent``: tokens that have left; who waits for more may wait for a worker."""

    excluded: frozenset[WorkerKey]
    num_sent: int = 0


@dataclass(frozen=True, slots=True)
class OpenDecode:
    attempt: int


@dataclass(frozen=True, slots=True)
class OpenPrefill:
    attempt: int
    ticket: worker_pb2.Ticket


@dataclass(frozen=True, slots=True)
class CancelAttempt:
    attempt: int


class Emit(NamedTuple):
    token: common_pb2.Token


@dataclass(frozen=True, slots=True)
class Finish:
    finished: worker_pb2.DecodeFinished


@dataclass(frozen=True, slots=True)
class Fail:
    error: Error


Action = ChooseRoute | OpenDecode | OpenPrefill | CancelAttempt | Emit | Finish | Fail


class RequestMachine:
    def __init__(
        self, max_attempts: int, *, max_tokens: int = 2**31 - 1, stop_ids: frozenset[int] = frozenset(),
        first_from_decode: bool = False,
    ) -> None:  # fmt: skip
        """``max_attempts``: before the first token.  An answer that has begun has more, ``MOST_ATTEMPTS`` in all, and
        whoever chooses its routes gives it up when it gets no further.  It ends with ``max_tokens`` tokens, or the first of
        ``stop_ids``.  ``first_from_decode``: a first token, unless it is the only one, leaves when the decode worker goes
        on behind it, not when its prompt is computed: later, and the second comes sooner after it."""
        self.state = State.ROUTING
        self.attempt = 1
        self._max_attempts = max_attempts
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._first_from_decode = first_from_decode
        self._num_sent_before = 0  # this attempt
        self._excluded: frozenset[WorkerKey] = frozenset()
        self._route: Routed | None = None
        self._emitted: list[int] = []
        self._has_ticket = False
        self._committed: worker_pb2.Committed | None = None
        self._finished: worker_pb2.DecodeFinished | None = None
        self._last_error: Error | None = None
        self._prefill_lost = False
        self._num_refused = 0

    def start(self) -> list[Action]:
        return [ChooseRoute(self._excluded)]

    def on(self, event: Event) -> list[Action]:
        """Events of attempts gone by are ignored."""
        if self.state is State.ENDED or getattr(event, "attempt", self.attempt) != self.attempt:
            return []
        if isinstance(event, TokenCame):
            return self._on_token(event.stream, event.token)
        match event:
            case Routed():
                self._route = event
                self._has_ticket, self._committed = False, None
                self.state = State.ATTEMPTING
                return [OpenDecode(self.attempt)]
            case NotRouted(error=error):
                return self._fail(_with_hint(self._last_error, error) if self._last_error else error)
            case TicketCame(ticket=ticket):
                self._has_ticket = True
                return [OpenPrefill(self.attempt, ticket)]
            case PrefillDone(committed=committed):
                self._committed = committed
                return self._finish_if_complete()
            case DecodeDone(finished=finished):
                self._finished = finished
                return self._finish_if_complete()
            case StreamFailed(stream=stream, error=error):
                return self._on_failure(stream, error)

    def _on_token(self, stream: Stream, token: common_pb2.Token) -> list[Action]:
        index = self._num_sent_before + token.index
        if stream is Stream.DECODE:
            self.state = State.DECODING
        elif self._first_from_decode and self._ends(token.id, index + 1) is None:
            return []
        if index < len(self._emitted):
            if self._emitted[index] != token.id:
                return self._fail(
                    InternalError(
                        f"two workers drew different tokens at position {index}; the answer was stopped rather than "
                        f"continued wrongly",
                        reason="WORKERS_DISAGREE",
                    )
                )
            return []
        if index > len(self._emitted):
            return self._fail(InternalError(f"token {len(self._emitted)} is missing", reason="TOKEN_MISSING"))
        self._emitted.append(token.id)
        if self._num_sent_before:
            counted = common_pb2.Token()
            counted.CopyFrom(token)
            counted.index = index
            token = counted
        return [Emit(token)]

    def _finish_if_complete(self) -> list[Action]:
        """The writer's figures come on another stream than the end; wait for both, unless the writer is gone."""
        if self._finished is None:
            return []
        assert self._route is not None
        if self._route.prefill is not None and self._committed is None and not self._prefill_lost:
            return []
        self.state = State.ENDED
        return [Finish(self._finished)]

    def _on_failure(self, stream: Stream, error: Error) -> list[Action]:
        assert self._route is not None
        if (stream is Stream.PREFILL and self._committed) or (stream is Stream.DECODE and self._finished):
            return []  # it had said all it had to say
        if stream is Stream.PREFILL and self.state is State.DECODING:
            self._prefill_lost = True  # the KV had arrived: the writer is no longer needed
            return self._finish_if_complete()
        if (reason := self._end_of_answer()) is not None:  # only the news of its end was lost
            self.state = State.ENDED
            return [CancelAttempt(self.attempt), Finish(worker_pb2.DecodeFinished(reason=reason))]
        # The worker was too small for it; another may not be.
        retriable = isinstance(error, _RETRIABLE) or error.reason == "TOO_LONG_FOR_POOL"
        culprit = self._route.decode if self.state is State.DECODING else self._culprit(stream, error)
        if self.state is State.DECODING and retriable:
            error = UnavailableError(
                f"decode worker {self._route.decode.worker_id} failed after {len(self._emitted)} tokens: {error}",
                reason="DECODE_WORKER_LOST",
                retry_after_s=error.retry_after_s,
            )
        # No attempt used up: each of these leaves one writer less to try, and at last the decode worker alone.
        self._num_refused += error.reason in ("PAIR_QUARANTINED", "OWNER_LOST")
        most = MOST_ATTEMPTS if self._emitted else self._max_attempts
        if not retriable or self.attempt - self._num_refused >= most:
            return self._fail(error)
        self._last_error = error
        self._excluded |= {culprit}
        self.state = State.ROUTING
        self._prefill_lost = False
        self._num_sent_before = len(self._emitted)
        self.attempt += 1
        return [CancelAttempt(self.attempt - 1), ChooseRoute(self._excluded, self._num_sent_before)]

    def _end_of_answer(self) -> common_pb2.FinishReason.ValueType | None:
        return self._ends(self._emitted[-1], len(self._emitted)) if self._emitted else None

    def _ends(self, token_id: int, num_tokens: int) -> common_pb2.FinishReason.ValueType | None:
        """The answer of so many tokens, of which this is the last."""
        if token_id in self._stop_ids:
            return common_pb2.FINISH_REASON_STOP
        return common_pb2.FINISH_REASON_LENGTH if num_tokens >= self._max_tokens else None

    def _culprit(self, stream: Stream, error: Error) -> WorkerKey:
        assert self._route is not None
        prefill = self._route.prefill
        # A decode worker says ABORTED of what its writer did.  A writer's OWNER_LOST may mean the way between the two
        # alone: whether the decode worker is lost, its own stream tells.
        by_writer = isinstance(error, AbortedError) or stream is Stream.PREFILL
        # From its ticket to the step behind the commit it has nothing to say: until the commit the silence is the writer's.
        by_writer |= error.reason == "STALLED" and self._has_ticket and self._committed is None
        return prefill if by_writer and prefill is not None else self._route.decode

    def _fail(self, error: Error) -> list[Action]:
        self.state = State.ENDED
        return [CancelAttempt(self.attempt), Fail(error)]


def _with_hint(cause: Error, refusal: Error) -> Error:
    """Why it failed, and when to come again: by the refusal to start it over, where the cause does not say."""
    if cause.retry_after_s is not None or refusal.retry_after_s is None:
        return cause
    return type(cause)(cause.message, reason=cause.reason, retry_after_s=refusal.retry_after_s, metadata=cause.metadata)
