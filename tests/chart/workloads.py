"""Pods of rendered manifests, as the kubelet would start them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.config import GatewayConfig
from services.directory.config import DirectoryConfig
from services.worker.config import WorkerConfig
from tests.chart.helm import Manifest

CONFIGS: Mapping[str, type] = {
    "gateway": GatewayConfig,
    "services.directory": DirectoryConfig,
    "services.prefill": WorkerConfig,
    "services.decode": WorkerConfig,
}
FIELDS = {
    "status.podIP": "10.1.2.3",
    "metadata.name": "prod-kvferry-worker-0",
    "spec.nodeName": "node-7.example.org",
    "metadata.labels['topology.kubernetes.io/zone']": "zone-a",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """The pods of one Deployment or StatefulSet; each has one container."""

    manifest: Manifest

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.manifest["spec"]["template"]["metadata"]["labels"])

    @property
    def pod(self) -> dict[str, Any]:
        return dict(self.manifest["spec"]["template"]["spec"])

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.pod["containers"]
        return dict(container)

    @property
    def module(self) -> str:
        assert self.container["command"][:2] == ["python", "-m"]
        return str(self.container["command"][2])

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def environ(self) -> dict[str, str]:
        return {
            entry["name"]: entry["value"]
            if "value" in entry
            else FIELDS[entry["valueFrom"]["fieldRef"]["fieldPath"]]
            if "fieldRef" in entry["valueFrom"]
            else "secret"
            for entry in self.container["env"]
        }

    @property
    def arguments(self) -> list[str]:
        """With $(NAME) put in, as far as there are such variables."""
        environ = self.environ
        return [
            re.sub(r"\$\((\w+)\)", lambda found: environ.get(found[1], found[0]), argument)
            for argument in self.container["args"]
        ]

    @property
    def secrets(self) -> dict[str, str]:
        """By folder: whence its files are."""
        volumes = {v["name"]: v["secret"]["secretName"] for v in self.pod["volumes"] if "secret" in v}
        return {
            mount["mountPath"]: volumes[mount["name"]]
            for mount in self.container["volumeMounts"]
            if mount["name"] in volumes
        }


def workloads(manifests: Sequence[Manifest]) -> list[Workload]:
    return [Workload(m) for m in manifests if m["kind"] in ("Deployment", "StatefulSet")]


def of_kind(manifests: Sequence[Manifest], kind: str) -> list[Manifest]:
    return [m for m in manifests if m["kind"] == kind]


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.items())
