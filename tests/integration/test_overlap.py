"""Blocks travel while the next chunk is computed: only the last chunk's write is exposed."""

from __future__ import annotations

import random

import grpc

from kvferry import Client
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.decode_calls import DecodeCall
from tests.integration.conftest import Running

NUM_TOKENS = 512  # eight chunks of this cluster's 64 tokens


def fresh_prompt(num_tokens: int) -> list[int]:
    """Tokens that no cache has seen."""
    return [random.randrange(1000, 40000) for _ in range(num_tokens)]


def test_every_chunk_but_the_last_is_written_while_the_prompt_is_computed(cluster: Running, client: Client) -> None:
    answer = client.generate(fresh_prompt(NUM_TOKENS), max_tokens=4, temperature=0, ignore_eos=True).result()
    transfer, decode = answer.timeline.transfer, answer.timeline.decode
    assert transfer is not None
    assert decode is not None
    assert [chunk.num_blocks for chunk in transfer.chunks] == [4] * 8
    computed_s = transfer.chunks[-1].compute_end_s
    for chunk in transfer.chunks[:-1]:
        assert chunk.write_begin_s is not None
        assert chunk.write_end_s is not None
        assert chunk.compute_end_s <= chunk.write_begin_s < chunk.write_end_s < computed_s
    assert transfer.num_hidden_bytes == transfer.num_bytes * 7 // 8
    last_s = transfer.chunks[-1].write_end_s
    assert last_s is not None
    assert transfer.exposed_s >= last_s - computed_s > 0, "the last chunk's blocks can only follow its compute"
    assert decode.first_step_s is not None
    assert answer.timeline.handover_s == transfer.exposed_s + decode.first_step_s
    assert answer.timeline.ticket_s is not None
    assert 0 < answer.timeline.opened_s < answer.timeline.ticket_s < answer.timeline.ttft_s


async def split(cluster: Running, prompt: list[int], decode_salt: bytes, prefill_salt: bytes) -> worker_pb2.Committed:
    """A split request in a gateway's place: with salts of their own the two workers' caches hold different prompts."""
    sampling = common_pb2.SamplingParams(max_tokens=2, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True)
    writer = cluster.info("prefill-0")
    async with (
        grpc.aio.insecure_channel(cluster.local.address("prefill-0")) as to_prefill,
        grpc.aio.insecure_channel(cluster.local.address("decode-0")) as to_decode,
    ):
        decode = DecodeCall(
            to_decode,
            worker_pb2.DecodeOpen(
                request_id="overlap",
                prompt_token_ids=prompt,
                sampling=sampling,
                cache_salt=decode_salt,
                writer=worker_pb2.Writer(
                    worker_id=writer.worker_id,
                    incarnation=writer.incarnation,
                    control_address=writer.control_address,
                    process=writer.process,
                ),
            ),
            60,
        )
        ticket = (await decode.next()).ticket
        prefill = worker_pb2_grpc.PrefillServiceStub(to_prefill).Prefill(
            worker_pb2.PrefillRequest(
                request_id="overlap",
                prompt_token_ids=prompt,
                sampling=sampling,
                ticket=ticket,
                cache_salt=prefill_salt,
            ),
            timeout=60,
        )
        *_, last = [response async for response in prefill]
        assert [event async for event in decode][-1].HasField("finished")
        return last.committed


async def test_what_the_writer_has_cached_travels_while_it_computes_the_rest(cluster: Running) -> None:
    prompt = fresh_prompt(NUM_TOKENS)
    await split(cluster, prompt, b"first", b"same")
    again = await split(cluster, prompt, b"second", b"same")
    assert again.prefill.num_cached_tokens == NUM_TOKENS - 16, "the last block is computed, to draw from"
    (chunk,) = again.transfer.chunks
    assert chunk.num_blocks == again.transfer.num_blocks == NUM_TOKENS // 16
    assert chunk.write_begin_us < chunk.compute_end_us
    assert again.transfer.num_hidden_bytes == again.transfer.num_bytes // 32 * 31
