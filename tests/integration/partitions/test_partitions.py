"""Between any two services the network loses every packet, silently: answers go on or are typed errors, in bounded time,
and no block has two owners.  Skipped where no network namespaces can be made (that takes root)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from gateway.dispatch import GONE_STALL_S
from kvferry import Completion
from tests.integration.partitions.world import DEADLINE_S, HOSTS, LEASE_S, World, a_world
from tests.listening import listening

LONG = "tell me of the ferry, and of the river. "
WORKERS = ("prefill-0", "decode-0", "decode-1")
DIRECTORIES = ("directory-0", "directory-1")
# Pings notice a silent peer within 8 s, and a machine may have other things to do.
NOTICED_S = 20.0


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with a_world(tmp_path_factory.mktemp("logs")) as world:
        yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """Whole before the test; after it nobody holds anything, or has died of it."""
    shared_world.wait_until(shared_world.is_whole, 30, "the gateway knows everybody")
    pids = {name: shared_world.local.pid(name) for name in HOSTS}
    yield shared_world
    shared_world.network.heal()
    shared_world.wait_until(lambda: shared_world.is_quiet(*WORKERS), 40, "everything is given back")
    assert {name: shared_world.local.pid(name) for name in HOSTS} == pids


class Asking:
    """A request on a thread of its own."""

    def __init__(self, world: World, prompt: str, max_tokens: int) -> None:
        self.num_tokens = 0
        self.longest_silence_s = 0.0  # between two tokens
        self._answer: Completion | Exception | None = None
        self._wanted = (world, prompt, max_tokens)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def result(self, within_s: float) -> Completion:
        self._thread.join(within_s)
        assert not self._thread.is_alive(), f"no end within {within_s} s"
        assert isinstance(self._answer, Completion), self._answer
        return self._answer

    def _run(self) -> None:
        world, prompt, max_tokens = self._wanted
        try:
            with world.client.generate(
                prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, timeout=DEADLINE_S
            ) as stream:
                last_s = None
                for _ in stream:
                    now_s = time.monotonic()
                    self.longest_silence_s = max(self.longest_silence_s, now_s - (last_s or now_s))
                    self.num_tokens, last_s = len(stream.tokens), now_s
                self._answer = stream.result()
        except Exception as e:
            self._answer = e


def test_what_moves_kv_listens_where_its_worker_does_alone(world: World) -> None:
    for name in WORKERS:
        found = listening(world.local.pid(name))
        assert {str(address) for address in found} == {world.network.address(name)}
        assert len(found) >= 2, "its gRPC server, and UCX"


@pytest.mark.parametrize("one_way", [False, True], ids=["both ways", "answers alone"])
def test_gateway_and_decode_worker(world: World, one_way: bool) -> None:
    """The answer goes on elsewhere; the worker that nobody hears computes no more than it was asked for."""
    prompt = LONG * 5
    asking = Asking(world, prompt, 100)
    world.wait_until(lambda: asking.num_tokens >= 5, 30, "it has begun")
    (cut_off,) = [name for name in WORKERS[1:] if world.stats(name).state.load.num_running]
    world.network.cut(cut_off, "gateway")
    if not one_way:
        world.network.cut("gateway", cut_off)
    answer = asking.result(NOTICED_S)
    assert answer.timeline.num_retries == 1
    assert answer.timeline.decode_worker != cut_off
    world.wait_until(lambda: world.is_quiet(cut_off), NOTICED_S, "it holds nothing for a gateway that it cannot reach")
    world.network.heal()
    assert world.ask(prompt, 100).token_ids == answer.token_ids


def test_gateway_and_prefill_worker(world: World) -> None:
    """What was begun is committed without the gateway; who asks next gets an answer too."""
    prompt = "Of the gateway and the prefill worker: " + LONG * 30
    before = world.stats("prefill-0").num_prefill_tokens
    asking = Asking(world, prompt, 8)
    world.wait_until(lambda: world.stats("prefill-0").num_prefill_tokens > before, 30, "its prompt is computed")
    world.network.cut_both("gateway", "prefill-0")
    disturbed = [asking.result(NOTICED_S), world.ask("And another: " + LONG, 8)]
    assert disturbed[1].timeline.prefill_worker == ""
    world.network.heal()
    world.wait_until(lambda: world.is_quiet(*WORKERS), 20, "nothing is left")
    undisturbed = [world.ask(prompt, 8), world.ask("And another: " + LONG, 8)]
    assert [a.token_ids for a in disturbed] == [a.token_ids for a in undisturbed]


def test_prefill_worker_and_decode_workers(world: World) -> None:
    """While it writes over tcp: the decode worker computes the prompt itself, whoever asks next need not find out again,
    and the blocks that were lent stay in quarantine until the writer can say that nothing arrives any more."""
    prompt = "Of the way between the two: " + LONG * 30
    before = world.stats("prefill-0").num_blocks_written
    asking = Asking(world, prompt, 8)
    world.wait_until(lambda: world.stats("prefill-0").num_blocks_written > before, 30, "blocks are written")
    for name in WORKERS[1:]:
        world.network.cut_both("prefill-0", name)
    answer = asking.result(2 * NOTICED_S)
    assert answer.timeline.prefill_worker == ""
    lost_at = answer.timeline.decode_worker
    began_s = time.monotonic()
    assert len(world.ask("A short one, beside it.", 4).token_ids) == 4
    assert time.monotonic() - began_s < NOTICED_S
    assert any(world.stats(name).state.load.blocks.quarantined for name in WORKERS[1:])
    assert world.stats(lost_at).integrity_ok
    world.network.heal()
    world.wait_until(lambda: world.is_quiet(*WORKERS), 30, "the quarantine ends")
    assert world.ask(prompt, 8).token_ids == answer.token_ids


def test_decode_worker_and_directories(world: World) -> None:
    """Its lease ends, and nobody new comes; its streams go on, as long as they are heard of.  Back again it is who it was,
    with its cache."""
    known = world.known()
    asking = Asking(world, LONG * 2, 400)
    world.wait_until(lambda: asking.num_tokens >= 3, 30, "it has begun")
    (cut_off,) = [name for name in WORKERS[1:] if world.stats(name).state.load.num_running]
    for directory in DIRECTORIES:
        world.network.cut_both(cut_off, directory)
    world.wait_until(lambda: cut_off not in world.known(), 3 * LEASE_S, "its lease has ended")
    assert world.ask("Somebody new.", 4).timeline.decode_worker != cut_off
    world.network.heal()
    answer = asking.result(DEADLINE_S)
    if asking.longest_silence_s < GONE_STALL_S:
        assert (answer.timeline.num_retries, answer.timeline.decode_worker) == (0, cut_off)
    world.wait_until(lambda: world.known() == known, 2 * NOTICED_S, "it is back, as the same incarnation")


def test_gateway_and_directories(world: World) -> None:
    """It goes on from its view, and says how old that is."""
    known = world.known()
    for directory in DIRECTORIES:
        world.network.cut_both("gateway", directory)
    world.wait_until(lambda: world.view().view_age_ms > 3_000, NOTICED_S, "the view is old")
    assert len(world.ask("From memory: " + LONG, 4).token_ids) == 4
    world.network.heal()
    world.wait_until(lambda: world.view().view_age_ms < 3_000, 2 * NOTICED_S, "it watches again")
    assert world.known() == known


def test_directories_and_store(world: World) -> None:
    """For longer than a lease: no worker loses its own by it, and requests go on."""
    known = world.known()
    for directory in DIRECTORIES:
        world.network.cut_both(directory, "redis")
    began_s = time.monotonic()
    while time.monotonic() - began_s < LEASE_S + 2.0:
        assert len(world.ask("Without a store.", 4).token_ids) == 4
    world.network.heal()
    world.wait_until(lambda: world.view().view_age_ms < 3_000, 2 * NOTICED_S, "the gateway watches again")
    world.wait_until(lambda: world.known() == known, NOTICED_S, "they are who they were")
