"""The overlays that need devices, which no test machine has: what compose makes of them, without starting anything."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from tests.containers.stack import COMMAND_S, ROOT, WORKERS, why_not

_GIVEN = {"CUDA_BASE_IMAGE": "cuda-devel", "UCX_NET_DEVICES": "mlx5_0:1"}


def config(*overlays: str, given: dict[str, str] = _GIVEN) -> dict[str, Any]:
    """Of its services; AssertionError has what compose wrote."""
    if (problem := why_not()) is not None:
        pytest.skip(problem)
    files = [part for name in ("compose.yaml", *overlays) for part in ("--file", str(ROOT / "docker" / name))]
    environment = {name: value for name, value in os.environ.items() if name not in _GIVEN} | given
    command = ["docker", "compose", *files, "config", "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def test_each_worker_has_a_gpu_of_its_own() -> None:
    services = config("compose.gpu.yaml")
    given = [services[name]["deploy"]["resources"]["reservations"]["devices"] for name in WORKERS]
    assert [device["driver"] for (device,) in given] == ["nvidia"] * len(WORKERS)
    assert len({device["device_ids"][0] for (device,) in given}) == len(WORKERS)
    for name in WORKERS:
        assert services[name]["build"]["target"] == "worker-cuda"
        assert services[name]["build"]["args"]["BASE_IMAGE"] == "cuda-devel"
        assert services[name]["environment"]["KVFERRY_DEVICE"] == "cuda"
        assert services[name]["ipc"] == "service:pids"
        assert services[name]["read_only"] is True


@pytest.mark.parametrize("under", [(), ("compose.gpu.yaml",), ("compose.tls.yaml", "compose.gpu.yaml")])
def test_each_worker_may_lock_its_pool_and_reach_adapters(under: tuple[str, ...]) -> None:
    services = config(*under, "compose.rdma.yaml")
    for name in WORKERS:
        assert services[name]["ulimits"]["memlock"] == -1
        assert [device["source"] for device in services[name]["devices"]] == ["/dev/infiniband"]
        assert services[name]["environment"]["UCX_NET_DEVICES"] == "mlx5_0:1"
        assert services[name]["environment"]["KVFERRY_DIRECTORY"], "what it had is still there"


@pytest.mark.parametrize("overlay", ["compose.gpu.yaml", "compose.rdma.yaml"])
def test_what_must_be_given_is_asked_for(overlay: str) -> None:
    with pytest.raises(AssertionError, match=r"CUDA_BASE_IMAGE|UCX_NET_DEVICES"):
        config(overlay, given={})
