"""A client of a protocol, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any


class Client(asyncio.Transport):
    """What a server has of its connection; keeps what it answers, all of which is read at once."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = b""
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.answer += bytes(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    abort = close

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def say(
    protocol: Any, client: Client, data: bytes, tasks: Callable[[], Iterable[asyncio.Task[Any]]], what: str
) -> None:
    """In two parts; then the client hangs up, and none of the ``tasks`` that there are by then may outlive that."""
    protocol.connection_made(client)
    for part in (data[: len(data) // 2], data[len(data) // 2 :]):
        if part and not client.is_closing():  # a loop never says that nothing came
            protocol.data_received(part)
        for _ in range(20):
            await asyncio.sleep(0)
    begun = set(tasks())
    protocol.connection_lost(None)
    if begun:
        _, left = await asyncio.wait(begun, timeout=5)
        assert not left, f"a {what} outlives its connection"
