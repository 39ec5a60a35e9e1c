"""The chart is what Kubernetes takes: linted, rendered, and each object held against its schema."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from kvferry import __version__
from tests.chart.conftest import VALUE_SETS
from tests.chart.helm import CHART, HelmError, Manifest, render, run

OLDEST, NEWER = "1.30", "1.35"
# Of other people's controllers: there is no schema of them to hold these against.
FOREIGN = {"cert-manager.io/v1", "monitoring.coreos.com/v1", "keda.sh/v1alpha1"}


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS)
def test_lint(helm: Path, values: tuple[str, ...]) -> None:
    run(helm, "lint", ".", "--strict", *(part for name in values for part in ("--values", f"examples/{name}.yaml")))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_object_is_as_its_schema_says(
    rendered: Callable[[str], list[Manifest]], manifests: list[Manifest]
) -> None:
    # The newer ones differ little: one set is enough to see what they have given up.
    versions = (OLDEST, NEWER) if manifests is rendered("cpu") else (OLDEST,)
    known = [manifest for manifest in manifests if manifest["apiVersion"] not in FOREIGN]
    assert len(known) >= 15
    for version in versions:
        for manifest in known:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_names_are_unique_and_fit(manifests: list[Manifest]) -> None:
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)
    for kind, name in names:
        longest = 52 if kind == "StatefulSet" else 63  # a StatefulSet's pods carry a hash and a number besides
        assert len(name) <= longest
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)


def test_every_example_is_rendered() -> None:
    assert {path.stem for path in (CHART / "examples").iterdir()} == {n for names in VALUE_SETS.values() for n in names}


def test_the_version_is_the_packages() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    assert f">={OLDEST}" in chart["kubeVersion"]


@pytest.mark.parametrize(
    ("values", "settings", "sentence"),
    [
        ((), ("workrs.decode.replicas=3",), "additional properties 'workrs' not allowed"),
        ((), ("workers.decode.replica=3",), "additional properties 'replica' not allowed"),
        ((), ("workers.decode.role=both",), "/workers/decode"),
        ((), ("gateway.options.max-requests=3",), "max-requests"),
        ((), ("directory.replicas=2",), "need directory.store.url"),
        ((), ("tls.mode=secrets",), "must name a Secret with tls.crt, tls.key and ca.crt"),
        (("cpu",), ("scaler.enabled=true",), "two who would set the same replicas"),
        ((), ("workers.decode.autoscaling.enabled=true", "workers.decode.autoscaling.kind=keda"), "of a Prometheus"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    helm: Path, values: tuple[str, ...], settings: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(HelmError, match=re.escape(sentence)):
        render(helm, values, settings)
