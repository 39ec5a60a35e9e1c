"""A real cluster, whose gateway has a prefix pulled from a worker that is too busy to serve it itself."""

from __future__ import annotations

import random
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grpc
import pytest

from kvferry import Client
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2
from tests.decode_calls import BlockingDecodeCall
from tests.integration.conftest import Running, started

NUM_STREAMS = 6
PREFIX, MORE = 640, 40


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with started(tmp_path_factory.mktemp("logs"), {}, num_prefill=0, num_decode=2, dtype="int8") as running:
        running.wait_until(lambda: len(running.cluster_view().workers) == 2, 30, "both workers are seen")
        yield running


def load(running: Running, name: str) -> directory_pb2.WorkerLoad:
    return next(w.load for w in running.cluster_view().workers if w.info.worker_id == name)


@contextmanager
def kept_busy(address: str) -> Iterator[None]:
    """Answers long requests, which are cancelled in the end."""
    sampling = common_pb2.SamplingParams(max_tokens=1500, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True)
    with grpc.insecure_channel(address) as channel, ExitStack() as stack:
        for number in range(NUM_STREAMS):
            request = worker_pb2.DecodeOpen(request_id=f"busy-{number}", prompt_token_ids=[5], sampling=sampling)
            call = BlockingDecodeCall(channel, request, 120)
            stack.callback(call.cancel)
            next(call)
        yield


def computed(address: str, prompt: list[int]) -> list[int]:
    """The answer of a worker that finds none of it in its cache."""
    sampling = common_pb2.SamplingParams(max_tokens=16, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True)
    request = worker_pb2.DecodeOpen(
        request_id="anew", prompt_token_ids=prompt, sampling=sampling, cache_salt=secrets.token_bytes(8)
    )
    with grpc.insecure_channel(address) as channel:
        return [event.token.id for event in BlockingDecodeCall(channel, request, 60) if event.HasField("token")]


def test_the_gateway_has_a_prefix_pulled_and_explains_it(running: Running) -> None:
    prefix = [random.randrange(1000, 40000) for _ in range(PREFIX)]
    prompt = prefix + [random.randrange(1000, 40000) for _ in range(MORE)]
    with Client(running.address) as client:
        first = client.generate(prefix, max_tokens=2, temperature=0, ignore_eos=True).result().timeline
        holder = first.decode_worker
        other = {"decode-0": "decode-1", "decode-1": "decode-0"}[holder]
        running.wait_until(lambda: load(running, holder).blocks.cached >= PREFIX // 16, 20, "the prefix is cached")
        with kept_busy(running.local.address(holder)):
            running.wait_until(lambda: load(running, holder).num_running >= NUM_STREAMS, 20, "the holder is busy")
            pulled = client.generate(prompt, max_tokens=16, temperature=0, ignore_eos=True).result()
        (decision,) = client.explain_route(pulled.request_id)
        chosen = decision.options[0]
        assert (chosen.decode_worker, chosen.pull_worker, chosen.num_pulled_tokens) == (other, holder, PREFIX)
        assert f"pulls {PREFIX // 16} blocks from {holder}" in decision.reason
        assert pulled.timeline.decode_worker == other
        assert pulled.timeline.route_reason == decision.reason
        assert pulled.timeline.prefill is not None
        pull = pulled.timeline.prefill.pull
        assert pull is not None
        assert pull.holder == holder
        assert pull.outcome in ("pulled", "late"), "no longer than computing it was predicted to take"
        if pull.outcome == "pulled":
            assert pulled.usage.num_cached_tokens == PREFIX
            running.wait_until(lambda: load(running, other).pull_bytes_per_s > 0, 20, "what it took is reported")
    assert computed(running.local.address(holder), prompt) == list(pulled.token_ids)
    for name in (holder, other):
        running.wait_until(lambda name=name: running.is_quiet(name), 10, f"{name} is quiet")  # type: ignore[misc]
    command = [sys.executable, "-m", "kvferry.cli", "explain", pulled.request_id, "--address", running.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert f"from {holder}" in done.stdout
