"""Prompts of many kinds, and greedy answers to them: split over two workers, or from one alone."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from kvferry import AsyncClient, Client, Completion
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from tests.decode_calls import DecodeCall

NUM_TOKENS = 64

RAW = [
    "The",
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 5, 8, 13,",
    "The capital of France is Paris. The capital of Italy is",
    "Ünïcödé: naïve façade, Straße, Ελληνικά, русский, 中文字符, 日本語",
    "Emoji 🙂🚀👩‍👩‍👧‍👦 and then",
    "   leading spaces\tand\ttabs\n\n\nand newlines",
    "SELECT name, count(*) FROM users WHERE",
    '{"name": "kvferry", "tags": ["a", "b"], "nested": {"x": 1',
    "A" * 100,
    "word " * 16,
    "It was a bright cold day in April, and the clocks were striking thirteen. " * 4,
    " ".join(str(i * i) for i in range(60)),
    "Prefill is limited by compute, decode by memory bandwidth; so they want different machines. " * 12,
    "<|im_start|>user\nWritten out by hand<|im_end|>\n<|im_start|>assistant\n",
]
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "You answer in French."}, {"role": "user", "content": "Good morning! 你好"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another one, and explain at length why you chose it over all others. " * 10},
    ],
]


OPTIONS: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}


async def split_answers(address: str) -> list[Completion]:
    """All at once: batching and chunking are part of what is tested."""
    async with AsyncClient(address) as client:
        streams = [client.generate(text, **OPTIONS) for text in RAW] + [client.chat(c, **OPTIONS) for c in CHATS]
        return list(await asyncio.gather(*(stream.result() for stream in streams)))


async def lone_answers(address: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prefill and decode in one process, sharing no cache with other requests."""
    async with grpc.aio.insecure_channel(address) as channel:

        async def one(prompt: Sequence[int]) -> list[int]:
            request = worker_pb2.DecodeOpen(
                request_id="alone",
                prompt_token_ids=prompt,
                sampling=common_pb2.SamplingParams(
                    max_tokens=NUM_TOKENS, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True
                ),
                cache_salt=secrets.token_bytes(8),
            )
            events = [event async for event in DecodeCall(channel, request, 120)]
            assert events[-1].finished.decode.prefilled_locally
            return [event.token.id for event in events if event.HasField("token")]

        return list(await asyncio.gather(*map(one, prompts)))


def one_by_one(address: str, worker: str, texts: Sequence[str]) -> Iterator[tuple[Completion, list[int]]]:
    """Each answer split, from the cluster, and then from one worker of it alone, with nothing beside it: both are of the
    same steps, so that rounded numbers, too, give the same tokens."""
    with Client(address) as client:
        for text in texts:
            split = client.generate(text, **OPTIONS).result()
            (alone,) = asyncio.run(lone_answers(worker, [client.tokenize(text)]))
            yield split, alone
