"""A cluster whose services show each other certificates."""

from __future__ import annotations

import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import httpx
import pytest

from kvferry import Client, Error, PermissionDeniedError, TlsConfig, UnavailableError, errors
from kvferry._roles import CertificateRole
from kvferry.api.common.v1 import common_pb2
from kvferry.api.inference.v1 import inference_pb2, inference_pb2_grpc
from kvferry.api.worker.v1 import worker_pb2, worker_pb2_grpc
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import clone_root
from kvferry.cli.service_tls import CertificateFolder, open_service_channel
from tests.certificates import make_authority
from tests.integration.conftest import ENVIRONMENT, Running, started
from tests.listening import listening

WRITE_TIMEOUT_S = 1.5
MARKER = "zanzibarquokka"
PROMPT = f"Say {MARKER} and then tell me about the sea. " + "The wind blows and the ship sails on. " * 20


@dataclass(frozen=True, slots=True)
class Guarded:
    local: LocalCluster
    folder: CertificateFolder

    @property
    def client_tls(self) -> TlsConfig:
        return TlsConfig(root_certificates=self.folder.ca)

    def stub(self, name: str, tls: TlsConfig | None) -> tuple[grpc.Channel, worker_pb2_grpc.WorkerServiceStub]:
        channel = open_service_channel(self.local.address(name), tls, CertificateRole.WORKER)
        return channel, worker_pb2_grpc.WorkerServiceStub(channel)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = make_authority(tmp_path_factory.mktemp("certs"))
    environment = {**ENVIRONMENT, "KVFERRY_WRITE_TIMEOUT_S": f"{WRITE_TIMEOUT_S}"}
    settings = {"kv_memory": "64MiB", "tls": folder, "log_level": "debug"}
    with started(tmp_path_factory.mktemp("logs"), environment, **settings) as running:
        yield Guarded(running.local, CertificateFolder(folder))


def test_answers_are_those_of_a_cluster_in_the_clear_and_no_log_tells_them(
    guarded: Guarded, cluster: Running, client: Client
) -> None:
    with Client(guarded.local.grpc_address, tls=guarded.client_tls) as secret:
        answer = secret.generate(PROMPT, max_tokens=12, temperature=0, ignore_eos=True).result()
        assert (
            answer.token_ids
            == client.generate(PROMPT, max_tokens=12, temperature=0, ignore_eos=True).result().token_ids
        )
        workers = {w.worker_id: w for w in secret.cluster().workers}
        assert set(workers) == {"prefill-0", "decode-0"}
    body = {"model": "smollm2-135m-instruct", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    done = httpx.post(
        f"{guarded.local.http_url}/v1/completions",
        json=body,
        verify=ssl.create_default_context(cafile=guarded.folder.ca),
        timeout=60,
    )
    assert done.status_code == 200
    assert done.json()["usage"]["completion_tokens"] == 2
    refuse_some(guarded)
    logs = {path.name: path.read_text() for path in guarded.local.log_dir.glob("*.log")}
    assert len(logs) == 4
    assert all(text for text in logs.values())
    told = (MARKER, *(", ".join(map(str, ids[:4])) for ids in (client.tokenize(PROMPT), answer.token_ids)))
    assert not [(name, what) for name, text in logs.items() for what in told if what in text]


def refuse_some(guarded: Guarded) -> None:
    """What is wrong with a request is told to its client, in its client's words."""
    with Client(guarded.local.grpc_address, tls=guarded.client_tls, max_attempts=1) as secret:
        for wrong in ({"stop": [MARKER * 50]}, {"model": MARKER}, {"request_id": f"{MARKER}\n"}):
            with pytest.raises(Error, match=r"stop|model|request_id"):
                secret.generate(PROMPT, **wrong).result()  # type: ignore[arg-type]
        with pytest.raises(Error, match=MARKER):
            secret.chat([{"role": MARKER, "content": PROMPT}]).result()
        left = secret.generate(PROMPT, max_tokens=500, temperature=0, ignore_eos=True, stop=[MARKER])
        next(left)
        left.close()
    verify = ssl.create_default_context(cafile=guarded.folder.ca)
    with httpx.Client(base_url=guarded.local.http_url, verify=verify, timeout=60) as web:
        for body in (f'{{"prompt": "{MARKER}"', f'{{"model": "m", "prompt": "x", "{MARKER}": "{MARKER}"}}',
                     f'{{"model": "m", "prompt": "x", "temperature": "{MARKER}"}}'):  # fmt: skip
            assert web.post("/v1/completions", content=body).status_code == 400
        assert web.get(f"/nowhere?{MARKER}", headers={"authorization": f"Bearer {MARKER}"}).status_code == 404


def test_without_a_certificate_no_port_answers(guarded: Guarded) -> None:
    for tls in (None, guarded.client_tls):
        for name in ("prefill-0", "decode-0"):
            channel, stub = guarded.stub(name, tls)
            with channel, pytest.raises(grpc.RpcError) as caught:
                stub.GetStats(worker_pb2.GetStatsRequest(), timeout=10)
            assert isinstance(errors.from_rpc_error(caught.value), UnavailableError)
    with Client(guarded.local.grpc_address, max_attempts=1) as plain, pytest.raises(UnavailableError):
        plain.models()


def test_a_gateways_certificate_does_not_drain_a_worker(guarded: Guarded) -> None:
    certificate, key = guarded.folder.pair(CertificateRole.GATEWAY)
    gateway = TlsConfig(guarded.folder.ca, private_key=key, certificate_chain=certificate)
    channel, stub = guarded.stub("prefill-0", gateway)
    with channel, pytest.raises(grpc.RpcError) as caught:
        stub.Drain(worker_pb2.DrainRequest(), timeout=10)
    error = errors.from_rpc_error(caught.value)
    assert isinstance(error, PermissionDeniedError)
    assert "is for operator" in error.message


def test_nothing_listens_beyond_the_loopback(guarded: Guarded) -> None:
    """UCX's own ports included."""
    for member in guarded.local.members:
        addresses = listening(guarded.local.pid(member.name))
        assert addresses, member.name
        assert all(address.is_loopback for address in addresses), (member.name, addresses)


def test_who_reads_nothing_holds_no_blocks(guarded: Guarded) -> None:
    """Long before the answer's end, and although the client is there."""
    certificate, key = guarded.folder.pair(CertificateRole.OPERATOR)
    channel, stub = guarded.stub(
        "decode-0", TlsConfig(guarded.folder.ca, private_key=key, certificate_chain=certificate)
    )

    def num_held() -> int:
        blocks = stub.GetStats(worker_pb2.GetStatsRequest(), timeout=10).state.load.blocks
        return int(blocks.active + blocks.lent)

    request = inference_pb2.GenerateRequest(
        text="Count.",
        sampling=common_pb2.SamplingParams(max_tokens=1000, temperature=0, num_logprobs=20, ignore_eos=True),
    )
    # By itself gRPC takes up to megabytes from its peer before anybody has asked for them.
    small = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384))
    credentials = grpc.ssl_channel_credentials(guarded.folder.ca.read_bytes())
    with channel, grpc.secure_channel(guarded.local.grpc_address, credentials, small) as lazy:
        stream = inference_pb2_grpc.InferenceServiceStub(lazy).Generate(request, timeout=120)
        next(stream)
        until_s = time.monotonic() + 20
        while not num_held():
            assert time.monotonic() < until_s
        while num_held():
            assert time.monotonic() < until_s, "it holds them still"
            time.sleep(0.1)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
    assert errors.from_rpc_error(caught.value).reason == "CLIENT_TOO_SLOW"


def test_an_operator_drains_a_worker(guarded: Guarded) -> None:
    certificate, key = guarded.folder.pair(CertificateRole.OPERATOR)
    command = [sys.executable, "-m", "kvferry.cli", "drain", "prefill-0", "--address", guarded.local.grpc_address]
    tls = ["--tls-ca", str(guarded.folder.ca), "--tls-cert", str(certificate), "--tls-key", str(key)]
    done = subprocess.run([*command, *tls], cwd=clone_root(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "holds nothing for anybody" in done.stderr
