"""A real gRPC server in this process whose answers a test writes as a script."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from types import TracebackType
from typing import Self

import grpc
from google.protobuf.message import Message

from kvferry import errors
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc

Script = Callable[[inference_pb2.GenerateRequest, grpc.ServicerContext], Iterator[inference_pb2.GenerateResponse]]

TIMELINE = inference_pb2.Timeline(
    tokenize_us=1_500,
    route_us=200,
    ttft_us=80_000,
    total_us=400_000,
    itl_p50_us=20_000,
    itl_p99_us=31_000,
    prefill_worker="prefill-0",
    decode_worker="decode-0",
    prefill=common_pb2.PrefillStats(
        queue_us=3_000, compute_us=70_000, num_prompt_tokens=40, num_cached_tokens=16, num_chunks=2
    ),
    transfer=common_pb2.TransferStats(
        num_blocks=3,
        num_bytes=6_000_000,
        busy_us=2_000,
        exposed_us=900,
        verify_us=250,
        path="mapped",
        num_hidden_bytes=4_000_000,
        chunks=[
            common_pb2.ChunkTimes(compute_end_us=40_000, num_blocks=2, write_begin_us=40_500, write_end_us=41_900),
            common_pb2.ChunkTimes(
                compute_begin_us=40_000, compute_end_us=70_000, num_blocks=1, write_begin_us=70_100, write_end_us=70_700
            ),
        ],
    ),
    decode=common_pb2.DecodeStats(wait_for_kv_us=75_000, compute_us=300_000, num_steps=12, first_step_us=600),
    route_reason="shipping pays",
    opened_us=2_000,
    ticket_us=4_000,
)
MODEL = common_pb2.ModelInfo(name="tiny", revision="r1", context_length=2048, vocab_size=49152)


def started(seed: int = 7) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        started=inference_pb2.Started(request_id="req-1", model="tiny", num_prompt_tokens=40, seed=seed)
    )


def chunk(text: str, *tokens: common_pb2.Token) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(chunk=inference_pb2.Chunk(text=text, tokens=tokens))


def finished(
    reason: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_STOP, num_output_tokens: int = 3
) -> inference_pb2.GenerateResponse:
    usage = inference_pb2.Usage(num_prompt_tokens=40, num_output_tokens=num_output_tokens, num_cached_tokens=16)
    return inference_pb2.GenerateResponse(
        finished=inference_pb2.Finished(reason=reason, usage=usage, timeline=TIMELINE)
    )


def answer(*texts: str) -> Script:
    """Started, one token per text, Finished."""

    def script(
        request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        yield started()
        for index, text in enumerate(texts):
            yield chunk(text, common_pb2.Token(index=index, id=100 + index))
        yield finished(num_output_tokens=len(texts))

    return script


def refuse(error: errors.Error) -> Script:
    def script(
        request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        context.abort_with_status(errors.to_status(error))
        yield  # makes this a generator

    return script


def describe_cluster() -> inference_pb2.DescribeClusterResponse:
    def worker(name: str, role: common_pb2.WorkerRole.ValueType) -> directory_pb2.WorkerState:
        return directory_pb2.WorkerState(
            info=directory_pb2.WorkerInfo(
                worker_id=name,
                incarnation=11,
                role=role,
                control_address="127.0.0.1:9000",
                model=MODEL,
                layout=common_pb2.Layout(
                    fingerprint="f", block_size_tokens=16, block_nbytes=1_474_560, dtype="float32"
                ),
                version="0.1.0",
                newest_protocol=3,
                oldest_protocol=2,
                paths=[directory_pb2.TransportPath(kind=directory_pb2.PATH_KIND_SHARED_MEMORY, scope="here")],
                labels={"zone": "a"},
            ),
            load=directory_pb2.WorkerLoad(
                blocks=common_pb2.BlockCounts(total=100, free=60, active=20, cached=15, lent=4, quarantined=1),
                num_running=2,
                num_waiting=1,
                num_queued_prefill_tokens=512,
                prefill_tokens_per_s=812.5,
                decode_tokens_per_s=48.25,
                draining=name == "decode-0",
                num_pins=2,
                num_pinned_blocks=7,
                num_host_blocks=321,
                num_host_slots=400,
            ),
        )

    return inference_pb2.DescribeClusterResponse(
        model=MODEL,
        workers=[
            worker("prefill-0", common_pb2.WORKER_ROLE_PREFILL),
            worker("decode-0", common_pb2.WORKER_ROLE_DECODE),
        ],
        view_age_ms=250,
        num_requests_in_flight=2,
        num_requests_total=41,
        version="0.1.0",
    )


def describe_traffic() -> inference_pb2.DescribeTrafficResponse:
    """A request each half second for a minute, but for one that arrived before all are known; in order of their ends."""
    count = 120
    return inference_pb2.DescribeTrafficResponse(
        model=common_pb2.ModelInfo(name="meta-llama/Llama-3.1-8B-Instruct"),
        since_ms=70_000,
        age_us=[80_000_000, *(500_000 * (count - number ^ 1) for number in range(count))],
        num_prompt_tokens=[9999, *(500 + 10 * number for number in range(count))],
        num_cached_tokens=[0, *(256 for _ in range(count))],
        num_output_tokens=[1, *(1 + number % 40 for number in range(count))],
        ttft_us=[9_000_000, *(100_000 if number % 4 else 3_000_000 for number in range(count))],
        itl_p99_us=[0, *(30_000 if number % 40 else 0 for number in range(count))],
        tpot_us=[0, *(20_000 if number % 40 else 0 for number in range(count))],
        total_us=[9_000_000, *(1_000_000 for _ in range(count))],
    )


def explain_route() -> inference_pb2.ExplainRouteResponse:
    split = inference_pb2.RouteOption(
        decode_worker="decode-0", prefill_worker="prefill-0", chosen=True, queue_s=0.25, prefill_s=0.5, ship_s=0.0125,
        decode_s=1.5, num_prefill_cached_tokens=32, num_decode_cached_tokens=16, pull_worker="decode-0",
        num_pulled_tokens=160, pull_s=0.035, evict_s=0.015,
    )  # fmt: skip
    alone = inference_pb2.RouteOption(
        decode_worker="decode-1", full=True, prefill_s=0.5, stall_s=2.5, decode_s=1.5
    )  # fmt: skip
    decision = inference_pb2.RouteDecision(
        policy="kv-aware", reason="prefill on prefill-0, decode on decode-0", num_prompt_tokens=512, age_ms=4200,
        view_age_ms=300, options=[split, alone],
        passed_over=[inference_pb2.PassedOver(worker_id="decode-2", why="draining")],
    )  # fmt: skip
    refused = inference_pb2.RouteDecision(reason="no decode worker has joined the cluster", age_ms=4100)
    return inference_pb2.ExplainRouteResponse(decisions=[decision, refused])


class FakeGateway(inference_pb2_grpc.InferenceServiceServicer, inference_pb2_grpc.ClusterServiceServicer):
    """Plays ``scripts`` one per Generate, the last one again and again; ``failures`` are raised by the unary calls
    before they answer.  With ``tls`` it speaks TLS alone.  ``requests`` and ``metadata`` record what arrived,
    ``cancelled`` that a client went away."""

    def __init__(self, *scripts: Script, tls: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        self.port = port
        self.tls = tls
        self.scripts = list(scripts)
        self.failures: list[errors.Error] = []
        self.requests: list[Message] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled = threading.Event()
        self.serving = b"\x08\x01"

    def hold(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """A script: one token, then nothing until the client goes away."""
        ended = self._watch(context)
        yield started()
        yield chunk("one", common_pb2.Token(index=0, id=100))
        ended.wait(30)

    def hang(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """A script: nothing at all until the client goes away."""
        self._watch(context).wait(30)
        yield started()

    def _watch(self, context: grpc.ServicerContext) -> threading.Event:
        """Set when the client goes away; from the beginning, because a script is not resumed after that."""
        if not context.add_callback(self.cancelled.set):
            self.cancelled.set()
        return self.cancelled

    def _record(self, request: Message, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata.append({key: value for key, value in context.invocation_metadata() if isinstance(value, str)})

    def _record_unary(self, request: Message, context: grpc.ServicerContext) -> None:
        self._record(request, context)
        if self.failures:
            context.abort_with_status(errors.to_status(self.failures.pop(0)))

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        self._record(request, context)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        return script(request, context)

    def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        self._record_unary(request, context)
        return inference_pb2.ListModelsResponse(models=[MODEL])

    def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        self._record_unary(request, context)
        return inference_pb2.TokenizeResponse(ids=[5, 6, 7])

    def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> inference_pb2.DetokenizeResponse:
        self._record_unary(request, context)
        return inference_pb2.DetokenizeResponse(text="".join(map(str, request.ids)))

    def ExplainRoute(
        self, request: inference_pb2.ExplainRouteRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ExplainRouteResponse:
        self._record_unary(request, context)
        return explain_route()

    def DescribeTraffic(
        self, request: inference_pb2.DescribeTrafficRequest, context: grpc.ServicerContext
    ) -> inference_pb2.DescribeTrafficResponse:
        self._record_unary(request, context)
        return describe_traffic()

    def DescribeCluster(
        self, request: inference_pb2.DescribeClusterRequest, context: grpc.ServicerContext
    ) -> inference_pb2.DescribeClusterResponse:
        self._record_unary(request, context)
        return describe_cluster()

    def __enter__(self) -> Self:
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        inference_pb2_grpc.add_ClusterServiceServicer_to_server(self, self._server)
        check = grpc.unary_unary_rpc_method_handler(lambda request, context: self.serving)
        watch = grpc.unary_stream_rpc_method_handler(lambda request, context: iter([self.serving]))
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check, "Watch": watch}),)
        )
        where = f"127.0.0.1:{self.port}"
        port = (
            self._server.add_insecure_port(where) if self.tls is None else self._server.add_secure_port(where, self.tls)
        )
        self.address = f"127.0.0.1:{port}"
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stop(None).wait(10)
