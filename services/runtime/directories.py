"""The directories of one cluster, any of which will do."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from kvferry._roles import CertificateRole as Role
from kvferry.api.directory.v1 import directory_pb2_grpc
from services.runtime.channels import Channels
from services.runtime.tls import Certificates


@dataclass(frozen=True, slots=True)
class Directory:
    address: str
    stub: Any


class Directories:
    """Those at ``addresses`` share a store: leases, sequence numbers and revisions of one are those of the others.  Begins
    with any of them, so that a cluster's members spread.  Opens channels when they are used and closes them on leaving.
    Owned by one event loop."""

    def __init__(
        self,
        addresses: tuple[str, ...],
        *,
        certificates: Certificates | None = None,
        choose: Callable[[int], int] = random.randrange,
    ) -> None:
        if not addresses:
            raise ValueError("at least one directory must be named")
        self._addresses = addresses
        self._number = choose(len(addresses))
        self._channels = Channels(certificates, peer=Role.DIRECTORY)

    @property
    def current(self) -> Directory:
        address = self._addresses[self._number]
        return Directory(address, directory_pb2_grpc.DirectoryServiceStub(self._channels.get(address)))

    def move_on(self, lost: Directory) -> None:
        """``lost`` did not answer.  Whoever finds that it was left already changes nothing."""
        if self._addresses[self._number] == lost.address:
            self._number = (self._number + 1) % len(self._addresses)

    async def __aenter__(self) -> Self:
        await self._channels.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channels.__aexit__(kind, error, traceback)
