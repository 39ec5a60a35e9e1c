"""A pool so small that transfers, growing answers and prompts must take turns."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from kvferry import AsyncClient, OverloadedError
from tests.integration.conftest import ENVIRONMENT, Running, started

NUM_REQUESTS = 10
PROMPT_TOKENS = (16, 80)
ANSWER_TOKENS = (24, 40)
MIN_SHIP_TOKENS = 40
# About a third of what all would hold at their ends, and hardly more than the longest two.
KV_MEMORY = "12MiB"
MOST_TURNS = 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Some prompts are computed by the decode worker, most are shipped: for these it must have the blocks at once, or it
    refuses them."""
    environment = {**ENVIRONMENT, "KVFERRY_MIN_SHIP_TOKENS": f"{MIN_SHIP_TOKENS}"}
    with started(tmp_path_factory.mktemp("tiny"), environment, kv_memory=KV_MEMORY) as running:
        running.wait_routable()
        yield running


def asked() -> list[tuple[list[int], int]]:
    drawn = random.Random(34)
    return [
        ([drawn.randrange(1000, 40000) for _ in range(drawn.randint(*PROMPT_TOKENS))], drawn.randint(*ANSWER_TOKENS))
        for _ in range(NUM_REQUESTS)
    ]


async def answers(address: str, asks: list[tuple[list[int], int]]) -> list[list[int] | OverloadedError]:
    """All at once."""

    async def one(client: AsyncClient, prompt: list[int], num_tokens: int) -> list[int] | OverloadedError:
        stream = client.generate(prompt, max_tokens=num_tokens, temperature=0, ignore_eos=True, timeout=60)
        try:
            return list((await stream.result()).token_ids)
        except OverloadedError as error:
            return error

    async with AsyncClient(address, max_attempts=1) as client:
        return list(await asyncio.gather(*(one(client, *ask) for ask in asks)))


async def hear_growth(running: Running, heard: list[int]) -> None:
    """Until cancelled: whatever the gateway hears to be coming."""
    while True:
        view = await asyncio.to_thread(running.cluster_view)
        heard += [count for worker in view.workers if (count := worker.load.num_growth_blocks)]
        await asyncio.sleep(0.05)


async def test_admission_blind_to_what_is_coming(cluster: Running, tiny: Running) -> None:
    """Whoever does not fit beside what others have been promised and may yet take waits in the gateway and is answered, as
    by a cluster with room for all.  A gateway that counts only what is taken sends more than the pool can hold, and the
    worker refuses what is shipped to it."""
    asks = asked()
    num_shipped = sum(len(prompt) >= MIN_SHIP_TOKENS for prompt, _ in asks)
    total = tiny.stats("decode-0").state.load.blocks.total
    assert num_shipped >= 5
    assert total <= 20, "the pool is tiny"
    undisturbed = await answers(cluster.address, asks)
    assert [len(answer) for answer in undisturbed if isinstance(answer, list)] == [length for _, length in asks]
    heard: list[int] = []
    hearing = asyncio.create_task(hear_growth(tiny, heard))
    for _ in range(MOST_TURNS):
        found = await answers(tiny.address, asks)
        refused = [answer for answer in found if isinstance(answer, OverloadedError)]
        assert all(error.retry_after_s for error in refused)
        assert len(refused) <= 2, "what the worker has not yet told the gateway may cost one"
        assert all(answer == undisturbed[i] for i, answer in enumerate(found) if isinstance(answer, list))
        if heard:  # a worker may have answered all between two reports
            break
    hearing.cancel()
    assert heard
    assert max(heard) <= total
    for name in ("prefill-0", "decode-0"):
        tiny.wait_until(lambda name=name: tiny.is_quiet(name), 10, f"{name} is quiet")  # type: ignore[misc]
    load = tiny.stats("decode-0").state.load
    assert load.num_growth_blocks == 0
    assert load.num_expected_answer_tokens >= ANSWER_TOKENS[0] // 2, (
        "learnt from the answers, those that were cut short too"
    )
