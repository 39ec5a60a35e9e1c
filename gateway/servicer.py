"""kvferry.api.inference.v1 over gRPC: translation between messages and the front end."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from gateway.costs import Option
from gateway.decisions import Decision, DecisionBook, Refusal
from gateway.doorkeeper import Doorkeeper
from gateway.frontend import Frontend
from gateway.tenants import Tenant
from gateway.view import ClusterView
from kvferry import __version__
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
from kvferry.errors import InvalidRequestError, NotFoundError

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, frontend: Frontend, doorkeeper: Doorkeeper) -> None:
        self._frontend = frontend
        self._doorkeeper = doorkeeper

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        tenant = _admit(self._doorkeeper, context)
        async with aclosing(self._frontend.generate(request, tenant)) as responses:
            async for response in responses:
                yield response

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        _admit(self._doorkeeper, context)
        return inference_pb2.ListModelsResponse(models=[self._frontend.model])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        _admit(self._doorkeeper, context)
        validator = self._frontend.validator
        validator.check_model(request.model)
        match request.WhichOneof("prompt"):
            case "text":
                ids = await validator.tokenize(request.text)
            case "chat":
                ids = await validator.tokenize(request.chat)
            case _:
                raise InvalidRequestError("prompt: set text or chat", metadata={"field": "prompt"})
        return inference_pb2.TokenizeResponse(ids=ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        _admit(self._doorkeeper, context)
        validator = self._frontend.validator
        validator.check_model(request.model)
        if request.ids and max(request.ids) >= validator.files.config.vocab_size:
            raise InvalidRequestError(f"ids: {max(request.ids)} is outside the vocabulary", metadata={"field": "ids"})
        return inference_pb2.DetokenizeResponse(text=validator.files.tokenizer.decode(list(request.ids)))


class ClusterServicer(inference_pb2_grpc.ClusterServiceServicer):
    def __init__(self, frontend: Frontend, doorkeeper: Doorkeeper, view: ClusterView, decisions: DecisionBook) -> None:
        self._frontend = frontend
        self._doorkeeper = doorkeeper
        self._view = view
        self._decisions = decisions
        self._began_s = time.monotonic()

    async def DescribeCluster(
        self, request: inference_pb2.DescribeClusterRequest, context: Context
    ) -> inference_pb2.DescribeClusterResponse:
        _admit(self._doorkeeper, context)
        return inference_pb2.DescribeClusterResponse(
            model=self._frontend.model,
            workers=self._view.workers.values(),
            view_age_ms=int(min(self._view.age_s, time.monotonic() - self._began_s) * 1000),
            num_requests_in_flight=self._frontend.num_in_flight,
            num_requests_total=self._frontend.num_requests_total,
            version=__version__,
        )

    async def ExplainRoute(
        self, request: inference_pb2.ExplainRouteRequest, context: Context
    ) -> inference_pb2.ExplainRouteResponse:
        tenant = _admit(self._doorkeeper, context)
        decisions = self._decisions.of(tenant.name, request.request_id)
        if not decisions:
            raise NotFoundError(
                f"request {request.request_id!r} is not among the last {self._decisions.max_requests} that this gateway "
                "routed",
                reason="UNKNOWN_REQUEST",
            )
        now_s = time.monotonic()
        return inference_pb2.ExplainRouteResponse(decisions=[_to_decision_proto(d, now_s) for d in decisions])

    async def DescribeTraffic(
        self, request: inference_pb2.DescribeTrafficRequest, context: Context
    ) -> inference_pb2.DescribeTrafficResponse:
        tenant = _admit(self._doorkeeper, context)
        book, now_s = self._frontend.served, time.monotonic()
        served = book.of(tenant.name)
        return inference_pb2.DescribeTrafficResponse(
            model=self._frontend.model,
            since_ms=int((now_s - book.since_s) * 1000),
            age_us=[_us(now_s - each.arrived_s) for each in served],
            num_prompt_tokens=[each.num_prompt_tokens for each in served],
            num_cached_tokens=[each.num_cached_tokens for each in served],
            num_output_tokens=[each.num_output_tokens for each in served],
            ttft_us=[_us(each.ttft_s) for each in served],
            itl_p99_us=[_us(each.itl_p99_s) for each in served],
            tpot_us=[_us(each.tpot_s) for each in served],
            total_us=[_us(each.total_s) for each in served],
        )


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _admit(doorkeeper: Doorkeeper, context: Context) -> Tenant:
    """Raises UnauthenticatedError."""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return doorkeeper.admit(value if isinstance(value, str) else value.decode(errors="replace"))
    return doorkeeper.admit(None)


def _to_decision_proto(decision: Decision, now_s: float) -> inference_pb2.RouteDecision:
    route = decision.outcome
    proto = inference_pb2.RouteDecision(
        age_ms=int((now_s - decision.made_s) * 1000),
        view_age_ms=int(min(decision.view_age_s, now_s) * 1000),
        passed_over=[inference_pb2.PassedOver(worker_id=p.worker_id, why=p.why) for p in route.passed_over],
    )
    if isinstance(route, Refusal):
        proto.reason = route.reason
        return proto
    proto.policy = route.policy.value
    proto.reason = route.reason
    proto.num_prompt_tokens = route.demand.num_prompt_tokens
    proto.options.extend(
        _to_option_proto(option, option == route.chosen, route.demand.num_prompt_tokens) for option in route.options
    )
    return proto


def _to_option_proto(option: Option, chosen: bool, num_prompt_tokens: int) -> inference_pb2.RouteOption:
    decode, prefill, terms, pull = option.decode, option.prefill, option.terms, option.pull
    return inference_pb2.RouteOption(
        decode_worker=decode.key.worker_id,
        prefill_worker=prefill.key.worker_id if prefill else "",
        chosen=chosen,
        full=option.full,
        queue_s=terms.queue_s,
        prefill_s=terms.prefill_s,
        ship_s=terms.ship_s,
        stall_s=terms.stall_s,
        decode_s=terms.decode_s,
        pull_worker=pull.holder.key.worker_id if pull else "",
        num_pulled_tokens=pull.num_blocks * (prefill or decode).block_size if pull else 0,
        pull_s=terms.pull_s,
        num_prefill_cached_tokens=min(num_prompt_tokens, prefill.num_prefix_blocks * prefill.block_size)
        if prefill
        else 0,
        num_decode_cached_tokens=min(num_prompt_tokens, decode.num_prefix_blocks * decode.block_size),
    )
