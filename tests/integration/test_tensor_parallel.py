"""Workers of several ranks: the answers of one process, whichever side has how many, and a rank's end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvferry import AsyncClient, Client, Completion
from services.engine.sampler import draw
from services.engine.sampling_params import Drawn, Sample, Sampling
from tests.integration.conftest import ENVIRONMENT, Running, started
from tests.tiny_model import save_tiny_model

PROMPTS = ["The", "def fibonacci(n):\n    ", "It was a bright cold day in April, and the clocks were striking. " * 3]
# With this seed no draw changes when all logits do by 2e-5: ranks have sums in orders of their own.
SAMPLINGS = [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=31)]
NUM_TOKENS = 24
TOKEN_NBYTES = 3 * 2 * 3 * 32 * 4


@dataclass(frozen=True, slots=True)
class Ranked:
    cluster: Running
    logs: Path
    reference: Any


@pytest.fixture(scope="module", params=[(2, 1), (1, 2), (1, 3)], ids=["2 to 1", "1 to 2", "1 to 3"])
def ranked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranked]:
    model, logs = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("logs")
    save_tiny_model(model)
    prefill_tp, decode_tp = request.param
    environment = {**ENVIRONMENT, "KVFERRY_VERIFY_TRANSFERS": "all"}
    with started(
        logs, environment, model=str(model), prefill_tp=prefill_tp, decode_tp=decode_tp, kv_memory="16MiB"
    ) as running:
        running.wait_routable()
        yield Ranked(running, logs, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
        running.assert_settles(10.0)


async def ask(address: str) -> list[tuple[Sampling, tuple[int, ...], Completion]]:
    """All at once."""
    async with AsyncClient(address) as client:
        asked = [(sampling, await client.tokenize(prompt), prompt) for sampling in SAMPLINGS for prompt in PROMPTS]
        answers = await asyncio.gather(*(
            client.generate(
                prompt, max_tokens=NUM_TOKENS, ignore_eos=True,
                temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed,
            ).result()
            for sampling, _, prompt in asked
        ))  # fmt: skip
    return [(sampling, prompt, answer) for (sampling, prompt, _), answer in zip(asked, answers, strict=True)]


def drawn(reference: Any, prompt: tuple[int, ...], output: tuple[int, ...], sampling: Sampling) -> tuple[int, ...]:
    """What would be drawn from transformers' logits at each place of the output."""
    with torch.inference_mode():
        logits = reference(torch.tensor([[*prompt, *output[:-1]]])).logits[0, len(prompt) - 1 :].numpy()
    samples = [Sample(row, sampling, len(prompt) + row) for row in range(len(output))]
    tokens = draw(np.ascontiguousarray(logits), samples)
    assert all(isinstance(token, Drawn) for token in tokens)
    return tuple(token.token_id for token in tokens if isinstance(token, Drawn))


def test_answers_are_those_of_one_process(ranked: Ranked) -> None:
    cluster = ranked.cluster
    before = cluster.stats("prefill-0"), cluster.stats("decode-0")
    answers = asyncio.run(ask(cluster.address))
    for sampling, prompt, answer in answers:
        assert (answer.timeline.prefill_worker, answer.timeline.num_retries) == ("prefill-0", 0)
        assert len(answer.token_ids) == NUM_TOKENS
        assert answer.token_ids == drawn(ranked.reference, prompt, answer.token_ids, sampling)
    after = cluster.stats("prefill-0"), cluster.stats("decode-0")
    written = after[0].num_bytes_written - before[0].num_bytes_written
    assert written == after[1].num_bytes_received - before[1].num_bytes_received > 0
    assert written % TOKEN_NBYTES == 0
    assert after[1].num_prefill_tokens == before[1].num_prefill_tokens, "the decode worker computed no prompt"


def test_a_worker_ends_with_its_rank_and_is_started_again(ranked: Ranked) -> None:
    cluster = ranked.cluster
    name = next(name for name in ("prefill-0", "decode-0") if cluster.info(name).layout.num_ranks > 1)
    pid, incarnation = cluster.info(name).process.pid, cluster.info(name).incarnation
    ranks = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    assert len(ranks) == cluster.info(name).layout.num_ranks - 1
    os.kill(int(ranks[0]), signal.SIGKILL)

    def is_back() -> bool:
        seen = {w.info.worker_id: w.info.incarnation for w in cluster.cluster_view().workers}
        return seen.get(name, incarnation) != incarnation

    cluster.wait_until(is_back, 120, f"{name} is back")
    assert "ended by signal 9; the worker cannot go on without it" in (ranked.logs / f"{name}.log").read_text()
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    with Client(cluster.address) as client:
        prompt = client.tokenize(PROMPTS[1])
        answer = client.generate(PROMPTS[1], max_tokens=8, temperature=0, ignore_eos=True).result()
    assert answer.timeline.prefill_worker == "prefill-0"
    assert answer.token_ids == drawn(ranked.reference, prompt, answer.token_ids, Sampling())
