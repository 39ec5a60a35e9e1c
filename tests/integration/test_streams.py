"""Many at once, and streams that end early."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
import urllib.request

import pytest

from kvferry import AsyncClient, Client
from tests.integration.conftest import Running
from tests.integration.reference import Reference

LONG = "This sentence is one of very many that make the prompt long. " * 200


async def test_sixteen_streams_of_random_lengths(cluster: Running, client: Client, greedy: Reference) -> None:
    rng = random.Random(16)
    words = ["ship", "port", "sea", "wind", "sail", "crew", "rope", "mast", "tide", "star", "harbour", "cargo"]
    prompts = [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 120))) for i in range(16)]
    lengths = [rng.randint(1, 48) for _ in prompts]
    async with AsyncClient(cluster.address) as many:

        async def one(prompt: str, length: int) -> list[int]:
            result = await many.generate(prompt, max_tokens=length, temperature=0, ignore_eos=True).result()
            assert [t.index for t in result.tokens] == list(range(length)), "every token once, in order"
            return list(result.token_ids)

        answers = await asyncio.gather(*map(one, prompts, lengths))
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        assert len(answer) == length
        assert greedy.continuation_is_greedy(client.tokenize(prompt), answer), prompt
    cluster.assert_settles()
    for name in ("prefill-0", "decode-0"):
        stats = cluster.stats(name)
        assert stats.integrity_ok
        assert stats.state.load.blocks.free == stats.state.load.blocks.total - stats.state.load.blocks.cached


def compute_stops(cluster: Running) -> None:
    """No more tokens are computed once everything has settled."""
    cluster.assert_settles()

    def tokens() -> list[tuple[int, int]]:
        stats = [cluster.stats(name) for name in ("prefill-0", "decode-0")]
        return [(s.num_prefill_tokens, s.num_decode_tokens) for s in stats]

    before = tokens()
    time.sleep(0.4)
    assert tokens() == before


def test_cancelling_while_it_decodes(cluster: Running, client: Client) -> None:
    before = cluster.stats("decode-0").num_decode_tokens
    with client.generate("Tell me a very long story.", max_tokens=2000, temperature=0, ignore_eos=True) as stream:
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
        assert cluster.stats("decode-0").state.load.num_running == 1
    compute_stops(cluster)
    assert cluster.stats("decode-0").num_decode_tokens < before + 1900


def test_cancelling_while_it_prefills(cluster: Running, client: Client) -> None:
    before = cluster.stats("prefill-0").num_prefill_tokens
    stream = client.generate("prefilling " + LONG, max_tokens=10, temperature=0)
    cluster.wait_until(lambda: cluster.stats("prefill-0").num_prefill_tokens > before, 30, "the prefill has begun")
    stream.close()
    compute_stops(cluster)
    assert cluster.stats("prefill-0").num_prefill_tokens - before < len(client.tokenize("prefilling " + LONG))


def test_cancelling_while_it_waits_in_line(cluster: Running, client: Client) -> None:
    before = cluster.stats("prefill-0").num_prefill_tokens
    first = client.generate("ahead in the queue " + LONG, max_tokens=10, temperature=0)
    cluster.wait_until(lambda: cluster.stats("prefill-0").num_prefill_tokens > before, 30, "the first has begun")
    second = client.generate("behind in the queue " + LONG, max_tokens=10, temperature=0)
    cluster.wait_until(lambda: num_in_line(cluster) == 1, 10, "the second waits")
    second.close()
    cluster.wait_until(lambda: num_in_line(cluster) == 0, 2, "it waits no more")
    load = cluster.stats("prefill-0").state.load
    assert load.num_running + load.num_waiting <= 1, "no worker has heard of it"
    first.close()
    compute_stops(cluster)


def num_in_line(cluster: Running) -> int:
    with urllib.request.urlopen(f"{cluster.http_url}/metrics", timeout=10) as page:
        [value] = [
            line.split()[1]
            for line in page.read().decode().splitlines()
            if line.startswith("kvferry_requests_in_line ")
        ]
    return int(float(value))


@pytest.mark.parametrize("stage", ["prefilling", "decoding"])
def test_a_client_that_hangs_up_on_http(cluster: Running, stage: str) -> None:
    prompt = f"http {stage} " + (LONG if stage == "prefilling" else "once")
    fields = {"model": "smollm2-135m-instruct", "prompt": prompt, "max_tokens": 900, "temperature": 0, "stream": True}
    body = json.dumps(fields).encode()
    host, port = cluster.http_url.removeprefix("http://").split(":")
    before = cluster.stats("prefill-0").num_prefill_tokens
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        if stage == "decoding":
            received = b""
            while b"data: " not in received:
                received += connection.recv(65536)
        else:
            cluster.wait_until(lambda: cluster.stats("prefill-0").num_prefill_tokens > before, 30, "it has begun")
    compute_stops(cluster)


def test_an_abandoned_iterator_is_cancelled_by_its_deadline(cluster: Running, client: Client) -> None:
    from kvferry import DeadlineError

    with pytest.raises(DeadlineError):
        client.generate("Forever and ever", max_tokens=3000, temperature=0, ignore_eos=True, timeout=1.5).result()
    compute_stops(cluster)


def test_a_thread_that_closes_another_threads_stream(cluster: Running, client: Client) -> None:
    stream = client.generate("A long tale", max_tokens=2000, temperature=0, ignore_eos=True)
    threading.Timer(0.7, stream.close).start()
    with pytest.raises(Exception, match=r"(?i)cancel|closed"):
        stream.result()
    compute_stops(cluster)
