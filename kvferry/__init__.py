"""kvferry's client: talk to a gateway that serves a language model with prefill and decode split.

    with kvferry.Client("127.0.0.1:8470") as client:
        for chunk in client.generate("The capital of France is", max_tokens=16):
            print(chunk.text, end="", flush=True)

Light on purpose: grpcio and protobuf, no torch, no numpy.
"""

from __future__ import annotations

from kvferry._version import __version__
from kvferry.aio import AsyncClient, AsyncStream
from kvferry.client import Client, Stream
from kvferry.errors import (
    AbortedError,
    CancelledError,
    ConflictError,
    DeadlineError,
    Error,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from kvferry.types import (
    BlockCounts,
    ChatMessage,
    Chunk,
    ChunkTimes,
    Cluster,
    Completion,
    DecodeStats,
    FinishReason,
    HealthStatus,
    Layout,
    Message,
    ModelInfo,
    Phases,
    PhaseUse,
    PrefillStats,
    PullStats,
    RouteDecision,
    RouteOption,
    ServedRequest,
    Timeline,
    TlsConfig,
    Token,
    TokenLogprob,
    Traffic,
    TransferStats,
    TransportPath,
    Usage,
    Worker,
    WorkerRole,
)

__all__ = [
    "AbortedError",
    "AsyncClient",
    "AsyncStream",
    "BlockCounts",
    "CancelledError",
    "ChatMessage",
    "Chunk",
    "ChunkTimes",
    "Client",
    "Cluster",
    "Completion",
    "ConflictError",
    "DeadlineError",
    "DecodeStats",
    "Error",
    "FinishReason",
    "HealthStatus",
    "InternalError",
    "InvalidRequestError",
    "Layout",
    "Message",
    "ModelInfo",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "PhaseUse",
    "Phases",
    "PrefillStats",
    "PullStats",
    "RouteDecision",
    "RouteOption",
    "ServedRequest",
    "Stream",
    "Timeline",
    "TlsConfig",
    "Token",
    "TokenLogprob",
    "Traffic",
    "TransferStats",
    "TransportPath",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "Worker",
    "WorkerRole",
    "__version__",
]
