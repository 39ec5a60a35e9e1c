"""One cluster of containers for all tests here, gone after them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry import Client, TlsConfig
from tests.containers.stack import Stack, why_not

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.containers)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    if (problem := why_not()) is not None:
        pytest.skip(problem)
    stack = Stack()
    try:
        stack.down()  # of a run that was killed
        stack.up()
        yield stack
    finally:
        stack.down()


@pytest.fixture(scope="session")
def authority(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tls") / "ca.pem"
    file.write_text(stack.authority())
    return file


@pytest.fixture
def client(stack: Stack, authority: Path) -> Iterator[Client]:
    """Of both gateways."""
    tls = TlsConfig(root_certificates=authority)
    with Client(stack.addresses, tls=tls, max_attempts=8, generate_timeout=120) as client:
        yield client
