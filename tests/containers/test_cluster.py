"""A cluster of containers: what it answers, over which way KV goes, and what it survives."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

import openai
import pytest

from kvferry import Client
from tests.containers.load import answers, load, prompts
from tests.containers.stack import SERVICES, WORKERS, Stack

PREFILL = tuple(name for name in WORKERS if name.startswith("prefill"))
BACK_S = 90.0
# By the user that the service runs as.
_VIOLATIONS = """
import json, os, shutil
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
def refused(action):
    try:
        action()
    except OSError as error:
        return error.strerror
    return ""
written = {path: refused(lambda: open(path, "w")) for path in ("/x", "/etc/x", "/usr/x", "/opt/kvferry/x", "/models/x")}
print(json.dumps({
    "uid": os.getuid(), "groups": os.getgroups(),
    "capabilities": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")],
    "no_new_privileges": int(status["NoNewPrivs"]), "written": written,
    "became_root": refused(lambda: os.setuid(0)) == "", "mounted": refused(lambda: os.chroot("/")) == "",
    "compilers": [name for name in ("gcc", "cc", "clang") if shutil.which(name)],
}))
"""


pytestmark = pytest.mark.timeout(900)


def wait_until(holds: Callable[[], bool], what: str, within_s: float = BACK_S) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.2)


def is_routable(client: Client, names: tuple[str, ...] = WORKERS) -> bool:
    return set(names) <= {worker.worker_id for worker in client.cluster().workers if not worker.draining}


@pytest.fixture(autouse=True)
def whole(stack: Stack, client: Client) -> None:
    """Every test finds all services there."""
    wait_until(lambda: all(stack.is_healthy(name) for name in SERVICES), "all services are healthy")
    wait_until(lambda: is_routable(client), "the gateway sees all workers")


def test_the_sdk_and_openais_client_are_answered_alike_from_outside(stack: Stack, client: Client) -> None:
    asked = "The capital of France is"
    ours = client.generate(asked, max_tokens=16, temperature=0).result()
    with openai.OpenAI(base_url=f"{stack.http_url}/v1", api_key="none", max_retries=0) as theirs:
        model = theirs.models.list().data[0].id
        answer = theirs.completions.create(model=model, prompt=asked, max_tokens=16, temperature=0)
    assert "Paris" in ours.text
    assert answer.choices[0].text == ours.text


def test_kv_goes_through_mapped_memory(stack: Stack, client: Client) -> None:
    answers(client, prompts(4, 100, seed=1))
    sent = {name: transported(stack, name) for name in PREFILL}
    assert all(set(paths) <= {"mapped"} for paths in sent.values()), sent
    assert sum(paths.get("mapped", 0) for paths in sent.values()) > 0, sent
    logs = "".join(stack.log(name) for name in WORKERS)
    assert "pool_opened" in logs
    assert "pool_not_mapped" not in logs


def transported(stack: Stack, name: str) -> dict[str, float]:
    found = re.findall(r'^kvferry_transport_bytes_total\{path="(\w+)"\} (\S+)$', stack.metrics(name), re.MULTILINE)
    return {path: float(value) for path, value in found if float(value) > 0}


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_may_be_written_and_nobody_is_root(stack: Stack, name: str) -> None:
    told = json.loads(stack.python(name, _VIOLATIONS))
    assert told["uid"] == 10001
    assert set(told["groups"]) <= {10001}
    assert told["capabilities"] == [0] * 5
    assert told["no_new_privileges"] == 1
    assert all(told["written"].values()), told["written"]
    assert not told["became_root"]
    assert not told["mounted"]
    assert told["compilers"] == []


@pytest.mark.parametrize("name", ["prefill-1", "decode-1"])
def test_a_killed_worker_changes_no_answer_and_comes_back(stack: Stack, client: Client, name: str) -> None:
    expected = answers(client, prompts(4, 150, seed=2))

    def is_busy() -> bool:
        return any(worker.worker_id == name and worker.num_running for worker in client.cluster().workers)

    def has_come_back() -> bool:
        return stack.state(name)["Pid"] not in (0, before) and stack.is_healthy(name)

    before = stack.state(name)["Pid"]
    with load(client, expected) as result:
        wait_until(is_busy, f"{name} computes")
        stack.kill_worker(name)
        wait_until(has_come_back, f"{name} was started again")
    result.assert_undisturbed()
    wait_until(lambda: is_routable(client), f"{name} is routed to again")


def test_every_service_is_restarted_without_a_failed_request(stack: Stack, client: Client) -> None:
    expected = answers(client, prompts(4, 100, seed=3))
    with load(client, expected) as result:
        for name in SERVICES:
            stack.compose("restart", "--timeout", "30", "--no-deps", name)
            wait_until(lambda name=name: stack.is_healthy(name), f"{name} is healthy again")  # type: ignore[misc]
            wait_until(lambda: is_routable(client), "the gateway sees all workers")
    result.assert_undisturbed()


def test_down_leaves_nothing(stack: Stack) -> None:
    assert stack.left()
    stack.down()
    assert stack.left() == []
