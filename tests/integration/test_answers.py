"""Split over two processes or on one worker alone: the tokens that transformers computes, one by one."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from kvferry import Client, Completion
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from services.engine.model_files import ModelFiles
from tests.decode_calls import BlockingDecodeCall
from tests.integration.answers import CHATS, NUM_TOKENS, RAW, lone_answers, one_by_one, split_answers
from tests.integration.conftest import Running
from tests.integration.reference import Reference


@pytest.fixture(scope="module")
def split(running: Running) -> list[Completion]:
    """All at once: batching and chunking are part of what is tested."""
    running.wait_routable()
    return asyncio.run(split_answers(running.address))


@pytest.fixture(scope="module")
def prompts(running: Running) -> list[tuple[int, ...]]:
    with Client(running.address) as client:
        return [client.tokenize(text) for text in RAW] + [client.tokenize(chat) for chat in CHATS]


@pytest.fixture(scope="module")
def alone(running: Running, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    return asyncio.run(lone_answers(running.local.address("decode-0"), prompts))


@pytest.mark.parametrize("number", range(len(RAW) + len(CHATS)))
def test_split_equals_alone_equals_transformers(
    split: list[Completion],
    alone: list[list[int]],
    prompts: list[tuple[int, ...]],
    greedy: Reference,
    smollm2: ModelFiles,
    number: int,
) -> None:
    answer = split[number]
    assert answer.timeline.prefill_worker == "prefill-0"
    assert answer.timeline.transfer is not None
    assert answer.timeline.transfer.num_blocks > 0
    assert len(answer.token_ids) == NUM_TOKENS
    assert answer.text == smollm2.tokenizer.decode(answer.token_ids)
    assert greedy.continuation_is_greedy(prompts[number], answer.token_ids)
    assert alone[number] == list(answer.token_ids)


def test_split_equals_alone_one_by_one(cluster: Running) -> None:
    """As tests/gpu asks it, where the numbers are rounded."""
    for answer, alone in one_by_one(cluster.address, cluster.local.address("decode-0"), RAW[4:6]):
        assert answer.timeline.prefill_worker == "prefill-0"
        assert list(answer.token_ids) == alone


def test_the_reference_decodes_by_itself_to_the_same(client: Client, greedy: Reference) -> None:
    """The comparison above asks transformers about our tokens; here it finds its own."""
    text = RAW[4]
    answer = client.generate(text, max_tokens=24, temperature=0, ignore_eos=True).result()
    prompt = list(client.tokenize(text))
    expected = greedy.generate(prompt, 24)
    assert list(answer.token_ids[: len(expected)]) == expected
    assert not greedy.continuation_is_greedy(prompt, [*expected[:-1], (expected[-1] + 1) % 1000])


def test_prompts_span_blocks_and_chunks(prompts: list[tuple[int, ...]]) -> None:
    """The list above is as varied as it claims to be."""
    lengths = [len(prompt) for prompt in prompts]
    assert min(lengths) == 1
    assert sum(length > 16 for length in lengths) > 10, "several blocks"
    assert sum(length > 64 for length in lengths) >= 4, "longer than a chunk"
    assert max(lengths) > 3 * 64


def test_seeded_sampling_is_the_same_split_and_alone(cluster: Running, client: Client) -> None:
    text = "Write a poem about the sea:"
    options = {"max_tokens": 40, "temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 1234}
    first = client.generate(text, **options).result()
    assert first.timeline.prefill_worker == "prefill-0"
    again = client.generate(text, **options).result()  # partly from the prefix cache
    assert again.token_ids == first.token_ids
    other = client.generate(text, **{**options, "seed": 4321}).result()
    assert other.token_ids != first.token_ids
    request = worker_pb2.DecodeOpen(
        request_id="alone",
        prompt_token_ids=client.tokenize(text),
        sampling=common_pb2.SamplingParams(max_tokens=40, temperature=0.9, top_p=0.95, top_k=50, seed=1234),
        cache_salt=b"alone",
    )
    with grpc.insecure_channel(cluster.local.address("decode-0")) as channel:
        events = BlockingDecodeCall(channel, request, 120)
        assert [event.token.id for event in events if event.HasField("token")] == list(first.token_ids)


def test_a_repeated_prompt_comes_from_the_prefix_cache(client: Client) -> None:
    text = "A prompt that nobody else in these tests has sent. " * 10
    first = client.generate(text, max_tokens=8, temperature=0).result()
    again = client.generate(text, max_tokens=8, temperature=0).result()
    assert again.token_ids == first.token_ids
    assert first.usage.num_cached_tokens == 0
    assert again.usage.num_cached_tokens > 64
    assert again.timeline.transfer.num_blocks < first.timeline.transfer.num_blocks


def test_logprobs_stop_strings_and_reasons(client: Client) -> None:
    answer = client.generate("Count: 1, 2, 3, 4,", max_tokens=30, temperature=0, logprobs=3, stop=[" 9"]).result()
    assert answer.text.endswith("8,")
    assert answer.finish_reason.name == "STOP"
    for token in (t for t in answer.tokens):
        assert token.logprob is not None
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token_id == token.id, "greedy takes the likeliest"
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
    assert client.generate("Count:", max_tokens=3, temperature=0).result().finish_reason.name == "LENGTH"
