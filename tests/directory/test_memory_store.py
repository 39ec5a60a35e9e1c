from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from services.directory import memory_store
from services.directory.core import UnknownLeaseError
from services.directory.events import Role, Worker
from services.directory.memory_store import MemoryStore


async def test_a_process_that_hung_ends_no_lease_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(memory_store, "time", SimpleNamespace(monotonic=lambda: now_s, time_ns=time.time_ns))
    store = MemoryStore()
    lease, _ = await store.register(Worker("a", 1, Role.DECODE, b"", b""), 5)
    now_s += 30
    assert await store.keep_alive(lease, b"") == 5
    for _ in range(3):
        now_s += 2
        await store.register(Worker("b", 1, Role.DECODE, b"", b""), 5)  # it is not the process that is silent
    with pytest.raises(UnknownLeaseError):
        await store.keep_alive(lease, b"")
