"""API keys and whose they are."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import grpc
import pytest

from gateway.doorkeeper import Doorkeeper, follow, read_keys
from gateway.quotas import UNLIMITED, Quota
from gateway.servicer import ClusterServicer, InferenceServicer
from gateway.tenants import EVERYBODY, KeyFileError, Keyring, Tenant
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
from kvferry.errors import UnauthenticatedError
from services.runtime.server import create_server


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def entry(key: str, tenant: str) -> str:
    return f'[[key]]\ntenant = "{tenant}"\nsha256 = "{sha256(key)}"\n'


def test_a_key_leads_to_its_tenant() -> None:
    keys = Keyring.parse(entry("a1", "a") + entry("a2", "a") + entry("b1", "b"))
    assert [keys.tenant_of(key) for key in ("a1", "a2", "b1")] == [
        Tenant("a", b"tenant:a"), Tenant("a", b"tenant:a"), Tenant("b", b"tenant:b"),
    ]  # fmt: skip
    assert keys.num_keys == 3
    for stranger in ("", "a", sha256("a1"), "a1 ", "é"):
        assert keys.tenant_of(stranger) is None


def test_a_tenant_has_the_weight_and_the_quota_that_the_file_gives_it() -> None:
    keys = Keyring.parse(
        entry("a1", "a") + entry("b1", "b")
        + "[tenant.a]\nweight = 2\nrequests_per_minute = 60\ntokens_per_minute = 5e4\nmax_streams = 8\n"
    )  # fmt: skip
    assert keys.tenant_of("a1") == Tenant("a", b"tenant:a", 2.0, Quota(60, 50000, 8))
    assert keys.tenant_of("b1") == Tenant("b", b"tenant:b", 1.0, UNLIMITED)
    for wrong in ("weight = 0", "requests_per_minute = 0", "tokens_per_minute = -1", "max_streams = 0", "streams = 1"):
        with pytest.raises(KeyFileError, match=r"tenant\.a\."):
            Keyring.parse(entry("a1", "a") + f"[tenant.a]\n{wrong}\n")


def test_a_digest_that_begins_alike_is_another_key() -> None:
    digest = sha256("a1")
    alike = digest[:8] + digest[:7:-1]
    assert alike != digest
    keys = Keyring([(alike, Tenant("other", b"")), (digest, Tenant("a", b""))])
    assert keys.tenant_of("a1") == Tenant("a", b"")
    assert Keyring([(alike, Tenant("other", b""))]).tenant_of("a1") is None


def test_digests_are_compared_in_constant_time_by_who_can(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: str, other: str) -> bool:
        compared.append({one, other})
        return answer

    monkeypatch.setattr("gateway.tenants.hmac.compare_digest", compare)
    digest, tenant = sha256("a1"), Tenant("a", b"")
    alike = digest[:8] + digest[:7:-1]
    for answer in (True, False):
        assert Keyring([(alike, tenant)]).tenant_of("a1") == (tenant if answer else None)
    assert compared == [{alike, digest}] * 2


def test_a_cache_is_shared_by_those_who_name_it_alone() -> None:
    text = "".join(entry(name, name) for name in ("a", "b", "c", "docs"))
    keys = Keyring.parse(text + '[tenant.a]\ncache = "docs"\n[tenant.b]\ncache = "docs"\n')
    salts = {}
    for name in ("a", "b", "c", "docs"):
        tenant = keys.tenant_of(name)
        assert tenant is not None
        salts[name] = tenant.cache_salt
    assert salts["a"] == salts["b"]
    assert len(set(salts.values())) == 3, "nor does a tenant of the cache's name share it"
    assert EVERYBODY.cache_salt not in salts.values()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[key]", "not TOML"),
        ("n = " + "9" * 5000, "not TOML"),
        ("n = " + "[" * 5000, "not TOML"),
        ('[[key]]\ntenant = "a"\n', r"key\.0\.sha256: Field required"),
        (entry("x", "a b"), r"key\.0\.tenant"),
        ('[[key]]\ntenant = "a"\nsha256 = "secret"\n', r"key\.0\.sha256: String should match"),
        (entry("x", "a") + 'admin = true\n', r"key\.0\.admin"),
        (entry("x", "a") + entry("x", "b"), "twice"),
        (entry("x", "a") + '[tenant.b]\ncache = "c"\n', r"tenant\.b: no key"),
        (entry("x", "a") + '[tenant.a]\ncaches = "c"\n', r"tenant\.a\.caches"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_refused(text: str, why: str) -> None:
    with pytest.raises(KeyFileError, match=why) as caught:
        Keyring.parse(text)
    assert "secret" not in str(caught.value)


def test_the_doorkeeper_wants_a_bearer_of_a_known_key() -> None:
    assert Doorkeeper().admit(None) is Doorkeeper().admit("Bearer whatever") is EVERYBODY
    keeper = Doorkeeper(Keyring.parse(entry("k", "a")))
    for given in ("Bearer k", "bearer  k ", "BEARER k"):
        assert keeper.admit(given).name == "a"
    for given, reason in (
        (None, "MISSING_API_KEY"), ("k", "INVALID_API_KEY"), ("Basic k", "INVALID_API_KEY"),
        ("Bearer ", "INVALID_API_KEY"), ("Bearer kk", "INVALID_API_KEY"),
    ):  # fmt: skip
        with pytest.raises(UnauthenticatedError) as caught:
            keeper.admit(given)
        assert caught.value.reason == reason


async def test_a_changed_file_is_taken_over_and_a_broken_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry("old", "a"))
    keeper = Doorkeeper(read_keys(path))

    async def until(key: str, *, known: bool) -> None:
        async with asyncio.timeout(10):
            while (keeper.keys is not None and keeper.keys.tenant_of(key) is not None) is not known:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    following = asyncio.create_task(follow(keeper, path, interval_s=0.005))
    try:
        replaced = tmp_path / "new.toml"
        replaced.write_text(entry("new", "a"))
        await asyncio.sleep(0.02)
        os.replace(replaced, path)
        await until("new", known=True)
        await until("old", known=False)
        path.write_text("[[key]")
        await asyncio.sleep(0.05)
        path.unlink()
        await asyncio.sleep(0.05)
        assert keeper.admit("Bearer new").name == "a"
        path.write_text(entry("newest", "a"))
        await until("newest", known=True)
        assert not following.done()
    finally:
        following.cancel()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"nowhere\.toml: No such file"):
        read_keys(tmp_path / "nowhere.toml")


async def test_no_method_of_the_gateway_answers_without_a_key() -> None:
    """Nothing stands behind the servicers: whoever gets past the door would fail otherwise."""
    keeper = Doorkeeper(Keyring.parse(entry("k", "a")))
    server = create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(None, keeper), server)  # type: ignore[arg-type]
    inference_pb2_grpc.add_ClusterServiceServicer_to_server(ClusterServicer(None, keeper, None, None), server)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    asked = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for service in inference_pb2.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                for metadata in ((), (("authorization", "Bearer other"),)):
                    call = channel.unary_stream(path, lambda _: b"")(None, metadata=metadata, timeout=10)
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        async for _ in call:
                            pass
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, path
                asked.append(method.name)
    await server.stop(0)
    assert {"Generate", "DescribeCluster", "ExplainRoute"} < set(asked)
