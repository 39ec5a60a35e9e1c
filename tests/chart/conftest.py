from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.chart.helm import Manifest, NoHelmError, find_helm, render

# Each is what somebody would install.
VALUE_SETS: dict[str, tuple[str, ...]] = {
    "default": (),
    "cpu": ("cpu",),
    "gpu": ("gpu",),
    "rdma": ("gpu", "rdma"),
    "insecure": ("insecure",),
    "secrets": ("secrets",),
}


@pytest.fixture(scope="session")
def helm() -> Path:
    try:
        return find_helm()
    except NoHelmError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def rendered(helm: Path) -> Callable[[str], list[Manifest]]:
    return cache(lambda name: render(helm, VALUE_SETS[name]))


@pytest.fixture(params=VALUE_SETS)
def manifests(request: pytest.FixtureRequest, rendered: Callable[[str], list[Manifest]]) -> list[Manifest]:
    return rendered(request.param)
