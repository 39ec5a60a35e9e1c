"""One request's answer: tokens made text, timed, and sent on."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise
from typing import Protocol

from prometheus_client import Counter, Histogram

from gateway.job import Trace
from gateway.text import TextStream
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from services.runtime.units import to_us


class Gaps(Histogram):
    """Many observations at once, in a fraction of the time that ``observe`` takes for each: there is one for each token."""

    def observe_all(self, amounts: Iterable[float]) -> None:
        counts, total = [0] * len(self._upper_bounds), 0.0
        for amount in amounts:
            counts[bisect_left(self._upper_bounds, amount)] += 1
            total += amount
        self._sum.inc(total)
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)


_OUTPUT_TOKENS = Counter("kvferry_output_tokens", "Tokens sent to clients")
_TTFT = Histogram(
    "kvferry_ttft_seconds", "Time to first token",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60),
)  # fmt: skip
_ITL = Gaps(
    "kvferry_itl_seconds", "Time between a request's successive tokens",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
)  # fmt: skip
TELL_INTERVAL_S = 1.0


class Outlet(Protocol):
    """The client's side of a protocol: where one answer's responses go, in order."""

    def send(self, response: inference_pb2.GenerateResponse) -> bool:
        """Takes it.  False: the client is behind, and nothing more is to be sent until ``drained`` has returned.  Called in
        the event loop, must neither block nor raise."""

    async def drained(self) -> None:
        """Waits for the client, within bounds.  Raises kvferry.errors.Error."""


async def deliver(response: inference_pb2.GenerateResponse, outlet: Outlet) -> None:
    if not outlet.send(response):
        await outlet.drained()


class Clock:
    """When a request's tokens left.  The metrics are told of them together, every ``TELL_INTERVAL_S`` or so."""

    def __init__(self) -> None:
        self.arrived_s = time.monotonic()
        self.tokenize_s = 0.0
        self._left_s: list[float] = []
        self._num_told = 0
        self._tell_s = 0.0

    @property
    def num_left(self) -> int:
        return len(self._left_s)

    def tokens_left(self, num_tokens: int) -> None:
        """In one message."""
        now_s = time.monotonic()
        if not self._left_s:
            _TTFT.observe(now_s - self.arrived_s)
            self._tell_s = now_s + TELL_INTERVAL_S
        self._left_s += [now_s] * num_tokens
        if now_s >= self._tell_s:
            self.tell()
            self._tell_s = now_s + TELL_INTERVAL_S

    def tell(self) -> None:
        """The metrics, of the tokens of which they have not been told."""
        untold_s = self._left_s[max(0, self._num_told - 1) :]
        _OUTPUT_TOKENS.inc(len(self._left_s) - self._num_told)
        _ITL.observe_all(b - a for a, b in pairwise(untold_s))
        self._num_told = len(self._left_s)

    def timeline(self, trace: Trace) -> inference_pb2.Timeline:
        gaps = sorted(b - a for a, b in zip(self._left_s, self._left_s[1:], strict=False))
        timeline = inference_pb2.Timeline(
            tokenize_us=to_us(self.tokenize_s),
            route_us=to_us(trace.route_s),
            ttft_us=to_us(self._left_s[0] - self.arrived_s) if self._left_s else 0,
            total_us=to_us(time.monotonic() - self.arrived_s),
            itl_p50_us=to_us(gaps[len(gaps) // 2]) if gaps else 0,
            itl_p99_us=to_us(gaps[min(len(gaps) - 1, len(gaps) * 99 // 100)]) if gaps else 0,
            num_retries=trace.num_retries,
            line_us=to_us(trace.line_s),
        )
        if route := trace.route:
            timeline.route_reason = route.reason
            timeline.prefill_worker = route.prefill.key.worker_id if route.prefill else ""
            timeline.decode_worker = route.decode.key.worker_id
        if trace.opened_s is not None:
            timeline.opened_us = to_us(trace.opened_s - self.arrived_s)
        if trace.ticket_s is not None:
            timeline.ticket_us = to_us(trace.ticket_s - self.arrived_s)
        if trace.committed is not None:
            timeline.prefill.CopyFrom(trace.committed.prefill)
            timeline.transfer.CopyFrom(trace.committed.transfer)
        if trace.finished is not None:
            timeline.decode.CopyFrom(trace.finished.decode)
            if trace.finished.HasField("prefill"):
                timeline.prefill.CopyFrom(trace.finished.prefill)
        return timeline


class Answer:
    """A dispatcher's TokenSink.  It ends before the decode worker does only where a stop string says so."""

    def __init__(
        self, started: inference_pb2.Started, text: TextStream, silent: frozenset[int], clock: Clock, outlet: Outlet
    ) -> None:
        """``started`` leaves with the first token.  ``silent``: tokens that add nothing to the text."""
        self._started: inference_pb2.Started | None = started
        self._text = text
        self._silent = silent
        self._clock = clock
        self._outlet = outlet

    def put(self, tokens: list[common_pb2.Token]) -> bool:
        if self._started is not None:
            self._outlet.send(inference_pb2.GenerateResponse(started=self._started))
            self._started = None
        text, num_tokens, piece = self._text, 0, ""
        for token in tokens:
            num_tokens += 1
            if token.id not in self._silent:
                piece += text.feed(token.id)
                if text.stopped:
                    break
        self._clock.tokens_left(num_tokens)
        response = inference_pb2.GenerateResponse()
        chunk = response.chunk
        chunk.text = piece
        chunk.tokens.extend(tokens[:num_tokens])
        return self._outlet.send(response) and not text.stopped

    async def room(self) -> bool:
        if self._text.stopped:
            return False
        await self._outlet.drained()
        return True

    async def flush(self) -> None:
        """Sends what was held back of the text, at its end."""
        if rest := self._text.flush():
            await deliver(inference_pb2.GenerateResponse(chunk=inference_pb2.Chunk(text=rest)), self._outlet)
