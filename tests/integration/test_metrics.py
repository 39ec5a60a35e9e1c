"""The catalogue of metrics is what processes export, and the Grafana dashboard asks for what is in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvferry import Client
from tests.integration.conftest import Running

ROOT = Path(__file__).parents[2]
CATALOGUE = ROOT / "docs" / "metrics.md"
DASHBOARD = ROOT / "docker" / "grafana" / "kvferry.json"
PROCESSES = {"workers": {"prefill", "decode"}, "gateway": {"gateway"}, "directory": {"directory"}}


@dataclass(frozen=True, slots=True)
class Listed:
    type: str
    labels: frozenset[str]
    processes: frozenset[str]


def catalogue() -> dict[str, Listed]:
    listed: dict[str, Listed] = {}
    for line in CATALOGUE.read_text().splitlines():
        if not line.startswith("| `"):
            continue
        name, type_, labels, unit, processes, meaning = (cell.strip() for cell in line.strip("|").split("|"))
        assert unit, f"{name} has no unit"
        assert meaning, f"{name} has no meaning"
        name = name.strip("`")
        assert name not in listed, f"{name} is there twice"
        who = {process for part in processes.split(", ") for process in PROCESSES.get(part, {part})}
        listed[name] = Listed(type_, frozenset(re.findall(r"`(\w+)`", labels)), frozenset(who))
    return listed


def exported(url: str) -> dict[str, tuple[str, frozenset[str]]]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("kvferry_") and not family.name.endswith("_created"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = frozenset(label for sample in family.samples for label in sample.labels) - {"le"}
            found[name] = (family.type, labels)
    return found


def test_the_catalogue_lists_what_processes_export_and_nothing_else(cluster: Running) -> None:
    with Client(cluster.address) as client:
        client.generate(
            "Once upon a time", max_tokens=4, temperature=0
        ).result()  # outcomes have labels once there is one
    cluster.wait_until(lambda: not cluster.cluster_view().num_requests_in_flight, 10, "the request has ended")
    listed = catalogue()
    seen: dict[str, set[str]] = {}
    for member in cluster.local.members:
        for name, (type_, labels) in exported(member.metrics_url).items():
            assert name in listed, f"{member.name} exports {name}, which docs/metrics.md does not list"
            assert (type_, labels) == (listed[name].type, listed[name].labels), name
            seen.setdefault(name, set()).add(member.role.value)
    assert {name: frozenset(processes) for name, processes in seen.items()} == {
        name: entry.processes for name, entry in listed.items()
    }


def expressions() -> list[str]:
    return [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_for_metrics_of_the_catalogue() -> None:
    listed = catalogue()
    histograms = {f"{name}_bucket" for name, entry in listed.items() if entry.type == "histogram"}
    for expression in expressions():
        names = set(re.findall(r"kvferry_\w+", expression))
        assert names, expression
        assert names <= set(listed) | histograms, expression


def test_prometheus_parses_what_the_dashboard_asks(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(expressions())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    done = subprocess.run(
        [promtool, "check", "rules", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout
