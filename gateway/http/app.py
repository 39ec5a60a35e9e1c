"""The application and its routes.  A request meets, in this order: HeadLimit, RequestScope, KeyCheck, the router, its
route; what a route raises becomes a response in ``errors``."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.doorkeeper import Doorkeeper
from gateway.http import schema
from gateway.http.completions import Completions, require_model
from gateway.http.dashboard import Dashboard
from gateway.http.errors import json_response, on_error, on_http_exception
from gateway.http.front_door import FrontDoor, Vocabulary
from gateway.http.head_limit import HeadLimit
from gateway.http.key_check import KeyCheck
from gateway.http.limits import HttpLimits
from gateway.http.request_scope import RequestScope
from gateway.http.shapes import ChatShape, CompletionShape
from kvferry.api.common.v1 import common_pb2
from kvferry.errors import Error

__all__ = ["FrontDoor", "HttpLimits", "Vocabulary", "create_app"]


def create_app(
    front_door: FrontDoor,
    *,
    vocabulary: Vocabulary,
    limits: HttpLimits | None = None,
    doorkeeper: Doorkeeper | None = None,
    dashboard: Dashboard | None = None,
    registry: CollectorRegistry = REGISTRY,
) -> Starlette:
    """OpenAI-compatible HTTP over ``front_door``, with /health for load balancers and /metrics for Prometheus (of
    ``registry``), and with ``dashboard`` its page.  ``schema`` says which fields are served; request
    headers of our own:

    - authorization: Bearer KEY, where ``doorkeeper`` wants one, which is for all paths below /v1 and /dashboard/;
    - x-request-id names the request, in logs, traces and the response;
    - x-request-timeout gives its time in seconds;
    - x-kvferry-timeline: 1 adds ``kvferry.timeline``, under the names of the proto's Timeline, to the last JSON.

    An application belongs to one event loop and holds nothing that needs closing.
    """
    limits = limits or HttpLimits()
    started_s = int(time.time())

    async def list_models(_: Request) -> Response:
        return json_response({"object": "list", "data": [_model_content(front_door.model, started_s)]})

    async def get_model(request: Request) -> Response:
        model = require_model(front_door, request.path_params["name"])
        return json_response(_model_content(model, started_s))

    async def health(_: Request) -> Response:
        ready = front_door.ready
        return json_response({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    completions = Completions(front_door, vocabulary, limits, schema.CompletionRequest, CompletionShape)
    chat_completions = Completions(front_door, vocabulary, limits, schema.ChatRequest, ChatShape)
    app = Starlette(
        routes=[
            Route("/v1/models", list_models),
            # Names of models may contain slashes.
            Route("/v1/models/{name:path}", get_model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/health", health),
            Route("/metrics", metrics),
            *(dashboard.routes() if dashboard else ()),
        ],
        middleware=[
            Middleware(HeadLimit),
            Middleware(RequestScope),
            Middleware(KeyCheck, doorkeeper=doorkeeper or Doorkeeper()),
        ],
        exception_handlers={Error: on_error, HTTPException: on_http_exception},
    )
    # Redirects would answer unknown paths that end in a slash.
    app.router.redirect_slashes = False
    return app


def _model_content(model: common_pb2.ModelInfo, created_s: int) -> dict[str, Any]:
    """``max_model_len`` is vLLM's: load tools fit their prompts to it."""
    return {"id": model.name, "object": "model", "created": created_s, "owned_by": "kvferry",
            "max_model_len": model.context_length}  # fmt: skip
