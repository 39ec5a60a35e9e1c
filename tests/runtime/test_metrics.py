from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from services.runtime.metrics import serve_metrics
from services.runtime.startup import StartupError


def test_metrics_are_served_while_entered() -> None:
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/metrics"
    with serve_metrics(port, registry=registry), urllib.request.urlopen(url, timeout=5) as response:
        assert b"things_total 3.0" in response.read()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"{port}: is in use .* --metrics-port"), serve_metrics(port):
            pass


def test_port_0_is_off() -> None:
    with serve_metrics(0):
        pass
