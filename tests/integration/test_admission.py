"""Pools so small that transfers, growing answers and prompts must take turns."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from kvferry import AsyncClient, OverloadedError
from tests.integration.conftest import ENVIRONMENT, Running, started

NUM_REQUESTS = 10
PROMPT_TOKENS = (16, 80)
ANSWER_TOKENS = (24, 40)
# About a quarter of what all would hold at their ends, and hardly more than the longest two.
KV_MEMORY = "12MiB"
# Of each gateway: the rest is refused.
MAX_REQUESTS = "4"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two gateways, so that neither knows what the other has sent; as many prompts stay with the decode worker as are
    shipped."""
    environment = {**ENVIRONMENT, "KVFERRY_MIN_SHIP_TOKENS": "64", "KVFERRY_MAX_REQUESTS": MAX_REQUESTS}
    with started(tmp_path_factory.mktemp("tiny"), environment, kv_memory=KV_MEMORY, num_gateways=2) as running:
        addresses = running.address
        for address in addresses.split(","):
            running.local.grpc_address = address
            running.wait_routable()
        running.local.grpc_address = addresses
        yield running


def asked() -> list[tuple[list[int], int]]:
    drawn = random.Random(34)
    return [
        ([drawn.randrange(1000, 40000) for _ in range(drawn.randint(*PROMPT_TOKENS))], drawn.randint(*ANSWER_TOKENS))
        for _ in range(NUM_REQUESTS)
    ]


async def answers(addresses: list[str], asks: list[tuple[list[int], int]]) -> list[list[int] | OverloadedError]:
    """All at once, in turn by each gateway."""

    async def one(client: AsyncClient, prompt: list[int], num_tokens: int) -> list[int] | OverloadedError:
        stream = client.generate(prompt, max_tokens=num_tokens, temperature=0, ignore_eos=True, timeout=60)
        try:
            return list((await stream.result()).token_ids)
        except OverloadedError as error:
            return error

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(address, max_attempts=1)) for address in addresses]
        return list(await asyncio.gather(*(one(clients[i % len(clients)], *ask) for i, ask in enumerate(asks))))


async def test_admission_blind_to_what_is_coming(cluster: Running, tiny: Running) -> None:
    """Answers that were not refused at once are those of a cluster with room for all of them."""
    asks = asked()
    total = tiny.stats("decode-0").state.load.blocks.total
    assert total <= 32, "the pool is tiny"
    undisturbed = await answers([cluster.address], asks)
    assert [len(answer) for answer in undisturbed if isinstance(answer, list)] == [length for _, length in asks]
    found = await answers(tiny.address.split(","), asks)
    refused = [answer for answer in found if isinstance(answer, OverloadedError)]
    assert all(error.retry_after_s for error in refused)
    assert len(refused) <= NUM_REQUESTS - 2, "what fits is served"
    assert all(answer == undisturbed[i] for i, answer in enumerate(found) if isinstance(answer, list))
    for name in ("prefill-0", "decode-0"):
        tiny.wait_until(lambda name=name: tiny.is_quiet(name), 10, f"{name} is quiet")  # type: ignore[misc]
    load = tiny.stats("decode-0").state.load
    assert load.num_growth_blocks == 0
    assert load.num_expected_answer_tokens >= ANSWER_TOKENS[0] // 2, (
        "learnt from the answers, those that were cut short too"
    )
