"""Directories as processes of their own, on one store."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import Member, Role, clone_root
from kvferry.cli.ports import pick_free
from tests.directory.redis_server import RedisServer

LOGS = Path(__file__).resolve().parents[3] / "build" / "logs" / "bench-directory"


def can_share() -> bool:
    return shutil.which("redis-server") is not None or shutil.which("valkey-server") is not None


@dataclass(frozen=True, slots=True)
class Directories:
    addresses: tuple[str, ...]
    local: LocalCluster
    redis: RedisServer | None

    def pids(self) -> list[int]:
        found = [self.local.pid(member.name) for member in self.local.members]
        return [pid for pid in found if pid is not None]


def directory_members(addresses: tuple[str, ...], store: str) -> list[Member]:
    return [
        Member(
            f"directory-{i}", Role.DIRECTORY,
            (sys.executable, "-m", "services.directory", "--listen", address, "--store", store),
            address, "", cwd=clone_root(), environment={"PYTHONUNBUFFERED": "1"},
        )
        for i, address in enumerate(addresses)
    ]  # fmt: skip


@contextmanager
def directories(*, shared: bool) -> Iterator[Directories]:
    """Two on a Redis, or one that has all in memory."""
    with ExitStack() as stack:
        redis = None
        if shared:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            redis = stack.enter_context(RedisServer(folder))
        addresses = tuple(f"127.0.0.1:{port}" for port in pick_free(2 if shared else 1))
        members = directory_members(addresses, redis.url if redis else "memory")
        local = LocalCluster(members, LOGS / ("shared" if shared else "memory"), grpc_address="", http_url="")
        local.start()
        stack.callback(local.stop)
        yield Directories(addresses, local, redis)
