"""kvferry.api.inference.v1 over gRPC: translation between messages and the front end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from gateway.frontend import Frontend
from gateway.view import ClusterView
from kvferry import __version__
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
from kvferry.errors import InvalidRequestError

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        async with aclosing(self._frontend.generate(request)) as responses:
            async for response in responses:
                yield response

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=[self._frontend.model])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
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
        validator = self._frontend.validator
        validator.check_model(request.model)
        if request.ids and max(request.ids) >= validator.files.config.vocab_size:
            raise InvalidRequestError(f"ids: {max(request.ids)} is outside the vocabulary", metadata={"field": "ids"})
        return inference_pb2.DetokenizeResponse(text=validator.files.tokenizer.decode(list(request.ids)))


class ClusterServicer(inference_pb2_grpc.ClusterServiceServicer):
    def __init__(self, frontend: Frontend, view: ClusterView) -> None:
        self._frontend = frontend
        self._view = view

    async def DescribeCluster(
        self, request: inference_pb2.DescribeClusterRequest, context: Context
    ) -> inference_pb2.DescribeClusterResponse:
        return inference_pb2.DescribeClusterResponse(
            model=self._frontend.model,
            workers=self._view.workers.values(),
            view_age_ms=int(self._view.age_s * 1000),
            num_requests_in_flight=self._frontend.num_in_flight,
            num_requests_total=self._frontend.num_requests_total,
            version=__version__,
        )
