"""Servers and channels with certificates, over real connections."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvferry import errors
from kvferry._roles import CertificateRole as Role
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2, directory_pb2_grpc
from services.directory.config import DirectoryConfig
from services.directory.memory_store import MemoryStore
from services.directory.servicer import DirectoryServicer
from services.runtime.channel import open_channel
from services.runtime.server import bind, create_inner_server, running
from services.runtime.startup import StartupError
from services.runtime.tls import Certificates, is_loopback
from tests.certificates import certificates, make_authority, reissue

REGISTER = directory_pb2.RegisterRequest(
    info=directory_pb2.WorkerInfo(
        worker_id="w",
        incarnation=1,
        role=common_pb2.WORKER_ROLE_DECODE,
        control_address="127.0.0.1:1",
        model=common_pb2.ModelInfo(name="m", revision="r"),
    ),
    lease_ttl_ms=60_000,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_authority(tmp_path_factory.mktemp("certs"))


@asynccontextmanager
async def directory(shown: Certificates, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    store = MemoryStore(max_events=1000, max_index_entries=1000)
    server, credentials = create_inner_server(shown)
    directory_pb2_grpc.add_DirectoryServiceServicer_to_server(DirectoryServicer(store), server)
    port = bind(server, address, credentials=credentials)
    async with running(server, grace_s=0), store:
        yield f"127.0.0.1:{port}"


async def register(address: str, shown: Certificates | None, peer: Role = Role.DIRECTORY) -> Any:
    async with open_channel(address, certificates=shown, peer=peer) as channel:
        return await directory_pb2_grpc.DirectoryServiceStub(channel).Register(REGISTER, timeout=10)


async def test_a_gateway_cannot_register_as_a_worker(folder: Path) -> None:
    async with directory(certificates(folder, Role.DIRECTORY)) as address:
        for role in (Role.GATEWAY, Role.DIRECTORY, Role.OPERATOR):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await register(address, certificates(folder, role))
            error = errors.from_rpc_error(caught.value)
            assert isinstance(error, errors.PermissionDeniedError)
            assert f"Register is for worker, and the caller's certificate has the role {role.value}" in error.message
        assert (await register(address, certificates(folder, Role.WORKER))).lease_id


async def test_a_worker_cannot_watch_what_gateways_watch(folder: Path) -> None:
    async with directory(certificates(folder, Role.DIRECTORY)) as address:
        for role, may in ((Role.WORKER, False), (Role.GATEWAY, True)):
            async with open_channel(address, certificates=certificates(folder, role), peer=Role.DIRECTORY) as channel:
                call = directory_pb2_grpc.DirectoryServiceStub(channel).Watch(directory_pb2.WatchRequest(), timeout=10)
                if may:
                    assert isinstance(await call.read(), directory_pb2.WatchResponse)
                    continue
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_who_shows_no_certificate_of_the_authority_is_not_heard(folder: Path, tmp_path: Path) -> None:
    stranger = make_authority(tmp_path)
    tls = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    options = (("grpc.ssl_target_name_override", Role.DIRECTORY.dns_name),)
    async with directory(certificates(folder, Role.DIRECTORY)) as address:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await register(address, certificates(stranger, Role.WORKER, ca=folder / "ca.pem"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        for channel in (grpc.aio.secure_channel(address, tls, options), grpc.aio.insecure_channel(address)):
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await directory_pb2_grpc.DirectoryServiceStub(channel).Register(REGISTER, timeout=10)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_worker_cannot_pose_as_the_directory(folder: Path) -> None:
    async with directory(certificates(folder, Role.WORKER)) as address:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await register(address, certificates(folder, Role.WORKER))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await register(address, certificates(folder, Role.WORKER), peer=Role.WORKER)


async def test_changed_files_are_taken_over_by_server_and_channel_alike(tmp_path: Path) -> None:
    """The whole authority is replaced: nothing of the old is worth anything to the new, and a stream that runs goes on."""
    folder = tmp_path / "certs"
    make_authority(folder)
    own, peers = certificates(folder, Role.DIRECTORY), certificates(folder, Role.WORKER)
    gateways, former = certificates(folder, Role.GATEWAY), tmp_path / "former"
    async with (
        directory(own) as address,
        open_channel(address, certificates=peers, peer=Role.DIRECTORY) as channel,
        open_channel(address, certificates=gateways, peer=Role.DIRECTORY) as watching,
    ):
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        lease = (await stub.Register(REGISTER, timeout=10)).lease_id
        watch = directory_pb2_grpc.DirectoryServiceStub(watching).Watch(directory_pb2.WatchRequest(), timeout=30)
        await watch.read()
        folder.rename(former)
        old = certificates(former, Role.WORKER)
        make_authority(folder)

        assert await stub.KeepAlive(directory_pb2.KeepAliveRequest(lease_id=lease), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await register(address, old)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await stub.Deregister(directory_pb2.DeregisterRequest(lease_id=lease), timeout=10)
        assert isinstance(await watch.read(), directory_pb2.WatchResponse)


async def test_a_channel_finds_a_server_again_that_has_another_authority(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    make_authority(folder)
    shown = certificates(folder, Role.WORKER)
    async with directory(certificates(folder, Role.DIRECTORY)) as address:
        channel = open_channel(address, certificates=shown, peer=Role.DIRECTORY)
        stub = directory_pb2_grpc.DirectoryServiceStub(channel)
        assert (await stub.Register(REGISTER, timeout=10)).lease_id
    folder.rename(tmp_path / "former")
    make_authority(folder)
    async with channel, directory(certificates(folder, Role.DIRECTORY), address):
        assert (await stub.Register(REGISTER, timeout=10, wait_for_ready=True)).lease_id


def test_files_that_do_not_belong_together_leave_what_was_read(tmp_path: Path) -> None:
    folder = make_authority(tmp_path)
    read = certificates(folder, Role.WORKER)
    before = read.current
    (folder / "worker.key").write_bytes((folder / "gateway.key").read_bytes())
    assert read.current is before
    (folder / "worker.key").unlink()
    assert read.current is before
    reissue(folder, Role.WORKER)
    after = read.current
    assert after.certificate == (folder / "worker.pem").read_bytes() != before.certificate
    assert after.ca == before.ca


async def test_the_web_door_takes_over_changed_files(tmp_path: Path) -> None:
    folder = make_authority(tmp_path)
    context = certificates(folder, Role.GATEWAY).web_context()
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]

    async def shown() -> str:
        trusting = ssl.create_default_context(cafile=folder / "ca.pem")
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return ssl.DER_cert_to_PEM_cert(der)

    async with server:
        assert await shown() == (folder / "gateway.pem").read_text()
        reissue(folder, Role.GATEWAY)
        assert await shown() == (folder / "gateway.pem").read_text()


@pytest.mark.parametrize(
    ("host", "is_so"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False), ("[::]", False),
     ("10.0.0.1", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_which_addresses_only_this_machine_reaches(host: str, is_so: bool) -> None:
    assert is_loopback(host) is is_so


def test_beyond_the_loopback_certificates_are_wanted_or_it_is_said_aloud(folder: Path) -> None:
    with pytest.raises(StartupError, match=r"0\.0\.0\.0:1 is beyond the loopback.*--insecure"):
        DirectoryConfig(listen="0.0.0.0:1").certificates("127.0.0.1:2", "0.0.0.0:1")
    assert DirectoryConfig(listen="0.0.0.0:1", insecure=True).certificates("0.0.0.0:1") is None
    assert DirectoryConfig().certificates("127.0.0.1:1", "[::1]:2") is None
    files = {"tls_cert": folder / "directory.pem", "tls_key": folder / "directory.key"}
    with pytest.raises(StartupError, match="--tls-ca must be given too"):
        DirectoryConfig(**files, insecure=True).certificates("0.0.0.0:1")
    assert DirectoryConfig(**files, tls_ca=folder / "ca.pem").certificates("0.0.0.0:1") is not None


def test_files_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "not.pem").write_text("nothing")
    missing, wrong = tmp_path / "missing", tmp_path / "not.pem"
    good = folder / "worker.pem", folder / "worker.key", folder / "ca.pem"
    for index in range(3):
        for bad, words in ((missing, "cannot be read: No such file"), (wrong, "PEM")):
            paths = [*good[:index], bad, *good[index + 1 :]]
            with pytest.raises(ValueError, match=words) as caught:
                Certificates(*paths)
            assert bad.name in str(caught.value)
