"""What a whole fleet does that is restarted, in turn or at once: one prefill worker, and two of what must not be alone."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from gateway import serving
from kvferry import Client, Completion, HealthStatus, UnavailableError
from kvferry.cli.cluster import Died, Event, LocalCluster, Timing
from kvferry.cli.members import ClusterConfig, Role, clone_root, plan
from services.worker import node
from tests import tracing
from tests.chaos.accounts import Accounts
from tests.chaos.oracle import History, Verdict, Window, judge
from tests.chaos.requests import TIMEOUT_S, Case, Load
from tests.integration.conftest import ENVIRONMENT, Running

SEED = 35
BACK_S = 90.0
CUT_OFF_S = 5.0
# More than a server that stops leaves its calls without being told to wait for them.
UNWRITTEN_S = max(serving.SERVER_GRACE_S, node.SERVER_GRACE_S) + 1.0
# Less than a chunk, and more bytes than are copied by whoever posts them.
ONE_CHUNK = "Nobody ends before the ferry has landed. " * 6
CASES = [Case(f"Case {n}. " + "The harbour lay in fog. " * 8 * n, 12, 0.8 * (n % 2), n) for n in range(3)]
OPTIONS = {"max_tokens": 48, "temperature": 0.0, "ignore_eos": True}


@dataclass(slots=True)
class Fleet:
    running: Running
    accounts: Accounts
    died: list[Died] = field(default_factory=list)

    @property
    def local(self) -> LocalCluster:
        return self.running.local

    def names(self, *roles: Role) -> list[str]:
        """Of these roles, in their order; without any, all."""
        members = self.local.members
        return [m.name for role in roles for m in members if m.role is role] or [m.name for m in members]

    def address(self, gateway: str) -> str:
        return self.local.address(gateway)

    def http_url(self, gateway: str) -> str:
        (url,) = (m.metrics_url for m in self.local.members if m.name == gateway)
        assert url is not None
        return url.removesuffix("/metrics")

    def busiest(self) -> str:
        return max(self.names(Role.DECODE), key=lambda name: self.running.stats(name).state.load.num_running)

    def await_back(self) -> None:
        """Every member is there, and every gateway knows it."""
        for name in self.names():
            self.local.wait_ready(name, BACK_S)
        self.running.wait_until(self.accounts.all_there, BACK_S, "the gateways know every worker")

    def restart(self, name: str) -> None:
        """SIGTERM; returns when its successor serves."""
        pid = self.local.pid(name)
        self.local.kill(name, signal.SIGTERM)
        self.running.wait_until(lambda: self.local.pid(name) not in (None, pid), BACK_S, f"{name} ends")
        self.await_back()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    config = ClusterConfig(num_decode=2, num_gateways=2, grpc_port=0, http_port=0, threads=1, kv_memory="64MiB")
    planned, died = plan(config, clone_root()), list[Died]()

    def note(event: Event) -> None:
        if isinstance(event, Died):
            died.append(event)

    local = LocalCluster(
        [replace(m, environment={**m.environment, **ENVIRONMENT}) for m in planned.members],
        tmp_path_factory.mktemp("logs"), grpc_address=planned.grpc_address, http_url=planned.http_url, on_event=note,
        timing=Timing(backoff_s=0.1, max_backoff_s=0.5),
    )  # fmt: skip
    with local:
        fleet = Fleet(Running(local), Accounts(local), died)
        fleet.await_back()
        yield fleet
        local.kill_now()  # they have no more to do


def undisturbed(fleet: Fleet) -> dict[Case, tuple[int, ...]]:
    with Client(fleet.local.grpc_address) as client:
        outcomes = [case.ask(client).run() for case in CASES]
    assert all(outcome.completed for outcome in outcomes)
    return {outcome.case: outcome.token_ids for outcome in outcomes}


def begun(client: Client, prompts: list[str], threads: ThreadPoolExecutor) -> list[Future[Completion]]:
    """Answers of which the first token has come."""
    streams = [client.generate(prompt, timeout=TIMEOUT_S, **OPTIONS) for prompt in prompts]  # type: ignore[arg-type]
    for stream in streams:
        next(stream)
    return [threads.submit(stream.result) for stream in streams]


def test_drain_that_does_not_wait(fleet: Fleet) -> None:
    """SIGTERM to one of every service in turn, under load: a prefill worker whose KV has not been taken yet, a decode
    worker and a gateway with streams, the directory.  Each waits for what others have of it, then ends with 0; no request
    is refused, and no answer is another one for it, or recovered elsewhere."""
    expected = undisturbed(fleet)
    prompts = [f"{number}: {ONE_CHUNK}" for number in range(3)]
    with ExitStack() as stack:
        client = stack.enter_context(Client(fleet.local.grpc_address))
        threads = stack.enter_context(ThreadPoolExecutor(len(prompts) + 2))
        right = [answer.result(TIMEOUT_S).token_ids for answer in begun(client, prompts, threads)]
        fleet.died.clear()
        began_s = time.monotonic()
        load = Load(SEED, fleet.local.grpc_address, CASES, num_streams=2)
        load.start()
        try:
            _drain_with_kv_unwritten(fleet, "prefill-0", client, threads)
            answers = begun(client, prompts, threads)
            busiest = fleet.busiest()  # one of ours at least: there are more than the load has
            fleet.restart(busiest)
            answered = [answer.result(TIMEOUT_S) for answer in answers]
            assert [answer.token_ids for answer in answered] == right
            assert busiest in {answer.timeline.decode_worker for answer in answered}
            assert not any(answer.timeline.num_retries for answer in answered)
            with Client(fleet.address("gateway-0"), max_attempts=1) as through:
                answers = begun(through, prompts, threads)
                _drain_with_kv_unwritten(fleet, "gateway-0", through, threads)
                assert [answer.result(TIMEOUT_S).token_ids for answer in answers] == right
            fleet.restart("directory")
        finally:
            hanging = load.stop(TIMEOUT_S)
    assert not hanging
    history = History(rolls=[Window(began_s, time.monotonic())])
    judged = [judge(outcome, expected, history) for outcome in load.outcomes]
    assert [one.why for one in judged if one.verdict not in (Verdict.COMPLETED, Verdict.LEFT)] == []
    assert any(one.verdict is Verdict.COMPLETED for one in judged)
    fleet.restart("gateway-1")  # which has nothing to wait for
    ended = ("prefill-0", busiest, "gateway-0", "directory", "gateway-1")
    assert {died.name: died.status for died in fleet.died} == dict.fromkeys(ended, 0)
    assert fleet.accounts.await_quiet() == []


def _drain_with_kv_unwritten(fleet: Fleet, name: str, client: Client, threads: ThreadPoolExecutor) -> None:
    """What would write the prompt's KV stands still: the answer has begun, and goes on only when that does."""
    prompt, pid, writer_pid = f"{name} drains: {ONE_CHUNK}", fleet.local.pid(name), fleet.local.pid("prefill-0")
    assert writer_pid is not None
    try:
        with tracing.held(tracing.thread_of(writer_pid, "kvferry-ferry")):
            (answer,) = begun(client, [prompt], threads)
            ending = threads.submit(fleet.restart, name)
            time.sleep(UNWRITTEN_S)
            assert fleet.local.pid(name) == pid
    except tracing.CannotTraceError as why:
        pytest.skip(str(why))
    answered = answer.result(TIMEOUT_S)
    assert (answered.timeline.prefill_worker, answered.timeline.num_retries) == ("prefill-0", 0)
    ending.result(BACK_S)
    with Client(fleet.local.grpc_address) as through_any:
        again = through_any.generate(prompt, **OPTIONS).result()  # type: ignore[arg-type]
    assert again.token_ids == answered.token_ids


def test_whole_fleet_wedged(fleet: Fleet) -> None:
    """Every worker and the directory die at once, and again until the gateways say that nothing works: by gRPC and by HTTP,
    and no answer is called a success that is none.  Then all are there again, and everything works."""
    prompt = f"wedged: {ONE_CHUNK}"
    gateways = fleet.names(Role.GATEWAY)
    others = fleet.names(Role.DECODE, Role.PREFILL, Role.DIRECTORY)
    down, over = threading.Event(), threading.Event()

    def keep_down() -> None:
        while not over.is_set():
            for name in others:
                fleet.local.kill(name)
            down.set()
            over.wait(0.1)

    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(3))
        clients = [stack.enter_context(Client(fleet.address(name), max_attempts=1)) for name in gateways]
        right = clients[0].generate(prompt, **OPTIONS).result().token_ids  # type: ignore[arg-type]
        streaming = threading.Event()
        cut_off = threads.submit(_last_event, fleet.http_url(gateways[0]), prompt, streaming)
        assert streaming.wait(TIMEOUT_S)
        (patient,) = begun(clients[0], [prompt], threads)
        killing = threads.submit(keep_down)
        try:
            assert down.wait(BACK_S)
            for name, client in zip(gateways, clients, strict=True):
                url = fleet.http_url(name)
                _await(fleet, lambda c=client: c.health() is HealthStatus.NOT_SERVING, f"{name} says so")  # type: ignore[misc]
                assert httpx.get(f"{url}/health", timeout=10).status_code == 503
                with pytest.raises(UnavailableError):
                    client.generate("Anybody?", max_tokens=2).result()
                for stream in (False, True):
                    refused = httpx.post(f"{url}/v1/completions", json=_body("Anybody?", stream=stream), timeout=30)
                    assert refused.status_code == 503
                    assert refused.json()["error"]["message"]
            assert cut_off.result(TIMEOUT_S)["error"]["type"] == "server_error", "an answer that breaks off says so"
        finally:
            over.set()
            killing.result(BACK_S)
        fleet.await_back()
        for name, client in zip(gateways, clients, strict=True):
            _await(fleet, lambda c=client: c.health() is HealthStatus.SERVING, f"{name} serves again")  # type: ignore[misc]
            assert httpx.get(f"{fleet.http_url(name)}/health", timeout=10).status_code == 200
            answer = client.generate(prompt, **OPTIONS).result()  # type: ignore[arg-type]
            assert answer.token_ids == right
        lost = patient.exception(TIMEOUT_S)
        if lost is None:
            assert patient.result().timeline.num_retries >= 1
            assert patient.result().token_ids == right
        else:  # it has waited for workers as long as it may
            assert isinstance(lost, UnavailableError)
    assert fleet.accounts.await_quiet() == []


def _await(fleet: Fleet, holds: Callable[[], bool], what: str) -> None:
    fleet.running.wait_until(holds, 30, what)


def _body(prompt: str, *, stream: bool) -> dict[str, object]:
    return {
        "model": "smollm2-135m-instruct", "prompt": prompt, "max_tokens": 900, "temperature": 0, "stream": stream,
        "ignore_eos": True,
    }  # fmt: skip


def _last_event(url: str, prompt: str, streaming: threading.Event) -> Any:
    """Of an answer that its deadline cuts off.  Of a whole one it would be "[DONE]", which is no JSON."""
    headers = {"x-request-timeout": str(CUT_OFF_S)}
    for _ in range(5):  # before its first token it would be a 504
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=_body(prompt, stream=True), headers=headers, timeout=60
        ) as answer:
            if answer.status_code == 200:
                lines = answer.iter_lines()
                next(lines)
                streaming.set()
                *_, last = filter(None, lines)
                return json.loads(last.removeprefix("data: "))
    raise TimeoutError("no answer has begun")
