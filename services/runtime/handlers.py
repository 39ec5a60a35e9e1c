"""A gRPC handler with another behaviour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

_Handler = Any  # grpc.RpcMethodHandler; its attributes are not in the type stubs
_Deserializer = Callable[[bytes], Any] | None


def rebuilt(
    handler: _Handler,
    unary: Callable[[Any], Any],
    streaming: Callable[[Any], Any],
    deserializer: Callable[[_Deserializer], _Deserializer] = lambda given: given,
) -> _Handler:
    """``handler`` with its behaviour passed through ``unary`` or ``streaming``, by whether it answers with one message or
    several, and its request's deserializer through ``deserializer``."""
    if handler.request_streaming and handler.response_streaming:
        behaviour, make = streaming(handler.stream_stream), grpc.stream_stream_rpc_method_handler
    elif handler.request_streaming:
        behaviour, make = unary(handler.stream_unary), grpc.stream_unary_rpc_method_handler
    elif handler.response_streaming:
        behaviour, make = streaming(handler.unary_stream), grpc.unary_stream_rpc_method_handler
    else:
        behaviour, make = unary(handler.unary_unary), grpc.unary_unary_rpc_method_handler
    return make(behaviour, deserializer(handler.request_deserializer), handler.response_serializer)
