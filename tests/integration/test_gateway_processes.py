"""Several gateway processes on one port, before a cluster's own workers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvferry import Client
from kvferry.cli import ports
from tests.integration.conftest import Running

NUM_PROCESSES = 2
KEYS = f"""
[[key]]
tenant = "t"
sha256 = "{hashlib.sha256(b"key").hexdigest()}"
[tenant.t]
max_streams = 1
"""


class Gateway:
    def __init__(self, directory: str, folder: Path) -> None:
        grpc_port, http_port = ports.pick_free(2)
        self.address, self.http = f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}"
        self.log = folder / "gateway.log"
        (folder / "keys.toml").write_text(KEYS)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "--processes", str(NUM_PROCESSES), "--listen", self.address,
                 "--http-listen", f"127.0.0.1:{http_port}", "--directory", directory, "--routing", "least-loaded",
                 "--api-keys", str(folder / "keys.toml")],
                stdout=log, stderr=log,
            )  # fmt: skip

    def client(self) -> Client:
        """With a connection of its own, so that the kernel deals it out anew."""
        return Client(self.address, api_key="key", max_attempts=1)

    def said(self, event: str) -> int:
        return self.log.read_text().count(f'"event": "{event}"')

    def children(self) -> list[int]:
        """By number, the newest of each."""
        found = re.findall(r'"process": (\d+), "pid": (\d+), "event": "process_started"', self.log.read_text())
        return [pid for _, pid in sorted({int(number): int(pid) for number, pid in found}.items())]

    def status_of_a_completion(self) -> int:
        """Over HTTP: gRPC's channels of one process share a connection, and so a gateway process."""
        body = b'{"model": "smollm2-135m-instruct", "prompt": "a", "max_tokens": 1}'
        request = urllib.request.Request(f"{self.http}/v1/completions", body)
        request.add_header("authorization", "Bearer key")
        request.add_header("content-type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.http}/metrics", timeout=10) as answer:
            found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0


def wait_until(holds: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < until_s, what
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def gateway(cluster: Running, tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(cluster.local.address("directory"), tmp_path)
    try:
        wait_until(lambda: gateway.said("ready") == NUM_PROCESSES, "both processes listen")
        yield gateway
    finally:
        with contextlib.suppress(ProcessLookupError):
            gateway.process.kill()
        gateway.process.wait()


def test_several_processes_are_one_gateway(gateway: Gateway) -> None:
    answered: dict[str, tuple[int, ...]] = {}

    def ask() -> None:
        with gateway.client() as client:
            answer = client.generate([1000, 1001, 1002], max_tokens=2, temperature=0).result()
            answered[answer.request_id] = answer.token_ids

    def both_have_answered() -> bool:
        ask()
        numbers = set(re.findall(r'"event": "route".*"service": "gateway-(\d)"', gateway.log.read_text()))
        return len(numbers) == NUM_PROCESSES

    wait_until(both_have_answered, "the kernel deals connections out to both")
    assert len(set(answered.values())) == 1
    for request_id in answered:  # from whichever process the connection comes to
        with gateway.client() as client:
            assert client.explain_route(request_id)[0].options
            assert client.cluster().num_requests_total == len(answered)
    assert gateway.metric('kvferry_requests_total{outcome="completed"}') == len(answered)

    # One dies in the middle of an answer: the other's go on, and connections go to it until there is a successor.
    before = gateway.children()
    with gateway.client() as client:
        stream = client.generate([1000, 1001, 1002], max_tokens=60, temperature=0, ignore_eos=True)
        next(iter(stream))
        service = re.findall(r'"event": "route".*"service": "gateway-(\d)"', gateway.log.read_text())[-1]
        os.kill(before[1 - int(service)], signal.SIGKILL)
        assert len(stream.result().token_ids) == 60
    wait_until(lambda: gateway.said("ready") == NUM_PROCESSES + 1, "a successor listens")
    assert gateway.children()[int(service)] == before[int(service)]
    ask()
    # What the dead one had counted is not lost; nor is it in flight for ever.
    assert gateway.metric('kvferry_requests_total{outcome="completed"}') == len(answered) + 1
    assert gateway.metric("kvferry_requests_in_flight") == 0

    # The quota is one.
    with gateway.client() as client:
        stream = client.generate([1000, 1001, 1002], max_tokens=4000, temperature=0, ignore_eos=True)
        next(iter(stream))

        def both_have_refused() -> bool:
            assert gateway.status_of_a_completion() == 429
            refusals = re.findall(r'"event": "request_failed".*"service": "gateway-(\d)"', gateway.log.read_text())
            return len(set(refusals)) == NUM_PROCESSES

        wait_until(both_have_refused, "the kernel deals connections out to both")
        stream.close()

    # SIGINT, as a terminal's Ctrl-C: answers end first.
    children = gateway.children()
    gateway.process.send_signal(signal.SIGINT)
    assert gateway.process.wait(40) == 0
    assert not any(map(is_alive, children))
    assert gateway.said("process_ended") == 1
