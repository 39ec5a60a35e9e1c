"""A cluster of containers: what it answers, over which way KV goes, and what it survives."""

from __future__ import annotations

import json
import os
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import httpx
import openai
import pytest

from kvferry import Client, UnavailableError, __version__
from tests.containers.load import Load, answers, load, prompts
from tests.containers.stack import ALL, HERE, IMAGES, OTHERS, SERVICES, WORKERS, Stack

PREFILL = tuple(name for name in WORKERS if name.startswith("prefill"))
BACK_S = 90.0
MAX_GATEWAY_NBYTES = 200_000_000  # above its base
READ_ONLY = "Read-only file system"
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
paths = ("/x", "/etc/x", "/usr/x", "/opt/kvferry/x", "/models/x", "/certs/authority/x")
written = {path: refused(lambda: open(path, "w")) for path in paths}
print(json.dumps({
    "uid": os.getuid(), "groups": os.getgroups(),
    "capabilities": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")],
    "no_new_privileges": int(status["NoNewPrivs"]), "written": written,
    "became_root": refused(lambda: os.setuid(0)) == "", "mounted": refused(lambda: os.chroot("/")) == "",
    "compilers": [name for name in ("gcc", "cc", "clang") if shutil.which(name)],
}))
"""
# Whatever of /opt has a date, compiled Python that is checked against one among it: the first word of its flags is 1 where
# it is checked against nothing.
_HELD = """
import json, os, pathlib
found = [os.path.join(folder, name) for folder, folders, files in os.walk("/opt") for name in (*folders, *files, ".")]
compiled = [path for path in found if path.endswith(".pyc")]
dated = {path for path in found if os.lstat(path).st_mtime != 0}
dated |= {path for path in compiled if pathlib.Path(path).open("rb").read(8)[4:] != b"\\x01\\0\\0\\0"}
print(json.dumps({"num_compiled": len(compiled), "dated": sorted(dated)[:20]}))
"""
# Who has a certificate of the cluster's is let in, and who has the authority's alone is not.
_KNOCK = """
import grpc, pathlib
read = lambda name: pathlib.Path(f"/certs/gateway/{name}").read_bytes()
own = {"private_key": read("gateway.key"), "certificate_chain": read("gateway.pem")}
for shown in ({}, own):
    credentials = grpc.ssl_channel_credentials(root_certificates=read("ca.pem"), **shown)
    options = (("grpc.ssl_target_name_override", "directory.kvferry.internal"),)
    with grpc.secure_channel("directory-1:8472", credentials, options) as channel:
        try:
            grpc.channel_ready_future(channel).result(5)
        except grpc.FutureTimeoutError:
            print("refused")
        else:
            print("let in")
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
    """Every test finds all workers there."""
    wait_until(lambda: is_routable(client), "the gateway sees all workers")


def test_the_sdk_and_openais_client_are_answered_alike_from_outside(
    stack: Stack, client: Client, authority: Path
) -> None:
    asked = "The capital of France is"
    ours = client.generate(asked, max_tokens=16, temperature=0).result()
    trust = httpx.Client(verify=ssl.create_default_context(cafile=authority))
    with openai.OpenAI(base_url=f"{stack.http_url}/v1", api_key="none", max_retries=0, http_client=trust) as theirs:
        model = theirs.models.list().data[0].id
        answer = theirs.completions.create(model=model, prompt=asked, max_tokens=16, temperature=0)
    assert "Paris" in ours.text
    assert answer.choices[0].text == ours.text


def test_nobody_is_let_in_without_a_certificate(stack: Stack) -> None:
    assert stack.python("gateway-1", _KNOCK).split("\n")[:2] == ["refused", "let in"]
    with Client(stack.addresses, max_attempts=1) as clear, pytest.raises(UnavailableError):
        clear.cluster(timeout=5)


def test_prometheus_hears_of_every_service(stack: Stack) -> None:
    def up() -> set[str]:
        with urlopen(f"{stack.prometheus_url}/api/v1/query?query=up", timeout=10) as answer:
            found = json.load(answer)["data"]["result"]
        return {each["metric"]["instance"].partition(":")[0] for each in found if each["value"][1] == "1"}

    wait_until(lambda: up() == set(SERVICES), "Prometheus has asked everybody")


def test_the_gateways_image_is_small(stack: Stack) -> None:
    base = os.environ.get("BASE_IMAGE", "python:3.11-slim")
    try:
        above = stack.image_nbytes("kvferry-gateway") - stack.image_nbytes(base)
    except AssertionError:
        pytest.skip(f"the engine does not hold {base}, which the image was built on")
    assert 0 < above <= MAX_GATEWAY_NBYTES


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_says_what_it_is(stack: Stack, image: str) -> None:
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in stack.labels(image).items()}
    assert labels["title"] == "kvferry"
    assert labels["licenses"] == "Apache-2.0"
    assert labels["version"] == __version__
    assert re.fullmatch(r"[0-9a-f]{40}", labels["revision"])


@pytest.mark.parametrize("name", ["gateway-1", "decode-1"])
def test_what_an_image_holds_of_ours_bears_no_date_and_is_compiled_for_good(stack: Stack, name: str) -> None:
    told = json.loads(stack.python(name, _HELD))
    assert told["num_compiled"] > 1000
    assert told["dated"] == []


def test_kv_goes_through_mapped_memory(stack: Stack, client: Client) -> None:
    answers(client, prompts(4, 100, seed=1))
    sent = {name: transported(stack, name) for name in PREFILL}
    assert all(set(paths) <= {"mapped"} for paths in sent.values()), sent
    assert sum(paths.get("mapped", 0) for paths in sent.values()) > 0, sent
    logs = "".join(stack.log(name) for name in WORKERS)
    assert "pool_opened" in logs
    assert "pool_not_mapped" not in logs
    assert "other container(s) of this user" in doctor(stack, "decode-1")


def doctor(stack: Stack, name: str) -> str:
    return stack.compose("exec", "--no-TTY", name, "python", "-m", "kvferry.cli", "doctor", "--no-measure")


def test_of_a_worker_apart_metric_log_and_doctor_say_that_it_is_not_mapped_and_what_to_do(
    stack: Stack, client: Client
) -> None:
    start = ("up", "--detach", "--no-build", "--no-deps", "decode-2")
    stack.stop("decode-2")
    wait_until(lambda: not is_routable(client, ("decode-2",)), "decode-2 is gone")
    stack.compose(*start, over=(HERE / "compose.apart.yaml",))
    try:
        wait_until(lambda: is_routable(client), "decode-2 is routed to")
        with load(client, answers(client, prompts(4, 100, seed=4))) as result:
            wait_until(
                lambda: any("rma" in transported(stack, name) for name in PREFILL),
                "KV goes by UCX",
            )
        result.assert_undisturbed()
        warned = [line for name in PREFILL for line in stack.log(name).splitlines() if '"pool_not_mapped"' in line]
        assert warned
        assert all("in another PID namespace" in line for line in warned), warned
        (advice,) = [
            line for line in doctor(stack, "decode-2").splitlines() if "To map pools across containers" in line
        ]
        assert "in compose pid: service:NAME" in advice
    finally:
        stack.compose(*start)


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
    assert set(told["written"].values()) == {READ_ONLY}, told["written"]
    assert not told["became_root"]
    assert not told["mounted"]
    assert told["compilers"] == []


@pytest.mark.parametrize("name", ["store", *OTHERS])
def test_other_peoples_images_are_held_to_the_same(stack: Stack, name: str) -> None:
    status = stack.execute(name, "cat", "/proc/1/status").stdout
    assert re.search(r"^Uid:\t[1-9]", status, re.MULTILINE)
    assert set(re.findall(r"^Cap\w+:\t(\w+)$", status, re.MULTILINE)) == {"0" * 16}
    assert "NoNewPrivs:\t1" in status
    assert READ_ONLY in stack.execute(name, "touch", "/x").stderr


@pytest.mark.parametrize("name", ["prefill-1", "decode-1"])
def test_a_killed_worker_changes_no_answer_and_comes_back(stack: Stack, client: Client, name: str) -> None:
    expected = answers(client, prompts(4, 150, seed=2))

    def has_come_back() -> bool:
        return stack.state(name)["Pid"] not in (0, before) and stack.is_healthy(name)

    before = stack.state(name)["Pid"]
    with load(client, expected) as result:
        wait_until(lambda: is_busy(client, name), f"{name} computes")
        stack.kill_worker(name)
        wait_until(has_come_back, f"{name} was started again")
    result.assert_undisturbed()
    wait_until(lambda: is_routable(client), f"{name} is routed to again")


@pytest.mark.parametrize("name", ["prefill-2", "decode-1"])
def test_a_worker_that_is_cut_off_changes_no_answer_and_comes_back(stack: Stack, client: Client, name: str) -> None:
    expected = answers(client, prompts(4, 150, seed=5))
    with load(client, expected) as result:
        wait_until(lambda: is_busy(client, name), f"{name} computes")
        stack.cut_off(name)
        wait_until(lambda: not is_routable(client, (name,)), f"{name} is missed")
        goes_on(result)
        stack.mend(name)
        wait_until(lambda: is_routable(client), f"{name} is routed to again")
    result.assert_undisturbed()


def is_busy(client: Client, name: str) -> bool:
    return any(worker.worker_id == name and worker.num_running for worker in client.cluster().workers)


def goes_on(result: Load) -> None:
    before = result.num_right
    wait_until(lambda: result.num_right >= before + 3, "requests are answered meanwhile")


def test_every_service_drains_and_is_restarted_without_a_failed_request(stack: Stack, client: Client) -> None:
    expected = answers(client, prompts(4, 100, seed=3))
    with load(client, expected) as result:
        for name in ALL:
            assert stack.stop(name) == 0, f"{name} was killed, or failed, when it was told to stop"
            stack.start(name)
            awaited = ("directory-1", "directory-2") if name == "store" else (name,)
            wait_until(lambda awaited=awaited: all(map(stack.is_healthy, awaited)), f"{name} is there again")  # type: ignore[misc]
            wait_until(lambda: is_routable(client), "the gateway sees all workers")
            goes_on(result)
    result.assert_undisturbed()


def test_down_leaves_nothing(stack: Stack) -> None:
    assert stack.left()
    stack.down()
    assert stack.left() == []
