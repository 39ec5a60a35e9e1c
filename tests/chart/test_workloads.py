"""What the pods of the chart are started with is what the services take."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gateway.config import GatewayConfig
from kvferry._roles import CertificateRole
from services.directory.config import DirectoryConfig
from services.runtime.config import load
from services.runtime.server import LIVE
from services.worker.config import WorkerConfig
from services.worker.labels import parse_labels
from tests.certificates import make_authority
from tests.chart.helm import NAMESPACE, ROOT, Manifest, render
from tests.chart.workloads import CONFIGS, FIELDS, Workload, of_kind, selects, workloads

ROLES = {
    "gateway": CertificateRole.GATEWAY,
    "services.directory": CertificateRole.DIRECTORY,
    "services.prefill": CertificateRole.WORKER,
    "services.decode": CertificateRole.WORKER,
}


def parsed(workload: Workload) -> GatewayConfig | DirectoryConfig | WorkerConfig:
    config = load(CONFIGS[workload.module], workload.arguments, workload.name, workload.environ)
    assert isinstance(config, GatewayConfig | DirectoryConfig | WorkerConfig)
    return config


def test_services_take_what_they_are_started_with(manifests: list[Manifest], tmp_path: Path) -> None:
    found = workloads(manifests)
    assert {each.module for each in found} == set(CONFIGS)
    folder = make_authority(tmp_path)
    for each in found:
        config = parsed(each)
        assert "$(" not in " ".join(each.arguments)
        host, _, port = config.listen.rpartition(":")
        assert int(port) == each.ports["grpc"]
        assert config.health_port == each.ports["health"]
        if isinstance(config, GatewayConfig):
            assert config.http_listen == f"{host}:{each.ports['http']}"
        else:
            assert config.metrics_port == each.ports["metrics"]
        if isinstance(config, WorkerConfig):
            # What others reach it by is what it listens on.
            assert (host, config.metrics_host) == (FIELDS["status.podIP"],) * 2
            assert config.worker_id == FIELDS["metadata.name"]
            assert parse_labels(config.label)["host"] == FIELDS["spec.nodeName"]
            assert each.container["name"] == each.module.removeprefix("services.") == each.labels["kvferry.io/role"]
        # Whether it would start: with certificates, or by saying that it has none.
        if config.tls_cert is None:
            assert config.insecure
            assert config.certificates(config.listen) is None
        else:
            assert not config.insecure
            assert {path.parent for path in (config.tls_cert, config.tls_key, config.tls_ca) if path} == {
                Path("/etc/kvferry/tls")
            }
            role = ROLES[each.module].value
            for name, file in (("tls.crt", f"{role}.pem"), ("tls.key", f"{role}.key"), ("ca.crt", "ca.pem")):
                shutil.copy(folder / file, tmp_path / name)
            there = [argument.replace("/etc/kvferry/tls", str(tmp_path)) for argument in each.arguments]
            assert load(CONFIGS[each.module], there, each.name, {}).certificates(config.listen) is not None


def test_an_option_that_a_service_does_not_know_is_refused(helm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = render(helm, settings=("gateway.options.max_request=3",))
    with pytest.raises(SystemExit):
        parsed(next(each for each in workloads(manifests) if each.module == "gateway"))
    assert "--max-request" in capsys.readouterr().err


def test_options_arrive_as_they_are_meant(helm: Path) -> None:
    settings = (
        "directory.options.max_index_entries=20000000", "gateway.options.slo_ttft_s=0.5", "tls.mode=none",
        "workers.prefill.options.verify_transfers=1/4", "workers.prefill.labels.rack=12",
        "workers.prefill.labels.zone=b",
    )  # fmt: skip
    found = {each.module: parsed(each) for each in workloads(render(helm, settings=settings))}
    directory, gateway, prefill = found["services.directory"], found["gateway"], found["services.prefill"]
    assert isinstance(directory, DirectoryConfig)
    assert isinstance(gateway, GatewayConfig)
    assert isinstance(prefill, WorkerConfig)
    assert directory.max_index_entries == 20_000_000
    assert gateway.slo_ttft_s == 0.5
    assert prefill.verify_transfers == "1/4"
    assert prefill.kv_memory == "2GiB"  # of workerDefaults
    assert parse_labels(prefill.label) == {"host": FIELDS["spec.nodeName"], "rack": "12", "zone": "b"}


def test_everybody_knows_every_directory_by_its_own_name(manifests: list[Manifest]) -> None:
    (directory,) = [each for each in workloads(manifests) if each.module == "services.directory"]
    (service,) = [m for m in of_kind(manifests, "Service") if m["metadata"]["name"] == directory.name]
    assert service["spec"]["clusterIP"] == "None"
    assert directory.manifest["spec"]["serviceName"] == service["metadata"]["name"]
    wanted = tuple(
        f"{directory.name}-{number}.{directory.name}.{NAMESPACE}.svc.cluster.local:{directory.ports['grpc']}"
        for number in range(directory.manifest["spec"]["replicas"])
    )
    for each in workloads(manifests):
        config = parsed(each)
        if not isinstance(config, DirectoryConfig):
            assert config.directory == wanted


def test_a_pod_has_time_to_drain(manifests: list[Manifest]) -> None:
    for each in workloads(manifests):
        config = parsed(each)
        pause = each.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain = 0.0 if isinstance(config, DirectoryConfig) else config.drain_timeout_s
        # Besides what it says, a service closes its servers, with a grace of two seconds at most each.
        assert each.pod["terminationGracePeriodSeconds"] >= pause + drain + 10
        assert (pause > 0) is (each.module == "gateway")


def test_only_what_does_not_work_is_restarted(manifests: list[Manifest]) -> None:
    for each in workloads(manifests):
        probes = {name: each.container[name]["grpc"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
        assert {probe["port"] for probe in probes.values()} == {each.ports["health"]}
        assert probes["livenessProbe"]["service"] == probes["startupProbe"]["service"] == LIVE
        assert "service" not in probes["readinessProbe"]


def test_options_do_not_come_from_services_of_the_namespace(manifests: list[Manifest]) -> None:
    """Of a Service kvferry-health Kubernetes would make KVFERRY_HEALTH_PORT=tcp://..., which is an option."""
    for each in workloads(manifests):
        assert each.pod["enableServiceLinks"] is False
        assert not [name for name in each.environ if name.startswith("KVFERRY_")]


def test_pods_are_restricted_but_for_what_is_asked_for(
    request: pytest.FixtureRequest, rendered: Callable[[str], list[Manifest]], manifests: list[Manifest]
) -> None:
    """The profile "restricted" of Kubernetes' Pod Security Standards, and no more than that is written to."""
    may_lock = manifests is rendered("rdma")
    for each in workloads(manifests):
        pod, security = each.pod, each.container["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        is_worker = each.labels["app.kubernetes.io/component"] == "worker"
        wanted = {"drop": ["ALL"], "add": ["IPC_LOCK"]} if may_lock and is_worker else {"drop": ["ALL"]}
        assert security["capabilities"] == wanted
        assert pod.get("hostPID", False) is (manifests is rendered("secrets") and is_worker)
        assert not {"hostIPC", "hostNetwork"} & set(pod)
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim"}
        for name in ("HOME", "TMPDIR", "HF_HOME"):
            mounts = [m["mountPath"] for m in each.container["volumeMounts"] if not m.get("readOnly")]
            assert any(Path(each.environ[name]).is_relative_to(mount) for mount in mounts)


def test_ports_and_selectors_lead_to_pods(manifests: list[Manifest]) -> None:
    found = workloads(manifests)

    def chosen(selector: dict[str, str]) -> list[Workload]:
        pods = [each for each in found if selects(selector, each.labels)]
        assert pods, selector
        return pods

    for service in of_kind(manifests, "Service"):
        for each in chosen(service["spec"]["selector"]):
            for port in service["spec"]["ports"]:
                assert each.ports[port["targetPort"]] == port["port"]
    budgets = [chosen(m["spec"]["selector"]["matchLabels"]) for m in of_kind(manifests, "PodDisruptionBudget")]
    assert sorted(each.name for pods in budgets for each in pods) == sorted(each.name for each in found)
    for policy in of_kind(manifests, "NetworkPolicy"):
        for each in chosen(policy["spec"]["podSelector"]["matchLabels"]):
            for rule in policy["spec"]["ingress"]:
                assert {port["port"] for port in rule.get("ports", [])} <= set(each.ports)
    for monitor in of_kind(manifests, "ServiceMonitor"):
        services = [
            s for s in of_kind(manifests, "Service")
            if selects(monitor["spec"]["selector"]["matchLabels"], s["metadata"]["labels"])
        ]  # fmt: skip
        assert services
        for service in services:
            names = {port["name"] for port in service["spec"]["ports"]}
            assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= names
    names = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    for scaler in [*of_kind(manifests, "HorizontalPodAutoscaler"), *of_kind(manifests, "ScaledObject")]:
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in names
        (scaled,) = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (target["kind"], target["name"])]
        assert "replicas" not in scaled["spec"]  # or each upgrade of the release would set them back


# Who may open which port of whom.
REACH = {
    ("worker", "directory"): {"grpc"}, ("gateway", "directory"): {"grpc"}, ("directory", "directory"): set(),
    ("gateway", "worker"): {"grpc"}, ("directory", "worker"): set(), ("worker", "worker"): {"grpc", "metrics", "health"},
}  # fmt: skip


def test_who_may_reach_whom(rendered: Callable[[str], list[Manifest]]) -> None:
    manifests = rendered("cpu")  # where metrics and gateways are for other namespaces
    found = {each.labels["app.kubernetes.io/component"]: each for each in workloads(manifests)}
    for (source, target), wanted in REACH.items():
        reached: set[str] = set()
        for policy in of_kind(manifests, "NetworkPolicy"):
            if not selects(policy["spec"]["podSelector"]["matchLabels"], found[target].labels):
                continue
            assert policy["spec"]["policyTypes"] == ["Ingress"]
            for rule in policy["spec"]["ingress"]:
                peers = [p["podSelector"]["matchLabels"] for p in rule["from"] if "podSelector" in p]
                if any(selects(labels, found[source].labels) for labels in peers):
                    reached |= {p["port"] for p in rule["ports"]} if "ports" in rule else set(found[target].ports)
        assert reached == wanted, (source, target)


def test_certificates_name_the_roles_of_those_who_hold_them(rendered: Callable[[str], list[Manifest]]) -> None:
    manifests = rendered("cpu")
    certificates = {m["spec"]["secretName"]: m["spec"] for m in of_kind(manifests, "Certificate")}
    for each in workloads(manifests):
        certificate = certificates[each.secrets["/etc/kvferry/tls"]]
        known = {role.dns_name for role in CertificateRole}
        assert known & set(certificate["dnsNames"]) == {ROLES[each.module].dns_name}
        assert {"server auth", "client auth"} <= set(certificate["usages"])  # they are both
    (door,) = [spec for spec in certificates.values() if "gateway.kvferry.internal" in spec.get("dnsNames", ())]
    assert {"llm.example.org", f"prod-kvferry-gateway.{NAMESPACE}.svc"} <= set(door["dnsNames"])
    assert door["ipAddresses"] == ["203.0.113.7"]
    operators = [s for s in certificates.values() if CertificateRole.OPERATOR.dns_name in s.get("dnsNames", ())]
    assert len(operators) == 1


def test_devices_are_asked_for(rendered: Callable[[str], list[Manifest]]) -> None:
    found = {each.name: each for each in workloads(rendered("rdma"))}
    prefill = found["prod-kvferry-prefill"]
    limits = prefill.container["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["rdma/hca_shared_devices_a"], limits["memory"]) == (2, 1, "64Gi")
    config = parsed(prefill)
    assert isinstance(config, WorkerConfig)
    assert (config.device, config.tp, config.chunk_tokens, config.dtype) == ("cuda", 2, 2048, "bfloat16")
    assert "kvferry-worker-cuda" in prefill.container["image"]
    assert prefill.environ["UCX_NET_DEVICES"] == "mlx5_0:1"
    assert "prod-kvferry-decode" not in found
    racks = {name: parsed(each).label for name, each in found.items() if "decode-r" in name}  # type: ignore[union-attr]
    assert {labels[-1] for labels in racks.values()} == {"rack=r1", "rack=r2"}


def test_the_scaler_may_scale_and_nothing_else(rendered: Callable[[str], list[Manifest]]) -> None:
    manifests = rendered("secrets")
    (role,) = of_kind(manifests, "Role")
    assert role["rules"] == [
        {
            "apiGroups": ["apps"], "resources": ["statefulsets/scale"], "verbs": ["get", "patch"],
            "resourceNames": ["prod-kvferry-decode", "prod-kvferry-prefill"],
        }
    ]  # fmt: skip
    (binding,) = of_kind(manifests, "RoleBinding")
    accounts = {m["metadata"]["name"] for m in of_kind(manifests, "ServiceAccount")}
    assert {s["name"] for s in binding["subjects"]} <= accounts
    for each in workloads(manifests):
        assert each.pod["serviceAccountName"] not in {s["name"] for s in binding["subjects"]}
        assert ("replicas" in each.manifest["spec"]) is not (each.labels["app.kubernetes.io/component"] == "worker")


def test_scaling_is_by_metrics_that_there_are(rendered: Callable[[str], list[Manifest]], tmp_path: Path) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    manifests = rendered("cpu")
    queries = [t["metadata"]["query"] for m in of_kind(manifests, "ScaledObject") for t in m["spec"]["triggers"]]
    names = {
        metric["pods"]["metric"]["name"]
        for m in of_kind(manifests, "HorizontalPodAutoscaler")
        for metric in m["spec"]["metrics"]
    }
    assert len(names) == 2
    assert len(queries) == 1
    for name in names | {name for query in queries for name in re.findall(r"kvferry_\w+", query)}:
        assert f"| `{name}` | " in text
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    rules = [{"record": f"scaled:by:{number}", "expr": query} for number, query in enumerate(queries)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "chart", "rules": rules}]}))
    done = subprocess.run(
        [promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
