from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.directory.redis_server import RedisServer


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests that leave it running."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """Empty."""
    with shared_redis.client() as client:
        client.flushall()
    return shared_redis
