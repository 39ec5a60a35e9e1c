"""Workers and gateways of several versions in one cluster, as real processes: they differ in what they say they speak."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, cycle

import grpc
import pytest

from kvferry import Client, Completion, HealthStatus
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig, Member, Role, clone_root, plan
from kvferry.cli.ports import pick_free
from tests.decode_calls import BlockingDecodeCall
from tests.integration.conftest import Running

# The number of a member is that of its version: the first; the next one, which still speaks the first; and one that does
# not.
SPEAKS = {"0": ("1", "1"), "1": ("1", "2"), "2": ("3", "3")}
ENVIRONMENT = {"KVFERRY_ROUTING": "random", "KVFERRY_MIN_SHIP_TOKENS": "1", "KVFERRY_LABEL": "zone=a,x.y/z=1"}
# What may differ between hosts and must not count: by what seed Python hashes, and what encoding it takes for granted.
HABITS = (
    {"PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8"},
    {"PYTHONHASHSEED": "random", "LC_ALL": "POSIX", "TZ": "Asia/Kathmandu"},
)
PROMPT = list(range(1000, 1016))
# A request's name decides where random routing sends it: these go by every way that there is.
NAMES = [f"f{n}" for n in range(8)]
_numbers = count(2000)


def of_version(member: Member, oldest: str, newest: str) -> Member:
    python, dash_m, *rest = member.command
    command = (python, dash_m, "tests.integration.later", rest[0], oldest, newest, *rest[1:])
    return replace(member, command=command, environment={**member.environment, **ENVIRONMENT})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Gateways: one of the first version, and one that speaks all."""
    config = ClusterConfig(
        grpc_port=0, http_port=0, threads=1, kv_memory="64MiB", dtype="int8", num_prefill=3, num_decode=3
    )
    planned = plan(config, clone_root())
    members = [
        of_version(m, *SPEAKS[m.name[-1]]) if m.role in (Role.PREFILL, Role.DECODE) else m for m in planned.members
    ]
    gateway = members.pop()
    grpc_address, http_address = (f"127.0.0.1:{port}" for port in pick_free(2))
    flags = {"--listen": grpc_address, "--http-listen": http_address}
    later = [flags.get(before, part) for before, part in zip(("", *gateway.command), gateway.command, strict=False)]
    members += [
        of_version(gateway, "1", "1"),
        of_version(
            replace(gateway, name="gateway-later", command=tuple(later), health_address=grpc_address, metrics_url=None),
            "1",
            "3",
        ),
    ]
    habits = cycle(HABITS)
    members = [replace(m, environment={**m.environment, **next(habits)}) for m in members]
    local = LocalCluster(members, tmp_path_factory.mktemp("logs"), grpc_address=planned.grpc_address, restart=False)
    local.start()
    try:
        running = Running(local)
        for address in (running.address, grpc_address):
            with Client(address) as client:
                running.wait_until(lambda c=client: len(c.cluster().workers) == 6, 60, "all workers are seen")  # type: ignore[misc]
        yield running
    finally:
        local.kill_now()  # they have no more to do
        local.stop()


def ask(client: Client, name: str) -> Completion:
    prompt = [next(_numbers), *PROMPT]  # that no worker has seen
    return client.generate(prompt, max_tokens=3, temperature=0, ignore_eos=True, request_id=name).result()


@contextmanager
def asking(client: Client) -> Iterator[list[Future[Completion]]]:
    """Two at a time."""
    with ThreadPoolExecutor(2) as threads:
        yield [threads.submit(ask, client, name) for name in NAMES]


def pairs(answers: list[Completion]) -> set[str]:
    """As "01": prefill-0 and decode-1; "-1": decode-1 alone."""
    return {(a.timeline.prefill_worker[-1:] or "-") + a.timeline.decode_worker[-1] for a in answers}


def answer_of(
    mixed: Running, name: str, prompt: list[int], *, salt: bytes = b"", pull: worker_pb2.PullSource | None = None
) -> tuple[list[int], worker_pb2.DecodeFinished]:
    """By one worker alone."""
    sampling = common_pb2.SamplingParams(max_tokens=8, temperature=0, top_p=1, top_k=0, seed=0, ignore_eos=True)
    request = worker_pb2.DecodeOpen(
        request_id="alone", prompt_token_ids=prompt, sampling=sampling, cache_salt=salt, pull=pull
    )
    with grpc.insecure_channel(mixed.local.address(name)) as channel:
        *tokens, last = BlockingDecodeCall(channel, request, 60)
    return [event.token.id for event in tokens], last.finished


def test_unequal_hashes(mixed: Running) -> None:
    """Members of unequal versions and habits, as on hosts that were set up by different people: a block has one name for
    all.  What one decode worker has cached another pulls from it, and gateways find it at either."""
    prompt = [next(_numbers), *range(3000, 3064)]
    with Client(mixed.address) as first, Client(mixed.local.address("gateway-later")) as later:
        answer = first.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True, request_id="f0").result()
        holder = answer.timeline.decode_worker
        (other,) = {"decode-0", "decode-1"} - {holder}
        info = mixed.info(holder)
        source = worker_pb2.PullSource(
            worker_id=holder, incarnation=info.incarnation, control_address=info.control_address, num_blocks=4
        )
        pulled, finished = answer_of(mixed, other, prompt, pull=source)
        assert (finished.prefill.pull.outcome, finished.prefill.num_cached_tokens) == ("pulled", 64)
        assert pulled == answer_of(mixed, other, prompt, salt=b"anew")[0] == list(answer.token_ids)

        def found(client: Client) -> dict[str, int]:
            again = client.generate(prompt, max_tokens=1, temperature=0).result()
            (decision,) = client.explain_route(again.request_id)
            return {option.decode_worker: option.num_decode_cached_tokens for option in decision.options}

        for client in (first, later):
            mixed.wait_until(lambda c=client: found(c).items() >= {holder: 64, other: 64}.items(), 20, "both hold it")  # type: ignore[misc]


def test_two_versions_serve_together_and_one_that_fits_neither_is_left_out(mixed: Running) -> None:
    with Client(mixed.address) as client, asking(client) as asked:
        answers = [future.result(60) for future in asked]
        assert pairs(answers) == {"00", "01", "10", "11"}
        (decision,) = client.explain_route(answers[-1].request_id)
    why = "speaks protocol 3, this gateway 1"
    assert decision.passed_over == {"prefill-2": why, "decode-2": why}


def test_a_gateway_that_speaks_all_pairs_nobody_wrongly(mixed: Running) -> None:
    with Client(mixed.local.address("gateway-later")) as client, asking(client) as asked:
        answers = [future.result(60) for future in asked]
        assert pairs(answers) == {"00", "01", "10", "11", "22"}
        third = next(a for a in answers if a.timeline.decode_worker == "decode-2")
        (decision,) = client.explain_route(third.request_id)
        assert decision.passed_over == {
            "prefill-0": "it speaks protocol 1, decode-2 3",
            "prefill-1": "it speaks protocol 1 to 2, decode-2 3",
        }
        by_id = {w.worker_id: w for w in client.cluster().workers}
    (rate,) = mixed.stats("prefill-1").state.load.transfer_rates
    assert rate.distance == directory_pb2.DISTANCE_HOST
    assert rate.bytes_per_s > 0
    second = by_id["prefill-1"]
    assert (second.oldest_protocol, second.newest_protocol) == (1, 2)
    assert {path.kind for path in second.paths} >= {"shared-memory", "tcp"}
    assert second.labels.items() >= {"zone": "a", "x.y/z": "1"}.items()
    assert second.labels["host"]


def test_the_first_version_leaves_under_load_and_no_request_fails(mixed: Running) -> None:
    """Last: it ends workers."""
    with Client(mixed.address) as client, asking(client) as asked:
        for name in ("prefill-0", "decode-0"):
            asked[2].result(60)
            mixed.local.kill(name, signal.SIGTERM)
        answers = [future.result(60) for future in asked]
        assert all(len(a.token_ids) == 3 for a in answers)
        assert pairs(answers) <= {"00", "01", "10", "11", "-0", "-1"}
        mixed.wait_until(lambda: len(client.cluster().workers) == 4, 30, "the first version has left")
        after = [ask(client, name) for name in NAMES[:3]]
        assert pairs(after) == {"11"}
    assert mixed.stats("decode-1").integrity_ok


def test_a_gateway_whose_protocol_no_worker_speaks_any_more_is_not_ready(mixed: Running) -> None:
    """After the one above: it ends another worker."""
    mixed.local.kill("decode-1", signal.SIGTERM)
    with Client(mixed.address) as first, Client(mixed.local.address("gateway-later")) as later:
        mixed.wait_until(lambda: first.health() is HealthStatus.NOT_SERVING, 30, "there is nobody for it")
        assert later.health() is HealthStatus.SERVING
        assert pairs([ask(later, "f0")]) == {"22"}
