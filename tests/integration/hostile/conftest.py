"""Two clusters with small pools that verify every transfer: one whose workers map each other's pools, one over tcp."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.engine.model_files import ModelFiles
from tests.integration.conftest import started
from tests.integration.hostile.peer import Peer
from tests.integration.hostile.siege import KV_MEMORY, SETTINGS, Siege, layout_of
from transport import create

TCP = {"UCX_TLS": "tcp,self"}
PATHS = ("mapped", "rma")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A module's PATHS say on which of the clusters its tests run; without, on both."""

    def is_meant(item: pytest.Item) -> bool:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        return parameters.get("besieged", PATHS[0]) in getattr(getattr(item, "module", None), "PATHS", PATHS)

    items[:] = [item for item in items if "besieged" not in getattr(item, "fixturenames", ()) or is_meant(item)]


@pytest.fixture(scope="package", params=PATHS)
def besieged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, smollm2: ModelFiles
) -> Iterator[Siege]:
    environment = TCP if request.param == "rma" else {}
    log_dir, model = tmp_path_factory.mktemp("logs"), smollm2.config
    with started(log_dir, {**SETTINGS, **environment}, kv_memory=KV_MEMORY) as running, create("ucx") as transport:
        running.wait_routable()
        layout = layout_of(running.info("decode-0"), model.num_layers, model.num_kv_heads, model.head_dim)
        yield Siege(running, request.param, environment, layout, transport, log_dir)


@pytest.fixture
def siege(besieged: Siege) -> Iterator[Siege]:
    """Nobody has died of the test, and nobody holds anything after it."""
    pids = besieged.pids()
    yield besieged
    besieged.running.assert_settles(10.0)
    assert besieged.pids() == pids


@pytest.fixture
def peer(siege: Siege) -> Iterator[Peer]:
    with siege.peer() as peer:
        yield peer
