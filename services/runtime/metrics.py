"""Prometheus metrics over HTTP."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import prometheus_client
from prometheus_client import CollectorRegistry

from services.runtime.startup import StartupError


@contextmanager
def serve_metrics(
    port: int, *, host: str = "127.0.0.1", registry: CollectorRegistry = prometheus_client.REGISTRY
) -> Iterator[None]:
    """Serves ``registry`` on http://host:port/metrics from a thread while entered; port 0 is off.  Raises StartupError
    when the port cannot be had."""
    if port == 0:
        yield
        return
    try:
        server, thread = prometheus_client.start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        why = "is in use by another process" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
        message = f"metrics address {host}:{port}: {why}; choose another with --metrics-port, or 0 for none"
        raise StartupError(message) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5.0)
