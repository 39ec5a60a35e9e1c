"""A gateway with API keys: whose prompts hit whose cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from kvferry import Client, NotFoundError, UnauthenticatedError
from kvferry.cli import ports
from kvferry.cli.members import clone_root
from tests.gateway.test_tenants import entry
from tests.integration.conftest import Running

PROMPT = list(range(3000, 3128))


@pytest.fixture(scope="module")
def guarded(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A second gateway of the session's cluster: its gRPC address and its HTTP URL."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    caches = '[tenant.left]\ncache = "both"\n[tenant.right]\ncache = "both"\n'
    path.write_text("".join(entry(f"key of {name}", name) for name in ("own", "left", "right")) + caches)
    grpc_port, http_port = ports.pick_free(2)
    address, http = f"127.0.0.1:{grpc_port}", f"127.0.0.1:{http_port}"
    command = [sys.executable, "-m", "gateway", "--listen", address, "--http-listen", http, "--api-keys", str(path),
               "--directory", running.local.address("directory"), "--routing", "least-loaded",
               "--min-ship-tokens", "1"]  # fmt: skip
    with (path.with_name("log")).open("w") as log, subprocess.Popen(
        command, stdout=log, stderr=log, cwd=clone_root()
    ) as process:  # fmt: skip
        try:
            with Client(address) as client:
                running.wait_until(lambda: _is_ready(client), 60, "the second gateway is ready")
            yield address, f"http://{http}"
        finally:
            process.terminate()
    assert process.returncode == 0


def _is_ready(client: Client) -> bool:
    try:
        return client.health(timeout=1).name == "SERVING"
    except Exception:
        return False


def test_a_prompt_hits_the_cache_of_its_own_tenant_alone(cluster: Running, guarded: tuple[str, str]) -> None:
    address, _ = guarded

    def ask(address: str, key: str | None) -> int:
        with Client(address, api_key=key) as client:
            done = client.generate(PROMPT, max_tokens=2, temperature=0).result()
        assert done.usage.num_output_tokens == 2
        cluster.assert_settles()
        return done.usage.num_cached_tokens

    assert ask(address, "key of own") == 0
    assert ask(address, "key of own") >= 112, "its own"
    assert ask(address, "key of left") == 0, "not another's"
    assert ask(address, "key of right") >= 112, "that of a shared cache"
    assert ask(cluster.address, None) == 0, "nor does a gateway without keys find what tenants cached"


def test_who_has_no_key_gets_nothing(guarded: tuple[str, str]) -> None:
    address, url = guarded
    for key in (None, "key of nobody"):
        with Client(address, api_key=key) as client, pytest.raises(UnauthenticatedError):
            client.generate(PROMPT, max_tokens=1).result()
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer key of own"}).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_route_is_explained_to_its_tenant_alone(guarded: tuple[str, str]) -> None:
    address, _ = guarded
    with Client(address, api_key="key of own") as client:
        request_id = client.generate(PROMPT, max_tokens=1).result().request_id
        assert client.explain_route(request_id)
    with Client(address, api_key="key of left") as client, pytest.raises(NotFoundError):
        client.explain_route(request_id)


def test_traffic_is_told_to_its_tenant_alone(guarded: tuple[str, str]) -> None:
    address, _ = guarded
    with Client(address, api_key="key of own") as client:
        before = len(client.traffic().served)
        client.generate(PROMPT, max_tokens=1).result()
        assert len(client.traffic().served) == before + 1
    with Client(address, api_key="key of left") as client:
        left = len(client.traffic().served)
        client.generate(PROMPT, max_tokens=1).result()
        assert len(client.traffic().served) == left + 1
