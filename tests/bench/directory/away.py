"""The directory is stopped for half a minute while requests with shared prefixes come in: real model, two decode workers.

Prompts begin with one of some texts of a few hundred tokens, each of which is replaced by a new one now and then, so that
a view that grows old knows less and less of what the workers hold.  The share of prompt tokens that no worker had to
compute is taken before, meanwhile, and once the directory has been back for ten seconds."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from kvferry import AsyncClient, Error
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig, clone_root, plan
from tests.bench.directory.processes import LOGS
from tests.bench.transport.rows import Row, more_is_better, within

WARM_S, BEFORE_S, BACK_S, AFTER_S = 15.0, 20.0, 10.0, 20.0
NUM_CLIENTS = 2
NUM_TEXTS = 6
REPLACED_EVERY = 12
WORDS = ("river", "stone", "letter", "window", "garden", "engine", "silver", "paper", "winter", "copper")
ANSWERED_GOAL, HIT_GOAL = 1.0, 0.95


@dataclass(frozen=True, slots=True)
class Asked:
    at_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    error: str


def measured(away_s: float, *, hang: bool) -> tuple[list[Row], list[str]]:
    with _cluster() as cluster:
        asked, stopped_s, back_s, heard_s = asyncio.run(_drive(cluster, away_s, hang=hang))
    failed = [one for one in asked if one.error]
    spans = {
        "before": (stopped_s - BEFORE_S, stopped_s),
        "while away": (stopped_s, back_s),
        "in the first 10 s after": (back_s, back_s + BACK_S),
        "from 10 s after on": (back_s + BACK_S, float("inf")),
    }
    rates = {name: _hit_rate([a for a in asked if since <= a.at_s < until]) for name, (since, until) in spans.items()}
    what = f"directory {'hung' if hang else 'away'} for {away_s:g} s"
    rows = [
        more_is_better(f"{what}: requests answered / asked",
                       [float(len(asked) - len(failed))], [float(len(asked))], ANSWERED_GOAL, "requests"),
        more_is_better(f"{what}: hit rate 10 s after its return / before",
                       [rates["from 10 s after on"]], [rates["before"]], HIT_GOAL, ""),
        within(f"{what}: return until the view is fresh / allowed", [heard_s], BACK_S, "s"),
    ]  # fmt: skip
    said = [
        f"{len(asked)} requests, {len(failed)} failed; hit rates: "
        + ", ".join(f"{rate:.3f} {name}" for name, rate in rates.items())
    ]
    said += sorted({one.error for one in failed})
    return rows, said


@contextmanager
def _cluster() -> Iterator[LocalCluster]:
    config = ClusterConfig(grpc_port=0, http_port=0, num_prefill=0, num_decode=2, threads=1, kv_memory="512MiB")
    planned = plan(config, clone_root())
    with LocalCluster(
        planned.members, LOGS / "away", grpc_address=planned.grpc_address, http_url=planned.http_url
    ) as cluster:
        yield cluster


async def _drive(cluster: LocalCluster, away_s: float, *, hang: bool) -> tuple[list[Asked], float, float, float]:
    """What was asked, when the directory was stopped and when it was back, and how long after that the view was fresh."""
    asked: list[Asked] = []
    async with AsyncClient(cluster.grpc_address, max_attempts=1) as client:
        clients = [asyncio.create_task(_ask(client, number, asked)) for number in range(NUM_CLIENTS)]
        await asyncio.sleep(WARM_S + BEFORE_S)
        stopped_s = time.monotonic()
        if hang:
            cluster.kill("directory", signal.SIGSTOP)
            await asyncio.sleep(away_s)
            cluster.kill("directory", signal.SIGCONT)
        else:
            # It is started again at once, and so killed again and again.
            while time.monotonic() < stopped_s + away_s:
                cluster.kill("directory")
                await asyncio.sleep(0.2)
            await asyncio.to_thread(cluster.wait_ready, "directory", 60)
        back_s = time.monotonic()
        while (await client.cluster()).view_age_s > 2.5:  # noqa: ASYNC110  the gateway tells nobody by itself
            await asyncio.sleep(0.1)
        heard_s = time.monotonic() - back_s
        await asyncio.sleep(max(0.0, back_s + BACK_S + AFTER_S - time.monotonic()))
        for task in clients:
            task.cancel()
        for ended in await asyncio.gather(*clients, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
    return asked, stopped_s, back_s, heard_s


async def _ask(client: AsyncClient, number: int, asked: list[Asked]) -> None:
    rng = random.Random(number)
    texts = [_text(rng) for _ in range(NUM_TEXTS)]
    for turn in count(1):
        if turn % REPLACED_EVERY == 0:
            texts[rng.randrange(NUM_TEXTS)] = _text(rng)
        prompt = f"{rng.choice(texts)} And {turn} of {number}?"
        at_s = time.monotonic()
        try:
            answer = await client.generate(prompt, max_tokens=4, temperature=0, ignore_eos=True, timeout=60).result()
        except Error as error:
            asked.append(Asked(at_s, 0, 0, str(error)))
            continue
        asked.append(Asked(at_s, answer.usage.num_prompt_tokens, answer.usage.num_cached_tokens, ""))


def _text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(250))


def _hit_rate(asked: Sequence[Asked]) -> float:
    return sum(one.num_cached_tokens for one in asked) / max(1, sum(one.num_prompt_tokens for one in asked))
