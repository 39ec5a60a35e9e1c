"""Cached prefixes pulled from another worker: real processes, the real model, and holders that do not keep their word."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli import ports
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import Member, Role
from tests.decode_calls import BlockingDecodeCall
from tests.integration import granter
from tests.integration.granter import Granter, Manner, granting

ROOT = Path(__file__).parents[2]
BLOCK = 16
BLOCK_NBYTES = 30 * 2 * BLOCK * 3 * 64 * 2
NUM_BLOCKS = 256  # of which 64 may be pinned
NUM_TOKENS = 12
SETTLE_S = 10.0
names = (f"pull-{i}" for i in itertools.count())


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: list[int]
    prefill: common_pb2.PrefillStats


@dataclass(frozen=True, slots=True)
class Worker:
    member: Member
    channel: grpc.Channel

    def stats(self) -> worker_pb2.GetStatsResponse:
        stats = worker_pb2_grpc.WorkerServiceStub(self.channel).GetStats(worker_pb2.GetStatsRequest(), timeout=10)
        assert stats.integrity_ok
        return stats  # type: ignore[no-any-return]

    def source(self, num_blocks: int, within_ms: int = 0) -> worker_pb2.PullSource:
        info = self.stats().state.info
        return worker_pb2.PullSource(
            worker_id=info.worker_id, incarnation=info.incarnation, control_address=info.control_address,
            num_blocks=num_blocks, within_ms=within_ms,
        )  # fmt: skip

    def open(self, prompt: Sequence[int], pull: worker_pb2.PullSource | None = None, salt: bytes = b"") -> Any:
        sampling = common_pb2.SamplingParams(
            max_tokens=NUM_TOKENS, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True
        )
        request = worker_pb2.DecodeOpen(
            request_id=next(names), prompt_token_ids=prompt, sampling=sampling, pull=pull, cache_salt=salt
        )
        return BlockingDecodeCall(self.channel, request, 60)

    def answer(self, prompt: Sequence[int], pull: worker_pb2.PullSource | None = None, salt: bytes = b"") -> Answer:
        events = list(self.open(prompt, pull, salt))
        tokens = [event.token.id for event in events if event.HasField("token")]
        assert len(tokens) == NUM_TOKENS
        return Answer(tokens, events[-1].finished.prefill)

    def settle(self) -> None:
        """Nothing is held, lent or in quarantine."""
        began = time.monotonic()
        while True:
            load = self.stats().state.load
            if not (load.blocks.active or load.blocks.lent or load.blocks.quarantined or load.num_pins):
                return
            assert time.monotonic() - began < SETTLE_S, load
            time.sleep(0.02)

    def metric(self, name: str) -> float:
        assert self.member.metrics_url is not None
        with urllib.request.urlopen(self.member.metrics_url, timeout=10) as page:
            lines = str(page.read(), "utf-8").splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))


@dataclass(frozen=True, slots=True)
class Three:
    local: LocalCluster
    holder: Worker
    puller: Worker
    prefill: Worker


def _member(name: str, role: Role) -> Member:
    address, nobody, metrics = (ports.join(ports.LOOPBACK, port) for port in ports.pick_free(3, avoid=()))
    flags = {
        "--listen": address, "--directory": nobody, "--worker-id": name, "--threads": "1", "--dtype": "int8",
        "--kv-memory": str(NUM_BLOCKS * BLOCK_NBYTES), "--chunk-tokens": "64",
        "--metrics-port": metrics.rpartition(":")[2],
    }  # fmt: skip
    command = (sys.executable, "-m", f"services.{role.value}", *(part for flag in flags.items() for part in flag))
    return Member(name, role, command, address, f"http://{metrics}/metrics", cwd=ROOT)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    members = [_member("holder", Role.DECODE), _member("puller", Role.DECODE), _member("prefill", Role.PREFILL)]
    with LocalCluster(members, tmp_path_factory.mktemp("logs"), restart=False) as local:
        channels = [grpc.insecure_channel(member.health_address) for member in members]
        yield Three(local, *(Worker(m, c) for m, c in zip(members, channels, strict=True)))
        for channel in channels:
            channel.close()


@pytest.fixture
def workers(three: Three) -> Iterator[Three]:
    yield three
    for worker in (three.holder, three.puller, three.prefill):
        worker.settle()


def fresh_prompt(num_tokens: int) -> list[int]:
    return [random.randrange(1000, 40000) for _ in range(num_tokens)]


def test_a_prefix_is_pulled_and_the_answer_is_the_same(workers: Three) -> None:
    holder, puller = workers.holder, workers.puller
    prompt = fresh_prompt(260)
    expected = holder.answer(prompt)
    before = puller.stats()
    answer = puller.answer(prompt, holder.source(16))
    pull = answer.prefill.pull
    assert (pull.outcome, pull.holder, pull.num_blocks, pull.num_bytes) == ("pulled", "holder", 16, 16 * BLOCK_NBYTES)
    assert 0 < pull.busy_us <= pull.elapsed_us
    assert answer.prefill.num_cached_tokens == 16 * BLOCK
    assert answer.tokens == expected.tokens == puller.answer(prompt, salt=b"computes it anew").tokens
    after = puller.stats()
    assert after.num_blocks_pulled - before.num_blocks_pulled == 16
    assert after.num_bytes_pulled - before.num_bytes_pulled == 16 * BLOCK_NBYTES
    assert after.state.load.pull_bytes_per_s > 0
    assert after.state.load.pull_overhead_s > 0
    assert puller.metric('kvferry_pulls_total{outcome="pulled"}') >= 1
    assert puller.metric("kvferry_pull_seconds_total") > 0
    # They are blocks as others are: found again, and pulled on.
    assert puller.answer(prompt, holder.source(16)).prefill.pull.outcome == "cached"
    assert holder.answer(prompt[:200], puller.source(12), salt=b"a tenant").prefill.pull.outcome == "gone"


def test_what_is_there_already_is_not_read_again(workers: Three) -> None:
    prompt = fresh_prompt(200)
    expected = workers.holder.answer(prompt)
    workers.puller.answer(prompt[:81])
    pull = (answer := workers.puller.answer(prompt, workers.holder.source(12))).prefill.pull
    assert (pull.outcome, pull.num_blocks) == ("pulled", 7)
    assert answer.prefill.num_cached_tokens == 12 * BLOCK
    assert answer.tokens == expected.tokens


def test_requests_for_one_prefix_share_its_pull(workers: Three) -> None:
    prompt = fresh_prompt(240)
    expected = workers.holder.answer(prompt)
    source = workers.holder.source(14)
    before = workers.puller.stats().num_blocks_pulled
    calls = [workers.puller.open(prompt, source) for _ in range(4)]
    events = [list(call) for call in calls]
    for each in events:
        assert [event.token.id for event in each if event.HasField("token")] == expected.tokens
        assert each[-1].finished.prefill.pull.outcome in ("pulled", "cached")
    assert workers.puller.stats().num_blocks_pulled - before == 14


def test_a_prefill_worker_pulls_what_it_then_writes(workers: Three) -> None:
    """The decode worker is the puller of the other tests; with salts of their own, the caches hold different prompts."""
    prompt = fresh_prompt(200)
    expected = workers.holder.answer(prompt)
    writer = workers.prefill.stats().state.info
    sampling = common_pb2.SamplingParams(
        max_tokens=NUM_TOKENS, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True
    )
    opened = worker_pb2.DecodeOpen(
        request_id="split", prompt_token_ids=prompt, sampling=sampling, cache_salt=b"apart",
        writer=worker_pb2.Writer(
            worker_id=writer.worker_id, incarnation=writer.incarnation, control_address=writer.control_address,
            process=writer.process,
        ),
    )  # fmt: skip
    call = BlockingDecodeCall(workers.puller.channel, opened, 60)
    request = worker_pb2.PrefillRequest(
        request_id="split", prompt_token_ids=prompt, sampling=sampling, ticket=next(call).ticket,
        pull=workers.holder.source(12),
    )  # fmt: skip
    *_, last = worker_pb2_grpc.PrefillServiceStub(workers.prefill.channel).Prefill(request, timeout=60)
    prefill = last.committed.prefill
    assert (prefill.pull.outcome, prefill.pull.num_blocks) == ("pulled", 12)
    assert (prefill.num_cached_tokens, last.committed.transfer.num_blocks) == (12 * BLOCK, 13)
    assert [event.token.id for event in call if event.HasField("token")] == expected.tokens


OUTCOMES = {
    Manner.REFUSES: {"refused"},
    Manner.HOLDS_NOTHING: {"gone"},
    Manner.SAYS_NOTHING: {"late"},
    Manner.HAS_OTHER_BLOCKS: {"unlike"},
    Manner.POINTS_OUTSIDE: {"lost", "failed"},
    Manner.REPEATS_A_BLOCK: {"unlike"},
    Manner.DID_NOT_HOLD: {"unproven"},
    Manner.LEASE_ENDS_FIRST: {"unproven"},
    Manner.GIVES_UP_THE_POOL: {"lost"},
}


@pytest.fixture(scope="module")
def garbage(three: Three) -> Iterator[tuple[Granter, str]]:
    with granting(three.puller.stats().state.info.layout, 64) as (it, address):
        yield it, address


@pytest.mark.parametrize("manner", OUTCOMES)
def test_what_is_not_proven_is_computed(workers: Three, garbage: tuple[Granter, str], manner: Manner) -> None:
    it, address = garbage
    it.manner = manner
    it.num_asked = 0
    source = worker_pb2.PullSource(
        worker_id=granter.ID, incarnation=granter.INCARNATION, control_address=address, num_blocks=6,
        within_ms=300 if manner is Manner.SAYS_NOTHING else 0,
    )  # fmt: skip
    prompt = fresh_prompt(100)
    before = workers.puller.stats().num_blocks_pulled
    answer = workers.puller.answer(prompt, source)
    assert answer.prefill.pull.outcome in OUTCOMES[manner]
    assert (answer.prefill.num_cached_tokens, answer.prefill.pull.num_blocks, it.num_asked) == (0, 0, 1)
    assert answer.tokens == workers.holder.answer(prompt).tokens
    assert workers.puller.stats().num_blocks_pulled == before


def test_nobody_listens(workers: Three) -> None:
    (port,) = ports.pick_free(1, avoid=())
    source = worker_pb2.PullSource(
        worker_id="nobody", incarnation=1, control_address=ports.join(ports.LOOPBACK, port), num_blocks=9, within_ms=500
    )
    prompt = fresh_prompt(160)
    answer = workers.puller.answer(prompt, source)
    assert answer.prefill.pull.outcome in ("lost", "late")
    assert answer.tokens == workers.holder.answer(prompt).tokens


def test_a_cancelled_request_leaves_nothing_behind(workers: Three) -> None:
    prompt = fresh_prompt(300)
    workers.holder.answer(prompt)
    for delay_s in (0.0, 0.003, 0.006):
        call = workers.puller.open(prompt, workers.holder.source(18))
        time.sleep(delay_s)
        call.cancel()
        workers.puller.settle()
        workers.holder.settle()


def test_a_holder_that_is_killed_costs_a_recompute_at_most(tmp_path: Path, workers: Three) -> None:
    """At any moment of the pull.  What has arrived whole under a lease that stands is good, also of a dead holder."""
    with LocalCluster([_member("mortal", Role.DECODE)], tmp_path, restart=False) as local:
        (member,) = local.members
        with grpc.insecure_channel(member.health_address) as channel:
            mortal = Worker(member, channel)
            prompts = [fresh_prompt(n) for n in (300, 60)]
            expected = [mortal.answer(prompt).tokens for prompt in prompts]
            source = mortal.source(18)
            pid = mortal.stats().state.info.process.pid
            threading.Timer(0.006, os.kill, (pid, signal.SIGKILL)).start()
            answers = [workers.puller.answer(prompt, source) for prompt in prompts]
    assert [answer.tokens for answer in answers] == expected
    assert answers[0].prefill.pull.outcome in ("pulled", "lost", "unproven")
    assert answers[1].prefill.pull.outcome == "lost"
