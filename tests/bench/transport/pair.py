"""Two processes of one library with a pool each, or one process with both: one batch, and proof of where it went."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from tests.bench.transport.pattern import Arrival
from tests.bench.transport.peers import KVFERRY, MEMCPY, Library
from tests.bench.transport.process import Process, SideFailed
from tests.bench.transport.sides.base import Stamps


class Pair:
    """A context manager.  Every library goes through the same steps, so that the caches know the pools equally well."""

    def __init__(
        self, library: Library, num_blocks: int, nbytes: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self._library = library
        self.initiator = Process(library, "initiator", num_blocks, nbytes, environment)
        if library is MEMCPY:
            self.target = self.initiator
        else:
            self.target = Process(library, "target", num_blocks, nbytes, environment)
            connect(self.initiator, self.target)
        if library is KVFERRY:
            expected = "rma" if environment else "mapped"
            if (path := self.initiator.ask("path")) != expected:
                raise SideFailed(f"kvferry's bytes go by {path}, which is not what is to be measured ({expected})")
        self._rest()
        # The first access to a page costs a fault in every process that maps it, a multiple of the copy.
        everything = range(num_blocks)
        self.run("write", everything, everything, salt=0)

    def run(self, op: str, local: Sequence[int], remote: Sequence[int], salt: int) -> Stamps:
        """Fills both pools, runs, and looks at every block of the pool that was written."""
        salts = {"target": 2 * salt, "initiator": 2 * salt + 1}
        with self._awake():
            self.target.ask("fill", role="target", salt=salts["target"])
            self.initiator.ask("fill", role="initiator", salt=salts["initiator"])
            stamps = Stamps(**self.initiator.ask("run", op=op, local=local, remote=remote))
            if op == "write":
                check(self.target, "target", [Arrival(salts["initiator"], local, remote)], salts["target"])
            else:
                check(self.initiator, "initiator", [Arrival(salts["target"], remote, local)], salts["initiator"])
        return stamps

    def close(self) -> None:
        self.initiator.close()
        if self.target is not self.initiator:
            self.target.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Threads that spin would take the cores of whoever is measured in the meantime."""
        if self._library.spins:
            self.initiator.go_on()
            self.target.go_on()
        yield
        self._rest()

    def _rest(self) -> None:
        if self._library.spins:
            self.initiator.stop()
            self.target.stop()


def connect(initiator: Process, target: Process) -> None:
    if back := initiator.ask("connect", description=target.ask("describe")):
        target.ask("connect", description=back)


def check(process: Process, role: str, arrivals: Sequence[Arrival], salt: int | None = None) -> None:
    """Raises SideFailed unless the pool holds what should have arrived; see ``pattern.num_wrong`` for ``salt``."""
    if num_wrong := process.ask("num_wrong", role=role, salt=salt, arrivals=[dataclasses.asdict(a) for a in arrivals]):
        raise SideFailed(f"{num_wrong} blocks of the {role}'s pool hold what they should not")
