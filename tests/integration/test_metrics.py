"""The catalogue of metrics is what processes export, and the Grafana dashboard asks for what is in it."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def prometheus(folder: Path, urls: Sequence[str]) -> Iterator[Callable[[str], list[float]]]:
    """A server that looks at ``urls`` every second, as what to ask it: the values of an expression now."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    config, log = folder / "prometheus.yml", folder / "prometheus.log"
    targets = [url.removeprefix("http://").removesuffix("/metrics") for url in urls]
    jobs = [{"job_name": "kvferry", "static_configs": [{"targets": targets}]}]
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )

    def ask(expression: str) -> list[float]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}", timeout=10) as answer:
            told = json.load(answer)
        assert told["status"] == "success", told
        return [float(each["value"][1]) for each in told["data"]["result"]]

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return len(ask("up == 1")) == len(targets)
        except OSError:
            return False

    try:
        deadline_s = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.2)
        yield ask
    finally:
        process.terminate()
        process.wait(30)


def test_what_the_dashboard_asks_has_an_answer(cluster: Running, tmp_path: Path) -> None:
    """By Prometheus itself, of a cluster that answers requests meanwhile."""
    asked = [expression.replace("$__rate_interval", "10s") for expression in expressions()]
    with (
        prometheus(tmp_path, [member.metrics_url for member in cluster.local.members]) as ask,
        Client(cluster.address) as client,
    ):
        unanswered, deadline_s = asked, time.monotonic() + 60
        while unanswered:
            assert time.monotonic() < deadline_s, unanswered
            client.generate("Count on. " * 40 + str(len(unanswered)), max_tokens=24, temperature=0).result()
            unanswered = [each for each in unanswered if not any(map(math.isfinite, ask(each)))]
