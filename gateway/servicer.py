"""kvferry.api.inference.v1 over gRPC: translation between messages and the front end."""

from __future__ import annotations

import time
from typing import Any

import grpc

from gateway.decisions import MAX_REQUESTS
from gateway.doorkeeper import Doorkeeper
from gateway.frontend import Frontend
from gateway.siblings import Siblings
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

    async def Generate(  # type: ignore[override]  # writes for itself
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """``context``: a gateway.rpc.call.Call, which is the answer's outlet."""
        tenant = _admit(self._doorkeeper, context)
        await self._frontend.generate(request, tenant, context)

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
    def __init__(self, frontend: Frontend, doorkeeper: Doorkeeper, view: ClusterView, siblings: Siblings) -> None:
        self._frontend = frontend
        self._doorkeeper = doorkeeper
        self._view = view
        self._siblings = siblings
        self._began_s = time.monotonic()

    async def DescribeCluster(
        self, request: inference_pb2.DescribeClusterRequest, context: Context
    ) -> inference_pb2.DescribeClusterResponse:
        _admit(self._doorkeeper, context)
        counts = await self._siblings.count()
        return inference_pb2.DescribeClusterResponse(
            model=self._frontend.model,
            workers=self._view.workers.values(),
            view_age_ms=int(min(self._view.age_s, time.monotonic() - self._began_s) * 1000),
            num_requests_in_flight=counts.num_in_flight,
            num_requests_total=counts.num_total,
            version=__version__,
        )

    async def ExplainRoute(
        self, request: inference_pb2.ExplainRouteRequest, context: Context
    ) -> inference_pb2.ExplainRouteResponse:
        tenant = _admit(self._doorkeeper, context)
        decisions = await self._siblings.find_decisions(tenant.name, request.request_id)
        if not decisions:
            raise NotFoundError(
                f"request {request.request_id!r} is not among the last {MAX_REQUESTS} that {self._siblings.who} routed",
                reason="UNKNOWN_REQUEST",
            )
        return inference_pb2.ExplainRouteResponse(decisions=decisions)

    async def DescribeTraffic(
        self, request: inference_pb2.DescribeTrafficRequest, context: Context
    ) -> inference_pb2.DescribeTrafficResponse:
        tenant = _admit(self._doorkeeper, context)
        traffic = await self._siblings.find_traffic(tenant.name)
        traffic.model.CopyFrom(self._frontend.model)
        return traffic


def _admit(doorkeeper: Doorkeeper, context: Context) -> Tenant:
    """Raises UnauthenticatedError."""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return doorkeeper.admit(value if isinstance(value, str) else value.decode(errors="replace"))
    return doorkeeper.admit(None)
