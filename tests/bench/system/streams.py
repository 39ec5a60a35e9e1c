"""All streams of a mix at once through a gateway, by a client that costs little: responses are counted, not parsed."""

from __future__ import annotations

import asyncio
import time

import grpc

from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2
from tests.bench.system.mix import Ask

GENERATE = "/kvferry.api.inference.v1.InferenceService/Generate"


def to_request(ask: Ask) -> bytes:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=ask.prompt),
        sampling=common_pb2.SamplingParams(
            max_tokens=ask.num_answer, temperature=ask.temperature, seed=ask.seed, ignore_eos=True
        ),
    ).SerializeToString()


async def run(address: str, asks: list[Ask], timeout_s: float = 600) -> float:
    """Seconds from the first prompt to the last response.  Raises grpc.RpcError, and RuntimeError for an answer that is
    shorter than it was asked for."""
    requests = [to_request(ask) for ask in asks]
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        method = channel.unary_stream(GENERATE)

        async def drain(request: bytes) -> bytes:
            last = b""
            async for response in method(request, timeout=timeout_s):
                last = response
            return last

        began = time.perf_counter()
        lasts = await asyncio.gather(*map(drain, requests))
        seconds = time.perf_counter() - began
    for ask, last in zip(asks, lasts, strict=True):
        num_output = inference_pb2.GenerateResponse.FromString(last).finished.usage.num_output_tokens
        if num_output != ask.num_answer:
            raise RuntimeError(f"an answer of {ask.num_answer} tokens came with {num_output}")
    return seconds
