"""The gateway behind its protocols: admits, validates, dispatches, and turns tokens into an answer."""

from __future__ import annotations

import asyncio
import time

import structlog
from prometheus_client import Counter, Gauge

from gateway.answer import Answer, Clock, Outlet, deliver
from gateway.dispatch import Dispatcher
from gateway.job import Job, Trace
from gateway.quotas import QuotaBook, Quotas
from gateway.readiness import Readiness
from gateway.recent import EndedRequest, RecentRequests
from gateway.served import Served, ServedBook
from gateway.tenants import Tenant
from gateway.text import TextStream
from gateway.validation import Validator
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from kvferry.errors import Error, OverloadedError
from services.engine.model_files import ModelFiles
from services.runtime.backoff import jittered
from services.runtime.logs import loggable

log = structlog.get_logger(__name__)

RETRY_AFTER_S = 1.0

_REQUESTS = Counter("kvferry_requests", "Requests by how they ended", ["outcome"])
_IN_FLIGHT = Gauge("kvferry_requests_in_flight", "Requests being answered", multiprocess_mode="livesum")


class Frontend:
    def __init__(
        self, files: ModelFiles, readiness: Readiness, dispatcher: Dispatcher, *, max_requests: int,
        max_request_s: float, quotas: Quotas | None = None,
    ) -> None:  # fmt: skip
        self.validator = Validator.for_model(files)
        self.files = files
        self.num_requests_total = 0
        self.num_in_flight = 0
        self.recent = RecentRequests()
        self.served = ServedBook(time.monotonic())
        self._readiness = readiness
        self._dispatcher = dispatcher
        self._max_requests = max_requests
        self._max_request_s = max_request_s
        self._quotas = quotas or QuotaBook()
        self._draining = False
        self._ended = asyncio.Event()

    @property
    def model(self) -> common_pb2.ModelInfo:
        config = self.files.config
        return common_pb2.ModelInfo(
            name=config.name,
            revision=config.revision,
            context_length=config.context_length,
            vocab_size=config.vocab_size,
        )

    @property
    def ready(self) -> bool:
        return not self._draining and self._readiness.look()

    def token_text(self, token_id: int) -> str:
        """Any token for a reader: special ones by name, broken characters as U+FFFD."""
        tokenizer = self.files.tokenizer
        return tokenizer.token_bytes(token_id).decode("utf-8", "replace") or tokenizer.token(token_id) or ""

    def refuse_new(self) -> None:
        """From here on: the gateway is shutting down."""
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        """Returns when the requests in flight have ended, or after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.num_in_flight:
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            log.warning("drain_cut_short", requests=self.num_in_flight)

    async def generate(self, request: inference_pb2.GenerateRequest, tenant: Tenant, outlet: Outlet) -> None:
        """Sends one Started, chunks, one Finished.  Cancelling it stops the compute.  Raises kvferry.errors.Error."""
        clock = Clock()
        if self._draining or self.num_in_flight >= self._max_requests:
            _REQUESTS.labels("refused").inc()
            what = "the gateway is shutting down" if self._draining else f"{self.num_in_flight} requests are in flight"
            raise OverloadedError(what, retry_after_s=jittered(RETRY_AFTER_S))
        self.num_in_flight += 1
        self.num_requests_total += 1
        _IN_FLIGHT.inc()
        outcome = "cancelled"
        job: Job | None = None
        finished: inference_pb2.Finished | None = None
        try:
            job = await self.validator.to_job(request, tenant)
            clock.tokenize_s = time.monotonic() - clock.arrived_s
            self._quotas.begin(tenant.name, tenant.quota, len(job.prompt), time.monotonic())
            try:
                finished = await self._answer(job, tuple(request.stop), clock, outlet)
                await deliver(inference_pb2.GenerateResponse(finished=finished), outlet)
            finally:
                clock.tell()
                self._quotas.end(tenant.name, clock.num_left)
            outcome = "completed"
        except Error as e:
            outcome = e.reason.lower()
            log.info("request_failed", reason=e.reason, error=loggable(e))
            raise
        finally:
            self.num_in_flight -= 1
            self._ended.set()
            _IN_FLIGHT.dec()
            _REQUESTS.labels(outcome).inc()
            if job is not None:
                ended = EndedRequest(job.request_id, outcome, time.monotonic(), len(job.prompt), finished)
                self.recent.add(tenant.name, ended)
            if finished is not None and finished.usage.num_output_tokens:
                self.served.add(_served(tenant.name, clock.arrived_s, finished))

    async def _answer(self, job: Job, stop: tuple[str, ...], clock: Clock, outlet: Outlet) -> inference_pb2.Finished:
        structlog.contextvars.bind_contextvars(request_id=job.request_id)
        if job.tenant.name:
            structlog.contextvars.bind_contextvars(tenant=job.tenant.name)
        started = inference_pb2.Started(
            request_id=job.request_id,
            model=self.files.config.name,
            num_prompt_tokens=len(job.prompt),
            seed=job.sampling.seed,
        )
        text = TextStream(self.files.tokenizer.token_bytes, stop)
        answer = Answer(started, text, frozenset(job.sampling.stop_token_ids), clock, outlet)
        trace = Trace()
        left_s = clock.arrived_s + self._max_request_s - time.monotonic()
        await self._dispatcher.run(job, trace, left_s, answer)
        await answer.flush()
        return self._finished(job, clock, trace)

    def _finished(self, job: Job, clock: Clock, trace: Trace) -> inference_pb2.Finished:
        timeline = clock.timeline(trace)
        # Only a stop string ends the answer before the decode worker does.
        reason = trace.finished.reason if trace.finished else common_pb2.FINISH_REASON_STOP
        log.info(
            "finished",
            output_tokens=clock.num_left,
            ttft_ms=timeline.ttft_us // 1000,
            total_ms=timeline.total_us // 1000,
        )
        return inference_pb2.Finished(
            reason=reason,
            usage=inference_pb2.Usage(
                num_prompt_tokens=len(job.prompt),
                num_output_tokens=clock.num_left,
                # Of a request that another worker went on with, the answer so far was a part of the prompt.
                num_cached_tokens=min(timeline.prefill.num_cached_tokens, len(job.prompt)),
            ),
            timeline=timeline,
        )


def _served(tenant: str, arrived_s: float, finished: inference_pb2.Finished) -> Served:
    usage, timeline = finished.usage, finished.timeline
    return Served(
        tenant, arrived_s, usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens,
        ttft_s=timeline.ttft_us / 1e6,
        itl_p99_s=timeline.itl_p99_us / 1e6,
        tpot_s=(timeline.total_us - timeline.ttft_us) / 1e6 / (usage.num_output_tokens - 1) if timeline.itl_p99_us else 0.0,
        total_s=timeline.total_us / 1e6,
    )  # fmt: skip
